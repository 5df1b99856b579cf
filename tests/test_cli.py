"""The command line: what it prints, and that whatever cannot work is refused in one line before any weight loads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

import dsdistill
from dsdistill import cli
from dsdistill.config import UserError
from tests.conftest import BERT

CODE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def command(*arguments: object) -> subprocess.CompletedProcess:
    """python -m dsdistill ARGUMENTS, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "dsdistill", *map(str, arguments)],
        env=os.environ | CODE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def merge(settings: dict, changes: dict) -> dict:
    """Changes by dotted key; None takes a key away."""
    settings = yaml.safe_load(yaml.safe_dump(settings))
    for dotted, value in changes.items():
        *parents, key = dotted.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
        if value is None:
            del section[key]
    return settings


def snapshot(folder: Path) -> dict:
    """Every path below and what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def config(settings, tmp_path):
    """Writes the tests' config with changes; returns its path."""

    def write(changes: dict | None = None, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(merge(settings, changes or {})), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a command in this process; returns the one line it leaves, having changed nothing and loaded no weight."""
    import dsdistill.engine.run
    import dsdistill.engine.teacher
    import dsdistill.engine.train
    import dsdistill.models.build

    def loads(*_, **__):
        pytest.fail("a model was built before the refusal")

    def refuse(*arguments: object) -> str:
        before, environment = snapshot(tmp_path), dict(os.environ)
        with monkeypatch.context() as patch:
            for module in (
                dsdistill.engine.run,
                dsdistill.engine.train,
                dsdistill.engine.teacher,
                dsdistill.models.build,
            ):
                patch.setattr(module, "build", loads)
            patch.setattr(sys, "argv", ["dsdistill", *map(str, arguments)])
            patch.chdir(tmp_path)
            capsys.readouterr()
            try:
                with pytest.raises(SystemExit) as caught:
                    cli.main()
            finally:
                os.environ.clear()  # the engine names this process's rank there
                os.environ.update(environment)
        printed = capsys.readouterr()
        assert caught.value.code == 2, printed.err
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("dsdistill: "), printed.err
        assert ": got " in lines[0] and ", expected " in lines[0]
        assert snapshot(tmp_path) == before, "a refused command leaves nothing behind"
        return lines[0].removeprefix("dsdistill: ")

    return refuse


SMALL = {key: value for key, value in BERT.items() if key != "model_type"}
DEBERTA = {"model_type": "deberta", "relative_attention": True, "pos_att_type": ["c2p"], **SMALL}

# What is changed in a config that works, and what the line must hold.
MISTAKES = {
    "unknown key": ({"train.lerning_rate": 1}, ["train.lerning_rate", "did you mean learning_rate?"]),
    "wrong type": ({"train.steps": "ten"}, ["train.steps", "'ten'", "integer"]),
    "temperature": (
        {"terms.soft_label.temperature": 0},
        ["terms.soft_label.temperature", "got 0", "greater than 0"],
    ),
    "batch sizes": ({"train.batch_size": 10}, ["train.batch_size: got 10", "train.micro_batch_size (4)"]),
    "no term": ({"terms": {}}, ["terms: got no term"]),
    "DeepSpeed key": (
        {"student.deepspeed": {"zero_optimisation": {}}},
        ["zero_optimisation", "zero_optimization?"],
    ),
    "DeepSpeed key of a section": (
        {"student.deepspeed": {"zero_optimization": {"overlap_com": True}}},
        [
            "student.deepspeed.zero_optimization.overlap_com: got an unknown DeepSpeed key",
            "mean overlap_comm?",
        ],
    ),
    "DeepSpeed key further down": (
        {"teacher.deepspeed": {"zero_optimization": {"offload_param": {"devise": "cpu"}}}},
        ["teacher.deepspeed.zero_optimization.offload_param.devise", "did you mean device?"],
    ),
    "DeepSpeed value": (
        {"student.deepspeed": {"zero_optimization": {"reduce_bucket_size": "big"}}},
        ["student.deepspeed.zero_optimization.reduce_bucket_size: got 'big'", "integer"],
    ),
    "DeepSpeed rule": (
        {"student.deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}},
        ["student.deepspeed.zero_optimization: got ", "only supported for ZeRO Stage 3"],
    ),
    "DeepSpeed monitor": (
        {"student.deepspeed": {"tensorboard": {"enable": True}}},
        ["student.deepspeed.tensorboard.enable", "did you mean enabled?"],
    ),
    "fp16 on CPU": ({"train.dtype": "fp16"}, ["train.dtype: got fp16 without a GPU", "fp32 or bf16"]),
    "missing file": ({"data.train": "nowhere.tsv"}, ["nowhere.tsv: got no such file"]),
    "unknown extension": ({"data.train": "train.xyz"}, ["train.xyz", "'.xyz'"]),
    "text column": ({"data.text": ["txt"]}, ["train.tsv: got no column 'txt'", "text"]),
    "label column": ({"data.label": "lable"}, ["train.tsv: got no column 'lable'", "label"]),
    "label names": ({"data.labels": ["a", "b"]}, ["train.tsv, line 4", "'c'", "2 classes a, b"]),
    "map out of range": (
        {"terms.hidden.layers": [[1, 9]]},
        ["terms.hidden.layers: got teacher layer 9", "1 to 4"],
    ),
    "map beyond student": (
        {"terms.attention.layers": [[3, 4]]},
        ["terms.attention.layers", "student layer 3", "1 to 2"],
    ),
    "deeper student": (
        {"student": {"config": {**BERT, "num_hidden_layers": 5}}},
        ["terms.hidden.layers: got a student of 5 layers and a teacher of 4"],
    ),
    "heads": (
        {"student": {"config": {**BERT, "num_attention_heads": 2}}},
        ["terms.attention.heads: got match for 2 student and 4 teacher heads", "heads: mean"],
    ),
    "mean of scores": (
        {"terms.attention": {"heads": "mean", "divergence": "score_mse"}},
        ["terms.attention.divergence: got score_mse with heads: mean"],
    ),
    "layers beyond the teacher": (
        {"student": {"from_teacher": [2, 5]}},
        ["student.from_teacher: got layer 5", "layers 1 to 4"],
    ),
    "small vocabulary": (
        {"student": {"config": {**BERT, "vocab_size": 20}}},
        ["student.config.vocab_size: got 20", "entries"],
    ),
    "long sequences": ({"data.max_length": 65}, ["data.max_length: got 65", "64 positions"]),
    "structure": (
        {"student.config": {"num_hidden_layers": 3}},
        ["student.config.num_hidden_layers: got 3, expected 2, as the weights have it"],
    ),
    "unknown architecture key": (
        {"student.config": {"layers": 3}},
        ["student.config.layers: got an unknown key"],
    ),
    "unknown architecture": (
        {"student": {"config": {"model_type": "brt"}}},
        ["student.config.model_type: got 'brt'"],
    ),
    "attention that hides": (
        {"student": {"config": DEBERTA}},
        ["student: got model type deberta, 0 of 2 attention"],
    ),
    "relative bias": (
        {"student": {"config": {"model_type": "mpnet", **SMALL}}},
        ["student: got model type mpnet"],
    ),
    "shared layers": (
        {"student": {"config": {"model_type": "albert", **SMALL}}},
        ["student: got model type albert"],
    ),
    "encoder-decoder": (
        {
            "student": {"config": {"model_type": "t5", "vocab_size": 64, "num_layers": 2}},
            "terms": {"task": {}},
        },
        ["student: got model type t5, an encoder-decoder"],
    ),
    "unequal windows": (
        {
            "student": {
                "config": {
                    "model_type": "modernbert",
                    "vocab_size": 64,
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 64,
                    "local_attention": 8,
                    "layer_types": ["sliding_attention", "full_attention"],
                }
            }
        },
        ["terms.attention.layers: got student layer 1 with two-sided attention in a window of 5"],
    ),
    "missing teacher": ({"teacher.path": "./nowhere"}, ["teacher.path: got no such folder: ./nowhere"]),
    "hub teacher offline": ({"teacher.path": "some/model"}, ["teacher.path: got some/model ("]),
    "regression on text": (
        {"task": "regression", "terms": {"task": {}}},
        ["train.tsv, line 2", "'a'", "number"],
    ),
    "language model of an encoder": ({"task": "causal_lm", "data.train": "t.txt"}, ["got model type bert"]),
    "no tokenizer": (
        {"teacher": {"config": BERT}, "student": {"config": BERT}, "terms": {"task": {}}},
        ["data.tokenizer: got nothing"],
    ),
    "tokenizer folder": ({"data.tokenizer": "./nowhere"}, ["data.tokenizer: got no such folder"]),
    "hub data offline": ({"data.source": "nobody/nothing"}, ["data.source: got nobody/nothing"]),
    "recipe": ({"teacher": {"recipe": "nowhere.yaml"}}, ["nowhere.yaml: got no such file"]),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda name: name.replace(" ", "-"))
def test_mistakes_in_the_config(config, refused, mistake):
    changes, parts = MISTAKES[mistake]
    line = refused("train", config(changes))
    for part in parts:
        assert part in line


def test_the_config_without_mistakes_is_not_refused(config, monkeypatch):
    """Else the tests above could be refused for a reason that they share."""
    from dsdistill.config import load
    from dsdistill.engine.prepare import prepare

    prepared = prepare(load([config()]), world_size=1)
    assert set(prepared.objectives[0].terms) == {"task", "soft_label", "hidden", "attention", "pairwise"}


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text", "parts"),
        [
            ("train", "", ["empty file"]),
            ("train", "text\tlabel\n", ["got no rows"]),
            ("train", "text\tlabel\nthe sum\ta\n", ["one class, 'a'"]),
            ("dev", "text\tlabel\nthe sum\td\n", ["dev.tsv, line 2: got label 'd'", "a, b, c"]),
            ("dev", "text\tlabel\nthe sum\t3\n", ["dev.tsv, line 2: got label '3'"]),
            ("dev", "text\tlabel\n\ta\n", ["dev.tsv, line 2", "an empty text"]),
            ("dev", "text\tlabel\nthe\tsum\ta\n", ["dev.tsv, line 2: got 3 fields"]),
        ],
    )
    def test_data(self, config, refused, tmp_path, name, text, parts):
        path = tmp_path / f"{name}.tsv"
        path.write_text(text)
        line = refused("train", config({f"data.{name}": str(path)}))
        assert str(path) in line
        for part in parts:
            assert part in line

    def test_configs(self, refused, tmp_path, config):
        assert refused("train", "nowhere.yaml").startswith("nowhere.yaml: got no such file")
        (tmp_path / "broken.yaml").write_text("run: [")
        assert "broken.yaml" in refused("train", "broken.yaml")
        assert "a YAML file first" in refused("train", "train.steps=5")
        assert "train.steps" in refused("train", config(), "train.steps=no")

    def test_a_teacher_of_other_classes(self, config, refused, models_dir, tmp_path):
        path = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
        found = AutoConfig.from_pretrained(path)
        found.id2label = {0: "a", 1: "c", 2: "b"}
        found.label2id = {"a": 0, "c": 1, "b": 2}
        found.save_pretrained(path)
        line = refused("train", config({"teacher.path": str(path)}))
        assert (
            "teacher: got a teacher of the classes ['a', 'c', 'b'], expected the data's ['a', 'b', 'c']"
            in line
        )

    def test_a_student_with_another_tokenizer(self, config, refused, models_dir, tmp_path):
        path = shutil.copytree(models_dir / "student", tmp_path / "student")
        tokenizer = path / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"tensor"', '"rotnet"'))
        assert "student.path: got a tokenizer of" in refused("train", config({"student.path": str(path)}))

    def test_a_student_with_another_tokenizer_than_the_recipe(self, config, refused, models_dir, tmp_path):
        path = shutil.copytree(models_dir / "student", tmp_path / "student")
        tokenizer = path / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace('"tensor"', '"rotnet"'))
        teacher = str(models_dir / "teacher")
        config({"teacher": None, "student": {"path": teacher}, "terms": {"task": {}}}, "teacher.yaml")
        changes = {"teacher": {"recipe": "teacher.yaml"}, "student.path": str(path)}
        assert "student.path: got a tokenizer of" in refused("train", config(changes))

    def test_a_model_folder_without_a_tokenizer(self, config, refused, models_dir, tmp_path):
        path = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
        for file in path.glob("tokenizer*"):
            file.unlink()
        line = refused("train", config({"teacher.path": str(path), "student": {"from_teacher": [1, 2]}}))
        assert f".yaml: teacher.path: got {path}" in line and "tokenizer" in line


class TestRunFolder:
    def test_that_cannot_be_written(self, config, refused, tmp_path):
        (tmp_path / "file").touch()
        line = refused("train", config({"run.dir": str(tmp_path / "file" / "run")}))
        assert ".yaml: run.dir: got " in line and "file/run" in line

    @pytest.fixture
    def used(self, config, tmp_path):
        """A folder in which a run began: it has a checkpoint, if a damaged one."""
        from dsdistill.config import load
        from dsdistill.engine.run_folder import RunFolder

        RunFolder(str(tmp_path / "run")).open(load([config()]))
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
        return tmp_path / "run"

    def test_of_another_run(self, config, refused, used):
        line = refused("train", config(), "train.learning_rate=0.5")
        assert "config.yaml: train.learning_rate: got 0.5, expected 0.001 as this run began" in line

    def test_of_a_run_with_other_terms(self, config, refused, used):
        assert "terms.pairwise" in refused("train", config(), "terms.pairwise=null")

    def test_never_to_be_resumed(self, config, refused, used):
        line = refused("train", config(), "run.resume=never")
        assert ".yaml: run.dir: got " in line and "which holds a run" in line

    def test_a_start_that_failed_binds_nobody(self, config, tmp_path):
        from dsdistill.config import load
        from dsdistill.engine.run_folder import RunFolder

        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([config()]))
        (tmp_path / "run" / "init").mkdir()
        folder.open(load([config(), "train.learning_rate=0.5", "run.resume=never"]))
        assert load([str(tmp_path / "run" / "config.yaml")]).train.learning_rate == 0.5
        assert not (tmp_path / "run" / "init").exists(), "it may have been cut from another teacher"

    def test_of_another_teacher(self, used):
        from dsdistill.engine.run_folder import RunFolder

        folder = RunFolder(str(used))
        folder.pin_teacher("runs/teachers/one/model")
        folder.pin_teacher("runs/teachers/one/model")
        with pytest.raises(
            UserError, match="now makes runs/teachers/two/model, expected runs/teachers/one/model"
        ):
            folder.pin_teacher("runs/teachers/two/model")

    def test_evaluate_and_export_need_a_run(self, refused, tmp_path, used):
        (tmp_path / "empty").mkdir()
        for name, reason in (("nowhere", "no such folder"), ("empty", "a folder without config.yaml")):
            for arguments in (("evaluate", name), ("export", name, "--out", "out")):
                assert refused(*arguments).startswith(f"{name}: got {reason}")
        assert "without a checkpoint that verifies" in refused("evaluate", used)

    def test_export_does_not_overwrite(self, refused, tmp_path, used, monkeypatch):
        monkeypatch.setattr("dsdistill.engine.checkpoint.newest", lambda _: "step-00000001")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        line = refused("export", used, "--out", tmp_path / "out")
        assert line.startswith("--out: got ") and "not empty" in line


class TestProcess:
    """A few through a process of their own."""

    def test_help_and_version(self):
        for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["export", "--help"], []):
            done = command(*arguments)
            assert "Usage: " in done.stdout + done.stderr and "Traceback" not in done.stderr
            assert done.returncode == (0 if arguments else 2)
        assert command("--version").stdout.strip() == dsdistill.__version__
        assert "--dry-run" in command("train", "--help").stdout

    def test_dry_run_prints_the_resolved_config_and_stops(self, config, tmp_path):
        path = config()
        before = snapshot(tmp_path)
        done = command("train", path, "train.steps=5", "--dry-run")
        assert done.returncode == 0 and done.stderr == ""
        printed = yaml.safe_load(done.stdout)
        assert printed["train"]["steps"] == 5 and printed["train"]["scheduler"] == "linear"
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("mistake", ["unknown key", "attention that hides"])
    def test_mistakes(self, config, mistake):
        changes, parts = MISTAKES[mistake]
        done = command("train", config(changes))
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("dsdistill: ")
        assert all(part in done.stderr for part in parts)

    def test_an_unknown_command(self):
        done = command("trian", "x.yaml")
        assert done.returncode == 2 and "Traceback" not in done.stderr and "trian" in done.stderr
