"""A checkpoint that somebody else made runs nothing, whatever its manifest says."""

import contextlib
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from dsdistill.engine import checkpoint, deepspeed
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


# How it is written, and what is said of it.
WAYS = {
    "as torch.save does": (saved, "posix.mkdir"),
    "with a newer protocol": (
        lambda thing: saved(thing, pickle_protocol=4),
        "UnpicklingError: Unsupported operand",
    ),
    "in the old format": (
        lambda thing: saved(thing, _use_new_zipfile_serialization=False),
        "ValueError: Expected input",
    ),
    "a pickle alone": (pickle.dumps, "ValueError: Expected input"),
    "before a file of torch.save": (
        lambda thing: pickle.dumps(thing) + saved([]),
        "ValueError: Expected input",
    ),
}


def forge(folder: Path, content: bytes) -> None:
    """Put a rank's state in its place, and the manifest right."""
    target = folder / "random-0.pt"
    target.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[target.name] = checkpoint._fingerprint(str(target))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("way", WAYS)
def test_a_foreign_pickle_is_passed_over(tmp_path, way):
    write, reason = WAYS[way]
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    forge(second, write([torch.zeros(2), Runs(tmp_path / "ran")]))
    assert checkpoint.damage(str(second)).startswith(f"random-0.pt holds what no run saves: {reason}")
    assert checkpoint.newest(str(tmp_path)) == first.name
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):  # what it would have done
        torch.load(second / "random-0.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_what_no_manifest_names_is_not_run_either(tmp_path):
    """As DeepSpeed loads, which asks torch to run everything."""
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(saved(Runs(tmp_path / "ran")))
    before = dict(os.environ)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"), deepspeed.known_pickles():
        torch.load(path, weights_only=False)
    assert not (tmp_path / "ran").exists() and dict(os.environ) == before


def test_what_deepspeed_saves_is_known(tmp_path):
    """Of fp16, which no CPU trains; the rest is loaded wherever a run is resumed."""
    path = tmp_path / "states.pt"
    scaler = DynamicLossScaler(2**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)
    path.write_bytes(saved({"loss_scaler": scaler, "dtype": torch.float16}))
    assert deepspeed.foreign(str(path)) is None
    with deepspeed.known_pickles():
        assert torch.load(path, weights_only=False)["loss_scaler"].cur_scale == 2**16
