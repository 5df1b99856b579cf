"""Foreign files that expand, never end, or name code, files and the network give one line each.

Valid input that reaches outside (a kernel that a config.json names, an image in a column that nobody reads) runs in
a process that notes every file and socket it opens.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from safetensors import safe_open
from transformers import CONFIG_MAPPING

from dsdistill.config import UserError, load
from dsdistill.config.resume import check_same
from dsdistill.models.settings import check_settings
from tests import mistakes_files, mistakes_models
from tests.mistakes_files import DATA, OVERRIDES, YAML
from tests.mistakes_models import CONFIG_JSON, CONFIGS, FOLDERS, TOKENIZERS
from tests.test_bad_input import _all, _holds

SECONDS = 60  # a refusal takes under a second, on a busy machine a few; what never ends takes longer


@pytest.fixture(autouse=True)
def at_once():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


@_all(YAML)
def test_yaml(refused, tmp_path, case):
    content, parts = YAML[case]
    (tmp_path / "broken.yaml").write_text(content)
    _holds(refused("train", "broken.yaml"), ["broken.yaml", *parts])
    if (
        "interpolation" not in case and "digits" not in case
    ):  # a plan has no such settings, and its numbers are free
        _holds(refused("compare", "broken.yaml"), ["broken.yaml", *parts])


@_all(OVERRIDES)
def test_overrides(config, refused, case):
    override, parts = OVERRIDES[case]
    _holds(refused("train", config(), override), parts)


@pytest.mark.parametrize("make", [mistakes_files.special, mistakes_files.endless])
def test_pipes_and_devices(config, refused, tmp_path, make):
    make(tmp_path / "dev.tsv")
    _holds(
        refused("train", config({"data.dev": str(tmp_path / "dev.tsv")})), ["dev.tsv: got a pipe, a device"]
    )
    make(tmp_path / "config2.yaml")
    for command in ("train", "compare"):
        _holds(refused(command, "config2.yaml"), ["config2.yaml: got a pipe, a device"])


@_all(DATA)
def test_data(config, refused, tmp_path, case):
    name, make, changes, parts = DATA[case]
    path = tmp_path / name
    path.write_bytes(make())
    line = refused("train", config({f"data.{name.split('.')[0]}": str(path), **changes}))
    _holds(line, [str(path), *parts])


def _refused_teacher(config, refused, models_dir, tmp_path, change):
    path = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
    change(path)
    return refused("train", config({"teacher.path": str(path), "student": {"from_teacher": [1, 2]}}))


@_all(CONFIG_JSON)
def test_config_json(config, refused, models_dir, tmp_path, case):
    changes, parts = CONFIG_JSON[case]
    change = mistakes_models.settings(**changes)
    _holds(_refused_teacher(config, refused, models_dir, tmp_path, change), ["teacher", *parts])


@_all(FOLDERS)
def test_folders(config, refused, models_dir, tmp_path, case):
    change, parts = FOLDERS[case]
    _holds(_refused_teacher(config, refused, models_dir, tmp_path, change), ["teacher.path", *parts])


@_all(TOKENIZERS)
def test_tokenizers(config, refused, models_dir, tmp_path, case):
    edit, parts = TOKENIZERS[case]

    def change(folder):
        found = json.loads((folder / "tokenizer.json").read_text())
        edit(found)
        (folder / "tokenizer.json").write_text(json.dumps(found))

    _holds(_refused_teacher(config, refused, models_dir, tmp_path, change), parts)


@_all(CONFIGS)
def test_configs(config, refused, case):
    settings, parts = CONFIGS[case]
    _holds(refused("train", config({"student": {"config": settings}, "terms": {"task": {}}})), parts)


def test_a_thousand_layers_of_the_teacher(config, refused):
    line = refused("train", config({"student": {"from_teacher": [1] * 2000}}))
    _holds(line, ["student.from_teacher", "2000", "1,024 layers"])


def test_the_largest_file_is_no_part_of_a_run(config, tmp_path):
    """`data.max_file` may change when a run resumes."""
    before, after = load([config()]), load([config({"data.max_file": "1GB"})])
    from dsdistill.config import dump

    (tmp_path / "saved.yaml").write_text(dump(before))
    check_same(str(tmp_path / "saved.yaml"), after)
    assert (before.data.most_bytes, after.data.most_bytes) == (200 * 2**30, 10**9)


def test_a_saved_config_that_is_broken(tmp_path):
    (tmp_path / "saved.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"saved\.yaml: got .*, expected valid YAML"):
        check_same(str(tmp_path / "saved.yaml"), None)


# Notes what is opened, then prepares the run of a config and builds its models.
AUDITED = """
import json, sys
seen = []
sys.addaudithook(lambda name, given: seen.append([name, repr(given[0])[:200]])
                 if name == "open" or name.startswith("socket.") or name == "import" else None)
import torch
from dsdistill.config import load
from dsdistill.engine.prepare import prepare
from dsdistill.models.build import build_model
prepared = prepare(load([sys.argv[1]]), 1)
teacher = build_model(prepared.teacher, prepared.config.teacher.path, "classification", "teacher", needs_head=True)
used = {module.config._attn_implementation for module in teacher.modules() if hasattr(module, "config")}
print(json.dumps([seen, sorted(used), str(teacher.dtype), prepared.data.labels]))
"""


def test_nothing_outside_is_touched(config, models_dir, tmp_path):
    """A config.json names kernels, code and types of its own; columns have images, sounds and nested values."""
    names = ("planted.png", "planted.wav", "planted.json", "planted_code.py")
    for name in names:
        (tmp_path / name).write_text("open('/tmp/owned', 'w')")
    teacher = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
    kernel = "kernels-community/flash-attn"
    mistakes_models.settings(
        attn_implementation=kernel,
        _attn_implementation=kernel,
        experts_implementation=kernel,
        auto_map={"AutoModelForSequenceClassification": "planted_code.Model", "AutoConfig": "planted_code.C"},
        base_model_tp_plan={"layers": "x"},
        dtype="float16",
        _name_or_path=str(tmp_path / "planted_code.py"),
    )(teacher)
    for key in ("tokenizer_file", "vocab_file", "special_tokens_map_file"):
        mistakes_models.settings("tokenizer_config.json", **{key: str(tmp_path / "planted.json")})(teacher)
    image = {"bytes": None, "path": str(tmp_path / "planted.png")}
    web = {"bytes": None, "path": "http://127.0.0.1:9/planted.png"}
    table = pyarrow.table(
        {
            "text": ["the sum", "the mean", "the row"],
            "label": [0, 1, 2],
            "image": [image, web, image],
            "sound": [{"bytes": None, "path": str(tmp_path / "planted.wav")}] * 3,
            "nested": [{"image": image}, {"image": web}, {"image": image}],
            "list": [[image], [web], []],
            "id": [{"a": 1}] * 3,
        }
    )
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"},
        "image": {"_type": "Image"},
        "sound": {"_type": "Audio"},
        "nested": {"image": {"_type": "Image"}},
        "list": [{"_type": "Image"}],
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "images.parquet")
    data = str(tmp_path / "images.parquet")
    path = config(
        {
            "teacher.path": str(teacher),
            "student": {"from_teacher": [1, 2]},
            "data.train": data,
            "data.dev": data,
        }
    )
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, path],
        env=os.environ | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    seen, used, dtype, labels = json.loads(done.stdout.splitlines()[-1])
    assert [event for event in seen if event[0] in ("socket.connect", "socket.getaddrinfo")] == []
    opened = [what for name, what in seen if name == "open"]
    assert any("images.parquet" in what or "config.json" in what for what in opened), "the hook sees nothing"
    assert not [what for what in opened if any(name in what for name in names)]
    assert not [
        what for name, what in seen if name == "import" and ("planted" in what or what == "'kernels'")
    ]
    assert (used, dtype, labels) == (["sdpa"], "torch.float32", ["a", "b", "c"])


def test_a_column_that_is_missing_is_told_from_all(config, refused, tmp_path):
    """The message names all columns, even those that were not read."""
    path = tmp_path / "dev.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["the sum"], "label": ["a"]}), path)
    _holds(refused("train", config({"data.dev": str(path)})), ["no column 'text'", "txt"])


def test_there_are_many_kinds():
    tables = (YAML, OVERRIDES, DATA, CONFIG_JSON, FOLDERS, TOKENIZERS, CONFIGS)
    assert sum(map(len, tables)) >= 150
    assert yaml.__with_libyaml__, "the pure parser takes minutes for some of these"


def test_every_family_as_the_library_has_it_is_let_through():
    """No real model exceeds the limits: defaults count from the end, or have 0 or -1 for none."""
    refused, tried = {}, 0
    for kind, made in CONFIG_MAPPING.items():
        try:
            settings = made().to_dict()
        except Exception:  # of any type: some families need another package or given parts
            continue
        tried += 1
        try:
            check_settings(settings, "config.json")
        except UserError as error:
            refused[kind] = str(error)
    assert tried > 500
    assert set(refused) <= {"musicflamingo"}, refused  # 1200.0 positions


@pytest.mark.parametrize("text", ["${oc.select:a.b}", "${a.${b}}", "${oc.env:A,${b}}", "${x:1}"])
def test_interpolations_of_other_kinds_are_refused(config, refused, text):
    """Their sizes are not counted; those of plain interpolations and of the environment are."""
    line = refused("train", config({"run.name": text}))
    assert "run.name: got an unsupported interpolation, expected ${KEY}, ${oc.env:NAME}" in line


def test_what_lies_beside_a_model_is_not_read(config, models_dir, tmp_path):
    """There are large texts and folders with a tokenizer file's name; shards may be links to another disk."""
    from dsdistill.engine.prepare import prepare

    path = shutil.copytree(models_dir / "teacher", tmp_path / "teacher")
    (path / "spiece.model").mkdir()
    with open(path / "corpus.txt", "wb") as file:
        file.truncate(2**30)
    os.rename(path / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (path / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with safe_open(tmp_path / "elsewhere.safetensors", framework="pt") as file:
        names = list(file.keys())
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert prepare(load([config({"teacher.path": str(path)})]), 1).judged
