"""If several people share a cache folder, readable files are used, and files that cannot be written cost one line."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from dsdistill.config import UserError
from dsdistill.data import cache
from dsdistill.data.wordpiece import train_tokenizer
from tests.test_bad_input import _nobody

ROWS = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]


@pytest.fixture
def shared():
    """Return a folder that the user nobody can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_is_made_once(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert cache.rows(path, lambda: ROWS) == ROWS
    assert cache.rows(path, lambda: pytest.fail("made again")) == ROWS


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_others_can_use_it(tmp_path, umask):
    before = os.umask(umask)
    try:
        cache.rows(tmp_path / "rows.jsonl", lambda: ROWS)
        folder = Path(train_tokenizer(["some words", "more words"], 100, str(tmp_path)))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "rows.jsonl", *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_what_cannot_be_written_is_used_as_it_is(shared, caplog):
    (shared / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with _nobody():
        assert cache.rows(shared / "kept.jsonl", lambda: pytest.fail("made again")) == ROWS
        assert cache.rows(shared / "new.jsonl", lambda: ROWS) == ROWS
        with pytest.raises(
            UserError, match=r"data\.cache: got .*Permission denied, expected a cache that can"
        ):
            train_tokenizer(["some words"], 100, str(shared))
    assert "rows cannot be kept in the cache: " in caplog.text and os.listdir(shared) == ["kept.jsonl"]
    known = train_tokenizer(["some words"], 100, str(shared))
    with _nobody():
        assert train_tokenizer(["some words"], 100, str(shared)) == known


def test_what_cannot_be_read_is_one_line(shared):
    closed = shared / "closed"
    closed.mkdir(mode=0o700)
    (shared / "closed.jsonl").touch(mode=0o600)
    for path in (closed / "rows.jsonl", shared / "closed.jsonl"):
        with (
            _nobody(),
            pytest.raises(UserError, match=r"data\.cache: got .* \(Permission denied\), expected a cache"),
        ):
            cache.rows(path, lambda: ROWS)


@pytest.mark.parametrize("content", [b'{"id": "a"', b"\xff\n", b"[" * 10_000])
def test_what_is_damaged_is_made_again(tmp_path, content, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert cache.rows(path, lambda: ROWS) == ROWS == cache.rows(path, lambda: pytest.fail("made again"))
    assert "is damaged and is made again" in caplog.text
