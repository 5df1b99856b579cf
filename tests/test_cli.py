"""The command line is tested through processes and run folders; for other refusals see test_bad_input.py."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import dsdistill
from dsdistill import cli
from dsdistill.config import UserError, load
from dsdistill.engine import run_folder
from dsdistill.engine.run_folder import KEPT, MARKER, RunFolder
from tests.conftest import snapshot
from tests.engine.launch import free_port
from tests.engine.test_resume import make_checkpoint
from tests.mistakes import CONFIG
from tests.test_disk import PLACES

CODE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


# Run a given body as a command while a thread of torch's waits for the interpreter at the end of the process.
ENDING = """
import sys
from dsdistill import cli
from dsdistill.config import RunError, UserError
from tests.engine.fault_worker import want_the_interpreter_at_the_end

@cli.app.command()
def ends():
    print("printed, not flushed", end="")
    {body}

want_the_interpreter_at_the_end()
sys.argv = ["dsdistill", "ends"]
cli.main()
"""
# What the command does last, exit code, standard error.
ENDINGS = {
    "done": ("pass", 0, None),
    "refused": ("raise UserError('x', 1, '2')", 2, r"^dsdistill: x: got 1, expected 2\n$"),
    "stopped": ("raise RunError('it cannot go on')", 1, r"^dsdistill: it cannot go on\n$"),
    "broken": ("raise ArithmeticError('a bug')", 1, r"^Traceback [\s\S]*ArithmeticError: a bug\n$"),
}


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Run python -m dsdistill ARGUMENTS, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "dsdistill", *map(str, arguments)],
        env=os.environ | CODE | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def used(config, tmp_path):
    """Return a folder in which a run began: it has a checkpoint, though a damaged one."""
    RunFolder(str(tmp_path / "run")).open(load([config()]))
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return tmp_path / "run"


class TestRunFolder:
    def test_that_cannot_be_written(self, config, refused, tmp_path):
        (tmp_path / "file").touch()
        line = refused("train", config({"run.dir": str(tmp_path / "file" / "run")}))
        assert ".yaml: run.dir: got " in line and "file/run" in line

    @pytest.mark.parametrize("place", PLACES)
    def test_in_an_impossible_place(self, config, refused, tmp_path, place):
        make, wanted = PLACES[place]
        if place != "half a character":  # YAML cannot hold half a character
            line = refused("train", config({"run.dir": make(tmp_path)}))
            assert "run.dir: got " in line and wanted in line

    def test_of_another_run(self, config, refused, used):
        line = refused("train", config(), "train.learning_rate=0.5")
        assert "config.yaml: train.learning_rate: got 0.5, expected 0.001 as at this run's start" in line

    def test_of_a_run_with_other_terms(self, config, refused, used):
        assert "terms.pairwise" in refused("train", config(), "terms.pairwise=null")

    def test_never_to_be_resumed(self, config, refused, used):
        line = refused("train", config(), "run.resume=never")
        assert ".yaml: run.dir: got " in line and "which holds a run" in line

    def test_a_start_that_failed_binds_nobody(self, config, tmp_path):
        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([config()]))
        (tmp_path / "run" / "init").mkdir()
        folder.open(load([config(), "train.learning_rate=0.5", "run.resume=never"]))
        assert load([str(tmp_path / "run" / "config.yaml")]).train.learning_rate == 0.5
        assert not (tmp_path / "run" / "init").exists(), "it may have been cut from another teacher"

    @pytest.mark.parametrize("begun", [False, True])
    def test_what_a_failed_start_prepared_is_made_again(self, config, tmp_path, begun):
        """It may come from another teacher or other data; what a continuing run prepared stays."""
        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([config()]))
        for name in KEPT:
            if "." in name:
                (tmp_path / "run" / name).touch()
            else:
                (tmp_path / "run" / name / "within").mkdir(parents=True)
        if begun:
            (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
        folder.open(load([config()]))
        assert [(tmp_path / "run" / name).exists() for name in KEPT] == [begun] * len(KEPT)

    @pytest.mark.parametrize("name", [*KEPT, "config.yaml", "summary.json", "notes.md", ".git"])
    def test_a_folder_that_holds_something_else_is_refused(self, config, refused, tmp_path, name):
        (tmp_path / "run" / name).mkdir(parents=True)
        line = refused("train", config())
        assert (
            f"run.dir: got {tmp_path}/run, which holds {name} but no run, expected a new or an empty" in line
        )

    def test_a_project_with_a_config_of_its_own_is_no_run_folder(self, config, refused, tmp_path):
        """`train config.yaml run.dir=.` removes and overwrites nothing there; `refused` checks this."""
        for name in ("init/notes", "stages/plan.md", "representations/talk.md"):
            path = tmp_path / name
            path.parent.mkdir()
            path.write_text("mine")
        for name in ("layers.json", "metrics.jsonl"):
            (tmp_path / name).write_text('{"mine": 1}\n')
        for name in ("distil.yaml", "config.yaml"):
            path = config(name=name)
            for folder in (".", str(tmp_path), f"{tmp_path}/../{tmp_path.name}/"):
                assert "but no run, expected" in refused("train", path, f"run.dir={folder}")

    def test_what_a_shell_writes_into_it_beforehand_is_let_be(self, config, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "slurm-1.out").write_text("started")
        RunFolder(str(tmp_path / "run")).open(load([config()]))
        assert (tmp_path / "run" / "slurm-1.out").read_text() == "started"

    def test_of_before_there_were_markers(self, config, refused, tmp_path):
        """The manifest of a checkpoint marks a run. Without one it is refused, and the line says how to continue it."""
        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([config()]))
        folder.release()
        (tmp_path / "run" / MARKER).unlink()
        assert "which holds config.yaml but no run" in refused("train", config())
        make_checkpoint(tmp_path / "run", 1)
        folder.open(load([config()]))
        assert (tmp_path / "run" / MARKER).is_file()

    def test_a_users_file_among_what_a_failed_start_prepared_stays(self, config, tmp_path):
        folder = RunFolder(str(tmp_path / "run"))
        folder.open(load([config()]))
        mine = tmp_path / "run" / "init" / "thesis.tex"
        mine.parent.mkdir()
        mine.write_text("mine")
        (tmp_path / "run" / "init" / "config.json").write_text("{}")
        with pytest.raises(
            UserError, match=r"run\.dir: got .*init \(it holds thesis\.tex, which no run wrote\)"
        ):
            folder.open(load([config()]))
        assert {path.name for path in mine.parent.iterdir()} == {"thesis.tex", "config.json"}

    def test_its_own_config_as_the_source(self, config, refused, used):
        own = used / "config.yaml"
        before = own.read_bytes()
        line = refused("train", own, "run.save_every=7")
        assert line.endswith(
            "whose config.yaml is the config of this run, expected another folder, or a copy of that file"
        )
        assert own.read_bytes() == before

    @pytest.mark.parametrize("key", ["student.path", "teacher.path", "data.tokenizer"])
    def test_what_it_is_to_read_lies_in_it(self, config, refused, models_dir, tmp_path, key):
        """Otherwise a failed start would remove it."""
        RunFolder(str(tmp_path / "run")).open(load([config()]))
        shutil.copytree(models_dir / "student", tmp_path / "run" / "init")
        line = refused("train", config({key: str(tmp_path / "run" / "init")}))
        assert (
            f"{key}: got {tmp_path}/run/init, which the run writes itself, expected another run.dir" in line
        )

    def test_of_a_baseline_without_the_terms_that_its_sampler_asks_for(self, config, used):
        from dsdistill.config.terms import Task, Terms

        whole = load([config({"data.sampler": "hard_negative", "terms": {"contrastive": {}}})])
        alone = whole.model_copy(update={"terms": Terms(task=Task())})
        folder = RunFolder(str(used / "baseline"))
        folder.open(alone)
        (used / "baseline" / "checkpoints" / "step-00000001").mkdir(parents=True)
        folder.open(alone)
        with pytest.raises(UserError, match=r"config\.yaml: terms\..* as at this run's start"):
            folder.open(whole)

    def test_waited_for_until_what_it_makes_is_there(self, tmp_path):
        import fcntl
        import threading

        folder, model = RunFolder(str(tmp_path / "teacher")), tmp_path / "teacher" / "model"
        folder.lock()
        folder.release()
        with open(folder / "lock", "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            threading.Timer(0.3, model.mkdir).start()
            folder.wait(str(model))
            assert model.is_dir() and folder.path not in run_folder._held
        folder.wait(str(tmp_path / "never"))
        assert run_folder._held.pop(folder.path)

    def test_of_another_teacher(self, used):
        folder = RunFolder(str(used))
        folder.pin_teacher("runs/teachers/one/model")
        folder.pin_teacher("runs/teachers/one/model")
        with pytest.raises(
            UserError, match="now lead to runs/teachers/two/model, expected runs/teachers/one/model"
        ):
            folder.pin_teacher("runs/teachers/two/model")

    def test_evaluate_and_export_need_a_run(self, refused, tmp_path, used):
        (tmp_path / "empty").mkdir()
        for name, reason in (("nowhere", "no such folder"), ("empty", "a folder without config.yaml")):
            for arguments in (("evaluate", name), ("export", name, "--out", "out")):
                assert refused(*arguments).startswith(f"{name}: got {reason}")
        assert "without an intact checkpoint" in refused("evaluate", used)

    def test_export_does_not_overwrite(self, refused, tmp_path, used, monkeypatch):
        monkeypatch.setattr("dsdistill.engine.checkpoint.newest", lambda _: "step-00000001")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        line = refused("export", used, "--out", tmp_path / "out")
        assert line.startswith("--out: got ") and "not empty" in line


class TestProcess:
    """Some cases run in a process of their own."""

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
        done = command("train", path, "train.steps=5", "--dry-run", "--full")
        assert done.returncode == 0 and done.stderr == ""
        printed = yaml.safe_load(done.stdout)
        assert printed["train"]["steps"] == 5 and printed["train"]["scheduler"] == "linear"
        assert snapshot(tmp_path) == before

    def test_dry_run_prints_what_differs_from_the_defaults(self, config, tmp_path, monkeypatch, capsys):
        before = config()
        monkeypatch.setattr(sys, "argv", ["dsdistill", "train", before, "train.steps=5", "--dry-run"])
        assert cli.run() == 0
        printed = capsys.readouterr().out
        assert "scheduler" not in printed and yaml.safe_load(printed)["train"]["steps"] == 5
        (tmp_path / "again.yaml").write_text(printed)
        assert load([str(tmp_path / "again.yaml")]) == load([before, "train.steps=5"])

    @pytest.mark.parametrize("mistake", ["unknown key", "attention that hides"])
    def test_mistakes(self, config, mistake):
        changes, parts = CONFIG[mistake]
        done = command("train", config(changes))
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("dsdistill: ")
        assert all(part in done.stderr for part in parts)

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_ends_with_its_code_while_torch_waits_for_the_interpreter(self, ending):
        """If the interpreter ended them, each of these would end in SIGABRT."""
        body, code, told = ENDINGS[ending]
        done = subprocess.run(
            [sys.executable, "-c", ENDING.format(body=body)],
            env=os.environ | CODE,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout) == (code, "printed, not flushed")
        assert re.search(told, done.stderr) if told else not done.stderr

    @pytest.mark.parametrize("name", ["train", "evaluate"])
    def test_a_rank_that_never_comes(self, config, used, name):
        path = config({"run.timeout": 0.05})
        (used / "config.yaml").write_text((used / "config.yaml").read_text().replace("10.0", "0.05"))
        alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        done = command(name, path if name == "train" else used, **alone)
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            "dsdistill: rank 0 waited 0.05 minutes (run.timeout) for another rank, which did not answer: "
        )

    @pytest.mark.parametrize("heads", ["mean", "group"])
    def test_a_backend_that_cannot_run_a_term(self, config, heads):
        done = command("train", config({"train.backend": "cpp", "terms": {"attention": {"heads": heads}}}))
        assert done.returncode == 2, done.stderr
        line = done.stderr.splitlines()[-1]
        assert ": train.backend: got backend 'cpp' cannot run attention_alignment: " in line
        assert (
            line.endswith("expected auto, or a backend that runs every term")
            and "Traceback" not in done.stderr
        )

    def test_without_standard_streams(self, config):
        for command in ("--version >&- 2>&-", f"train {config()} --dry-run >&-"):
            line = f"{sys.executable} -m dsdistill {command}"
            assert subprocess.run(["bash", "-c", line], env=os.environ | CODE, check=False).returncode == 0

    def test_onto_a_full_disk(self, config):
        """The output is lost; the exit code and one line say so."""
        path = config()
        line = "dsdistill: output cannot be written: the disk is full (No space left on device)\n"
        for words, code, told in (
            (f"train {path} --dry-run >/dev/full", 1, line),
            ("--version >/dev/full", 1, line),
            (f"train {path} train.stepz=1 2>/dev/full", 2, ""),
            ("--help >/dev/full 2>/dev/full", 1, ""),
        ):
            done = subprocess.run(
                ["bash", "-c", f"{sys.executable} -m dsdistill {words}"],
                env=os.environ | CODE,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (code, told), words

    def test_a_bar_on_a_full_disk_costs_no_run(self):
        from tqdm import tqdm

        from dsdistill.engine.train import _Forgiving

        with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
            bar = tqdm(total=3, file=_Forgiving(full), mininterval=0, leave=True)
            for _ in range(3):
                bar.update()
            bar.close()
            assert bar.n == 3

    def test_an_unknown_command(self):
        done = command("trian", "x.yaml")
        assert done.returncode == 2 and "Traceback" not in done.stderr and "trian" in done.stderr


@pytest.mark.parametrize("arguments", [("verify", "--aot", "x"), ("evaluate", "a", "b")])
def test_an_argument_too_many_is_said_once(monkeypatch, capsys, arguments):
    from dsdistill import cli

    monkeypatch.setattr(sys, "argv", ["dsdistill", *arguments])
    assert cli.run() == 2
    said = capsys.readouterr().err
    assert "command line: got unexpected extra argument" in said and said.count("got") == 1
