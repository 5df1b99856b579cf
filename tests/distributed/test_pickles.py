"""A checkpoint that somebody else made runs nothing, whatever its manifest says."""

import contextlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dsdistill.distributed import deepspeed
from dsdistill.engine import checkpoint
from tests.engine.test_resume import make_checkpoint


class Runs:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def saved(thing: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file, **options)
    return file.getvalue()


FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
NO_FILE = "is no file that torch.save writes"
# How it is written, and what is said of it.
WAYS = {
    "as torch.save does": (saved, "would run posix.mkdir"),
    "with a newer protocol": (lambda thing: saved(thing, pickle_protocol=4), NO_FILE),
    "in the old format": (lambda thing: saved(thing, _use_new_zipfile_serialization=False), NO_FILE),
    "a pickle alone": (pickle.dumps, NO_FILE),
    "before a file of torch.save": (lambda thing: pickle.dumps(thing) + saved([]), NO_FILE),
}


def forge(folder: Path, content: bytes) -> None:
    """Put a rank's state in its place, and the manifest right."""
    target = folder / "random-0.pt"
    target.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[target.name] = checkpoint.fingerprint(str(target))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_pickle_is_passed_over(tmp_path, way):
    write, reason = WAYS[way]
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    forge(second, write([torch.zeros(2), Runs(tmp_path / "ran")]))
    assert checkpoint.damage(str(second)) == f"random-0.pt {reason}"
    assert checkpoint.newest(str(tmp_path)) == first.name
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):  # what it would have done
        torch.load(second / "random-0.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("pickled", [b"\x80\x02U", b"\x80\x02X\x01", b"\xff", b""])
def test_what_cannot_be_read_is_passed_over(tmp_path, pickled):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
    forge(second, file.getvalue())
    assert checkpoint.damage(str(second)) == f"random-0.pt {NO_FILE}"
    assert checkpoint.newest(str(tmp_path)) == first.name


def test_what_no_manifest_names_is_passed_over(tmp_path):
    """Readers of shards go by names."""
    folder = make_checkpoint(tmp_path, 1)
    (folder / "notes.txt").write_text("harmless")
    assert checkpoint.damage(str(folder)) is None
    (folder / f"a{FILE}").write_bytes(saved([]))
    assert checkpoint.damage(str(folder)) == f"a{FILE} was not saved with it"


class Engine:
    """Of an engine what load_checkpoint begins with: DeepSpeed's own reader, which asks torch to run everything."""

    def load_checkpoint(self, folder: str, tag: str) -> None:
        TorchCheckpointEngine().load(os.path.join(folder, tag, FILE))


READERS = {
    "resume": lambda folder: deepspeed.load_same(Engine(), str(folder.parent), folder.name),
    "resume with other ranks": lambda folder: deepspeed.load_reshaped(Engine(), str(folder)),
    "evaluate, export": lambda folder: deepspeed.whole_weights(str(folder.parent), folder.name),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_it_finds(tmp_path, reader):
    """Even where damage() was not asked."""
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / FILE).write_bytes(saved(Runs(tmp_path / "ran")))
    before = dict(os.environ)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        READERS[reader](folder)
    assert not (tmp_path / "ran").exists() and dict(os.environ) == before
    Engine().load_checkpoint(str(tmp_path), folder.name)
    assert (tmp_path / "ran").exists()


def test_what_deepspeed_saves_is_known(tmp_path):
    """Of fp16, which no CPU trains; the rest is loaded wherever a run is resumed."""
    path = tmp_path / "states.pt"
    scaler = DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)
    path.write_bytes(saved({"loss_scaler": scaler, "dtype": torch.float16}))
    assert deepspeed.foreign(str(path)) is None
    with deepspeed.known_pickles():
        assert torch.load(path, weights_only=False)["loss_scaler"].cur_scale == 2**16
