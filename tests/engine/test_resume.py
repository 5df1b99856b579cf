"""A killed run resumes as if it had never been killed."""

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from dsdistill import disk
from dsdistill.config import UserError
from dsdistill.config.load import make_config
from dsdistill.distributed.ranks import Ranks
from dsdistill.distributed.writer import Writer
from dsdistill.engine import checkpoint, export
from dsdistill.engine.export import find_checkpoint
from tests.engine.launch import WORKER, launch, launch_command, run_configs


def losses(run_dir: Path) -> list[dict]:
    """Return every logged step without what depends on clock and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "loss", "terms", "learning_rate", "grad_norm")}
        for line in lines
        if "loss" in line
    ]


def write(settings: dict, folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | {"run": settings["run"] | {"dir": str(folder / name)}}))
    return path


def steps_done(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def kill_at(path: Path, run_dir: Path, step: int) -> None:
    """Start the run and kill its ranks, without warning, once it has logged `step` steps."""
    command, environment = launch_command(WORKER, path)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.time() + 120
        while steps_done(run_dir) < step:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def with_dropout(settings):
    """Return 40 steps with dropout and drawn rows, so that a resume must restore each rank's random state and draws."""
    settings["terms"] |= {"attention": {"rows": 3}, "pairwise": {"layers": "uniform", "rows": 2}}
    settings["student"]["config"] = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    settings["run"] |= {"save_every": 4, "keep": 3}
    settings["train"] |= {"epochs": 8, "micro_batch_size": 2}
    return settings


def test_resume_is_exact(with_dropout, tmp_path):
    undisturbed = write(with_dropout, tmp_path, "undisturbed")
    killed = write(with_dropout, tmp_path, "killed")
    kill_at(killed, tmp_path / "killed", step=14)
    done_before = steps_done(tmp_path / "killed")
    assert 14 <= done_before < 40
    # The newest checkpoint is damaged as well, so the one before it must be used.
    tags = sorted(p.name for p in (tmp_path / "killed" / checkpoint.FOLDER).glob("step-*"))
    newest = tmp_path / "killed" / checkpoint.FOLDER / tags[-1]
    largest = max((p for p in newest.iterdir()), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))

    log = run_configs([undisturbed, killed])
    assert f"{tags[-1]} cannot be used: {largest.name} has changed" in log
    assert f"resuming from {tags[-2]}" in log

    expected, got = losses(tmp_path / "undisturbed"), losses(tmp_path / "killed")
    assert [line["step"] for line in got] == list(range(1, 41))
    assert got == expected
    scores = [
        json.loads((tmp_path / name / "summary.json").read_text())["models"]
        for name in ("undisturbed", "killed")
    ]
    assert scores[0]["student"]["kl"] == scores[1]["student"]["kl"]


def make_checkpoint(run: Path, step: int, **state: object) -> Path:
    """Make a finished checkpoint in the layout of checkpoint.Saving, with one small file."""

    class Engine:
        checkpoint_engine = Writer()

        def save_checkpoint(self, folder, tag, **options):
            (Path(folder) / tag / "weights.bin").write_bytes(bytes(range(256)) * step)

    whole = {"stage": 0, "objective": {}, "zero_stage": 2, "at_once": 8}
    whole |= {"seconds": 1.0, "tokens": 8, "losses": 0.0, "counted": 0}
    ranks = Ranks(0, 1, torch.device("cpu"))
    checkpoint.begin(Engine(), str(run), step, whole | state, ranks).finish(keep=2)
    return run / checkpoint.FOLDER / f"step-{step:08d}"


def test_newest_skips_what_does_not_verify(tmp_path):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    assert checkpoint.newest(str(tmp_path)) == second.name
    good = (second / "weights.bin").read_bytes()
    (second / "weights.bin").write_bytes(bytes([good[0] ^ 1]) + good[1:])  # one bit, same size
    assert checkpoint.newest(str(tmp_path)) == first.name
    (second / "weights.bin").write_bytes(b"short")
    assert checkpoint.newest(str(tmp_path)) == first.name
    (first / "manifest.json").unlink()  # a kill during the save leaves this
    assert checkpoint.newest(str(tmp_path)) is None


class TestBesideARunThatTrains:
    """Two checkpoints are kept: each save removes one."""

    @pytest.fixture
    def saves(self, tmp_path):
        """Steps 1 and 2 are saved already; a call saves 3 and 4."""
        for step in (1, 2):
            make_checkpoint(tmp_path, step)

        def save() -> None:
            if not (tmp_path / checkpoint.FOLDER / "step-00000003").exists():
                for step in (3, 4):
                    make_checkpoint(tmp_path, step)

        return save

    def test_the_newest_is_found(self, saves, tmp_path, monkeypatch, caplog):
        def find(folder: str) -> list[str]:
            tags = candidates(folder)
            saves()
            return tags

        candidates = checkpoint._candidates
        monkeypatch.setattr(checkpoint, "_candidates", find)
        assert checkpoint.newest(str(tmp_path)) == "step-00000004"
        assert not caplog.records

    def test_a_student_is_exported(self, saves, tmp_path, monkeypatch):
        def load(run: str, config: None, tag: str) -> bytes:
            saves()
            return Path(run, checkpoint.FOLDER, tag, "weights.bin").read_bytes()

        monkeypatch.setattr(export, "load_student", load)
        assert export._newest_student(str(tmp_path), None) == bytes(range(256)) * 4

    def test_what_cannot_be_loaded_is_no_reason_to_wait(self, saves, tmp_path, monkeypatch):
        def load(*_) -> None:
            raise RuntimeError("weights of another architecture")

        monkeypatch.setattr(export, "load_student", load)
        with pytest.raises(RuntimeError, match="another architecture"):
            export._newest_student(str(tmp_path), None)


def test_an_old_one_that_cannot_be_removed_stays(tmp_path, monkeypatch, caplog):
    """This happens over NFS while another process has files of the checkpoint open."""

    def remove(path: str, made: list[str]) -> None:
        if path.endswith("step-00000001") and os.path.exists(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        whole(path, made)

    whole = disk.remove
    monkeypatch.setattr(disk, "remove", remove)
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    assert checkpoint.newest(str(tmp_path)) == "step-00000003"
    assert "checkpoint step-00000001 could not be removed: [Errno 39]" in caplog.text
    monkeypatch.undo()
    make_checkpoint(tmp_path, 4)
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).glob("step-*")) == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (second / "weights.bin").unlink()
    assert checkpoint.damage(str(second)) == "weights.bin is missing"
    for make in (lambda path: path.symlink_to(first / "weights.bin"), os.mkfifo):
        make(second / "weights.bin")
        assert checkpoint.damage(str(second)) == "weights.bin is no plain file"
        (second / "weights.bin").unlink()
    assert checkpoint.newest(str(tmp_path)) == first.name


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_any_bit_of_what_describes_a_checkpoint_counts(tmp_path, name):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    whole = (second / name).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (second / name).write_bytes(flipped)
        assert checkpoint.damage(str(second)) is not None, (bit, bytes(flipped))
    assert checkpoint.newest(str(tmp_path)) == first.name


MANIFESTS = [
    "{}",
    "[]",
    "3",
    "null",
    '"x"',
    '{"state.json": {}}',
    '{"state.json": 5}',
    '{"state.json": {"size": 1}}',
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_of_another_form_is_damage(settings, tmp_path, manifest):
    first, second = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (second / "manifest.json").write_text(manifest)
    (second / "state.json").write_text("[")  # unreadable, and a term needs its contents
    settings["terms"]["rkd"] = {}
    assert checkpoint.check(str(tmp_path), make_config(settings), 2) == first.name


def test_a_run_without_a_good_checkpoint_does_not_begin_anew_by_itself(settings, tmp_path):
    config, found = make_config(settings), make_checkpoint(tmp_path, 1)
    assert checkpoint.check(str(tmp_path), config, 2) == found.name
    (found / "weights.bin").write_bytes(b"short")
    refusal = r"checkpoints: got no intact checkpoint \(step-00000001: weights.bin has changed\), expected "
    with pytest.raises(UserError, match=refusal):
        checkpoint.check(str(tmp_path), config, 2)
    (found / "manifest.json").unlink()  # the pointer shows that it was complete
    with pytest.raises(UserError, match="no complete manifest"):
        checkpoint.check(str(tmp_path), config, 2)
    (found.parent / "newest").unlink()  # a kill in the first save leaves this
    assert checkpoint.check(str(tmp_path), config, 2) is None
    assert checkpoint.check(str(tmp_path / "nowhere"), config, 2) is None


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        make_checkpoint(tmp_path, step)
    kept = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).glob("step-*"))
    assert kept == ["step-00000002", "step-00000010"]


def test_a_run_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="without an intact checkpoint"):
        find_checkpoint(str(tmp_path))


def test_a_passed_over_checkpoint_is_not_kept_for_a_good_one(tmp_path):
    """After a resume from an earlier one, the damaged checkpoint is the highest until training gets there again."""
    for step in (4, 5, 8):
        make_checkpoint(tmp_path, step)
    (tmp_path / checkpoint.FOLDER / "step-00000008" / "weights.bin").write_bytes(b"short")
    make_checkpoint(tmp_path, 6)
    kept = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).glob("step-*"))
    assert kept == ["step-00000005", "step-00000006"]


def test_losses_that_are_not_finite_end_the_run_and_are_not_saved(settings, tmp_path):
    settings["run"] |= {"save_every": 1, "keep": 9}
    settings["train"] |= {"learning_rate": 1e30, "clip": 0.0, "warmup": 0.0}
    done = launch(WORKER, write(settings, tmp_path, "run"))
    assert done.returncode != 0 and "3 step(s) in a row with values that are not finite" in done.stderr
    tags = [p.name for p in (tmp_path / "run" / checkpoint.FOLDER).glob("step-*")]
    assert tags == ["step-00000001"]  # its loss was taken before the first update
