"""A run resumes from what it was made from, or one line says what has changed under the same name."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.engine import run_folder
from dsdistill.engine.origins import check_origins, origins, write_origins
from dsdistill.engine.prepare import prepare
from dsdistill.engine.run_folder import SOURCES, RunFolder
from dsdistill.models.weights import fingerprint
from tests.conftest import snapshot
from tests.engine.launch import run_configs
from tests.engine.test_resume import make_checkpoint, steps_done
from tests.engine.test_run import command
from tests.engine.worker import take_back


@pytest.fixture
def own(settings, models_dir, data_dir, tokenizer_dir, tmp_path):
    """Return settings of a run whose data, models and tokenizer are copies that a test may change."""
    shutil.copytree(models_dir, tmp_path / "models")
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    for name in ("teacher", "student"):
        settings[name]["path"] = str(tmp_path / "models" / name)
        for path in (tmp_path / "models" / name).glob("*token*"):
            path.unlink()
    files = {name: str(tmp_path / "data" / f"{name}.tsv") for name in ("train", "dev")}
    settings["data"] |= files | {"tokenizer": str(tmp_path / "tokenizer")}
    return settings


def _swap_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["tensor"], vocabulary["shape"] = vocabulary["shape"], vocabulary["tensor"]
    path.write_text(json.dumps(settings))


def _lower_case(folder: Path) -> None:
    """Turn lower-casing on; the vocabulary stays the same, and so do the tests' texts, which have no capitals."""
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))


def _relabel(folder: Path) -> None:
    path = folder / "data" / "train.tsv"
    lines = path.read_text().splitlines()
    text, label, score = lines[1].split("\t")
    path.write_text(
        "\n".join([lines[0], f"{text}\t{'b' if label == 'a' else 'a'}\t{score}", *lines[2:]]) + "\n"
    )


def _more(name: str):
    def change(folder: Path) -> None:
        with open(folder / "data" / f"{name}.tsv", "a", encoding="utf-8") as file:
            file.write("the shape of a tensor\ta\t0.5\n")

    return change


def _one_weight(name: str):
    def change(folder: Path) -> None:
        path = folder / "models" / name / "model.safetensors"
        weights = load_file(path)
        weights["classifier.bias"][0] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})

    return change


def _setting(folder: Path) -> None:
    path = folder / "models" / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_norm_eps": 1e-3}))


CHANGES = {
    "train": (_more("train"), "data.train"),
    "label": (_relabel, "data.train"),
    "dev": (_more("dev"), "data.dev"),
    "vocabulary": (_swap_words, "data.tokenizer, data.train, data.dev"),
    "normalizer": (_lower_case, "data.tokenizer"),
    "teacher": (_one_weight("teacher"), "teacher.path"),
    "student": (_one_weight("student"), "student.path"),
    "settings": (_setting, "teacher.path"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_is_named(own, tmp_path, case):
    change, named = CHANGES[case]
    folder = RunFolder(str(tmp_path / "run"))
    config = make_config(own)
    before = origins(prepare(config, world_size=1))
    Path(folder.path).mkdir()
    write_origins(folder, before)
    make_checkpoint(tmp_path / "run", 1)
    check_origins(folder, origins(prepare(config, world_size=1)))  # nothing has changed
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        check_origins(folder, origins(prepare(config, world_size=1)))
    assert str(caught.value).startswith(
        f"{folder.path}: {named}: got contents that differ from those at this run's start"
    )


def test_a_note_of_before_there_were_stores_is_compared_as_it_was_made(own, tmp_path):
    """Such a note hashed every token, the beginning of each example, and the labels."""
    folder, config = RunFolder(str(tmp_path / "run")), make_config(own)
    prepared = prepare(config, world_size=1)
    note = origins(prepared)
    assert {value[:2] for name, value in note.items() if name in ("data.train", "data.dev")} == {"2:"}
    for name, part in (("data.train", prepared.data.train), ("data.dev", prepared.data.dev)):
        rows = [part.tokens(row).tolist() for row in range(len(part))]
        digest = hashlib.sha256(json.dumps(prepared.data.labels).encode())
        digest.update(np.concatenate(rows).astype(np.int32).tobytes())
        digest.update(np.cumsum([0, *map(len, rows)]).astype(np.int64).tobytes())
        digest.update(part.labels.numpy().tobytes())
        note[name] = digest.hexdigest()
    Path(folder.path).mkdir()
    write_origins(folder, note)
    make_checkpoint(tmp_path / "run", 1)
    check_origins(folder, origins(prepared), prepared.data)
    _relabel(tmp_path)
    changed = prepare(config, world_size=1)
    with pytest.raises(
        UserError, match=r"data\.train: got contents that differ from those at this run's start"
    ):
        check_origins(folder, origins(changed), changed.data)


def test_a_run_that_was_cut_short_ends_in_one_line(own, tmp_path):
    """Nothing in the folder changes.

    With the old weights back the run continues, and so does a run from before the note.
    """
    own["run"] |= {"save_every": 5, "keep": 9}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(own))
    run_configs([path], ranks=1)
    run = tmp_path / "run"
    take_back(run, 5)
    kept = {name: value for name, value in snapshot(run).items() if name != "loss.png"}
    weights = (tmp_path / "models" / "teacher" / "model.safetensors").read_bytes()
    _one_weight("teacher")(tmp_path)
    done = command("train", path, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "dsdistill: " in line)
    assert f"{run}: teacher.path: got contents that differ from those at this run's start" in line
    assert {name: value for name, value in snapshot(run).items() if name != "loss.png"} == kept
    (tmp_path / "models" / "teacher" / "model.safetensors").write_bytes(weights)
    (run / SOURCES).unlink()
    run_configs([path], ranks=1)
    assert steps_done(run) == 10 and set(json.loads((run / SOURCES).read_text())) == {
        *("data.tokenizer", "data.train", "data.dev", "teacher.path", "student.path")
    }


def test_a_start_that_failed_binds_nobody(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    Path(folder.path).mkdir()
    write_origins(folder, {"data.train": "a"})
    check_origins(folder, {"data.train": "b"})
    write_origins(folder, {"data.train": "b"})
    make_checkpoint(tmp_path / "run", 1)
    with pytest.raises(UserError):
        check_origins(folder, {"data.train": "a"})
    assert SOURCES in run_folder.OWN


class TestWeights:
    def write(self, folder: Path, **changes: torch.Tensor) -> str | None:
        weights = {"a": torch.zeros(2**20), "b": torch.zeros(2**21)} | changes  # 12 MiB: hashed by samples
        save_file(weights, folder / "model.safetensors")
        return fingerprint(str(folder), "teacher.path")

    def test_a_large_file_is_sampled(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        first = self.write(tmp_path)
        assert self.write(tmp_path) == first
        seen = {first, self.write(tmp_path, b=torch.ones(2**21)), self.write(tmp_path, c=torch.zeros(1))}
        last = torch.zeros(2**21)
        last[-1] = 1
        seen |= {self.write(tmp_path, b=last), self.write(tmp_path, a=torch.zeros(2**10, 2**10))}
        assert len(seen) == 5

    def test_a_small_file_is_read_whole(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        prints = set()
        for place in range(0, 2**16, 977):
            weights = torch.zeros(2**16)
            weights[place] = 1
            save_file({"a": weights}, tmp_path / "model.safetensors")
            prints.add(fingerprint(str(tmp_path), "teacher.path"))
        assert len(prints) == len(range(0, 2**16, 977))

    def test_a_model_of_the_hub_by_its_commit(self, tmp_path, monkeypatch):
        commit = "0123456789" * 4
        path = f"/cache/models--some--model/snapshots/{commit}/config.json"
        monkeypatch.setattr("dsdistill.models.weights.find", lambda source, name: path)
        assert fingerprint("some/model", "teacher.path") == commit
        monkeypatch.setattr("dsdistill.models.weights.find", lambda source, name: None)
        assert fingerprint("some/model", "teacher.path") is None
