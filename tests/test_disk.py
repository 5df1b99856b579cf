"""Files appear whole or not at all, through no link, with the umask's modes; only our files are removed."""

import contextlib
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsdistill import disk
from dsdistill.config import UserError


@pytest.fixture
def small(tmp_path):
    """Mount a disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_are_the_umasks(tmp_path, umask):
    """This includes safetensors, which makes files that only their owner may read."""
    before = os.umask(umask)
    try:
        with disk.replacing(tmp_path / "a.safetensors") as name:
            save_file({"a": torch.zeros(2)}, name)
        with disk.replacing(tmp_path / "folder") as name:
            os.makedirs(f"{name}/inner")
            save_file({"a": torch.zeros(2)}, f"{name}/inner/b.safetensors")
        with disk.writing(tmp_path / "text") as file:
            file.write("x")
        disk.append(str(tmp_path / "log"), "line\n")
    finally:
        os.umask(before)
    wanted = {name: 0o666 & ~umask for name in ("a.safetensors", "folder/inner/b.safetensors", "text", "log")}
    assert modes(tmp_path) == wanted | {"folder": 0o777 & ~umask, "folder/inner": 0o777 & ~umask}


def test_nothing_is_written_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    for name in ("out", "out.partial", "log"):
        (tmp_path / name).symlink_to(mine)
    with disk.writing(tmp_path / "out") as file:
        file.write("new")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        disk.append(str(tmp_path / "log"), "line\n")
    assert mine.read_text() == "precious"
    assert (tmp_path / "out").read_text() == "new" and not (tmp_path / "out").is_symlink()


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept"
    path.write_text("before")
    with pytest.raises(ArithmeticError), disk.writing(path) as file:
        file.write("half")
        raise ArithmeticError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["kept"]


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    for name in ("empty", "used"):
        refused = pytest.raises(disk.Unwritable, match="used cannot be written: ")
        with refused if name == "used" else contextlib.nullcontext(), disk.replacing(tmp_path / name) as made:
            os.mkdir(made)
            Path(made, "new").touch()
    assert os.listdir(tmp_path / "empty") == ["new"] and os.listdir(tmp_path / "used") == ["mine"]


WRITERS = {
    "text": lambda path: Path(path).write_text("x" * 2**20),
    "torch": lambda path: torch.save(torch.zeros(2**18), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(2**18)}, path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_called_that(small, writer):
    """The message is the same for every type of error by which a library reports it."""
    with (
        pytest.raises(disk.Unwritable, match=r"^\S+/out cannot be written: the disk is full"),
        disk.replacing(small / "out") as name,
    ):
        WRITERS[writer](name)
    assert os.listdir(small) == []


def test_another_error_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match=r"^a bug$"), disk.replacing(tmp_path / "out"):
        raise RuntimeError("a bug")


def test_a_line_is_appended_whole_or_not_at_all(small):
    log = str(small / "log")
    disk.append(log, "first\n")
    with pytest.raises(OSError, match="No space left") as caught:
        disk.append(log, "x" * 2**20)
    assert caught.value.errno in disk.FULL
    disk.append(log, "second\n")
    assert Path(log).read_text() == "first\nsecond\n"


def test_a_limit_of_file_sizes_counts_as_full(tmp_path):
    script = (
        "import resource, signal, sys; from dsdistill import disk; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with disk.writing(sys.argv[1]) as file: file.write('x' * 9999)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert "cannot be written: the disk is full (File too large)" in done.stderr.splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096 and os.listdir(tmp_path) == []


def test_only_what_was_made_is_removed(tmp_path):
    folder, mine = tmp_path / "stages", tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.safetensors").touch()
    (folder / "inner" / "notes.md").write_text("mine")
    mine.write_text("mine")
    with pytest.raises(disk.Foreign, match=r"it holds inner/notes\.md, which no run wrote"):
        disk.remove(str(folder), ["*.safetensors"])
    assert (folder / "a.safetensors").exists()
    (folder / "inner" / "notes.md").unlink()
    (folder / "b.safetensors").symlink_to(mine)
    (folder / "c.safetensors").symlink_to(tmp_path)
    disk.remove(str(folder), ["*.safetensors"])
    disk.remove(str(folder), [])
    assert mine.read_text() == "mine" and os.listdir(tmp_path) == ["mine"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with disk.replacing(os.path.realpath(tmp_path / "link")) as made:
        os.mkdir(made)
        Path(made, "new").touch()
    assert os.listdir(tmp_path / "real") == ["new"] and (tmp_path / "link").is_symlink()


def test_what_a_kill_left_is_swept(tmp_path):
    (tmp_path / ".partial-01234567").mkdir()
    (tmp_path / ".partial-01234567" / "half").touch()
    (tmp_path / ".partial-mine").mkdir()
    (tmp_path / "a.partial").touch()
    disk.sweep(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".partial-mine", "a.partial"]


def _dangling(folder: Path) -> str:
    (folder / "link").symlink_to("nowhere")
    return str(folder / "link")


def _loop(folder: Path) -> str:
    (folder / "loop").symlink_to("loop")
    return str(folder / "loop" / "run")


PLACES = {
    "a link to nothing": (_dangling, "is a broken link"),
    "a loop of links": (_loop, "Too many levels of symbolic links"),
    "a long name": (lambda folder: str(folder / ("x" * 256)), "a shorter path"),
    "a long name in bytes": (lambda folder: str(folder / ("ü" * 130)), "a shorter path"),
    "a long path": (lambda folder: str(folder) + "/x" * 2000, "a shorter path"),
    "NUL": (lambda folder: f"{folder}/a\0b", "a path without NUL"),
    "half a character": (lambda folder: f"{folder}/\ud800", "a path that can be encoded"),
}


@pytest.mark.parametrize("place", PLACES)
def test_impossible_places(tmp_path, place):
    make, wanted = PLACES[place]
    path = make(tmp_path)
    for check in (disk.check_writable, disk.check_file):
        with pytest.raises(UserError) as caught:
            check(path, "--json")
        line = str(caught.value)
        assert line.startswith("--json: got ") and "\n" not in line
        assert wanted in line or (check is disk.check_file and "expected a file" in line)


def test_files_that_cannot_be_outputs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "link").symlink_to("config.yaml")
    for name, sources, wanted in (
        ("pipe", [], "pipe, a pipe"),
        ("config.yaml", ["config.yaml"], "which is also read"),
        ("link", ["config.yaml"], "which is also read"),
    ):
        with pytest.raises(UserError, match=wanted):
            disk.check_file(str(tmp_path / name), "--json", [str(tmp_path / s) for s in sources])
    disk.check_file("/dev/null", "--json")
    disk.check_file(str(tmp_path / "link"), "--json", ["train.steps=5"])
