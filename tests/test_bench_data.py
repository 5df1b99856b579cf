"""The benchmark of the data has a complete table, and its figures measure what they say."""

import json
import re

import pytest

from dsdistill.bench import data_jobs, data_speed
from dsdistill.config import UserError
from dsdistill.data import store
from tests.test_cli import command


def test_every_form_has_its_row(tmp_path, tokenizer_dir, capsys):
    texts, table = tmp_path / "texts.jsonl", tmp_path / "data.json"
    texts.write_text("".join(json.dumps({"text": f"the list of {i}\n\na file"}) + "\n" for i in range(9)))
    options = {"text": str(texts), "size": 20_000, "tokenizer": str(tokenizer_dir), "documents": 3000}
    assert data_speed.run_data(options=options, json_path=table) == 0
    found = json.loads(table.read_text())
    assert [(row["form"], row["name"]) for row in found["rows"]] == [
        ("rows of whole texts", "dsdistill"),
        ("rows of whole texts", "datasets.map"),
        ("rows of paragraphs", "dsdistill"),
        ("rows of paragraphs", "datasets.map"),
        ("one .txt", "dsdistill"),
    ]
    whole, _, paragraphs, _, one = found["rows"]
    copies = whole["documents"]
    assert paragraphs["documents"] in (2 * copies, 2 * copies - 1) and one["documents"] == 1
    # The same words, in ids of two bytes, plus the tokens that begin and end each document.
    assert whole["tokens"] - copies == paragraphs["tokens"] - paragraphs["documents"] == one["tokens"] - 1
    assert one["bytes_per_token"] < 2.5 < paragraphs["bytes_per_token"]
    assert found["large"]["documents"] == 3000 and found["large"]["tokens"] > 1_000_000
    assert found["large"]["second_start"] < found["large"]["first_start"] + 1
    assert all(row["tokens_per_second"] > 0 and row["peak_mib"] > 0 for row in found["rows"])
    assert found["machine"]["datasets"] in capsys.readouterr().out


def test_a_stretched_store_is_read_like_any_other(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(data_jobs, "SHARD", 5000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the list"}))
    job = {name: str(tmp_path / "a.jsonl") for name in ("file", "dev")} | {"cache": str(tmp_path / "cache")}
    data_jobs._load(data_jobs._tokenizer(str(tokenizer_dir)), job)
    (folder,) = (tmp_path / "cache").glob("tokens-*/")
    tokens = data_jobs.stretch(folder, 100)
    found = store.open_store(folder)
    assert (len(found), len(found.tokens), found.starts[-1]) == (100, tokens, tokens)
    assert not found.tokens.read(4990, 5010).any() and (found.starts[1:] - found.starts[:-1] >= 2).all()
    assert sum(file.stat().st_blocks for file in folder.glob("*/ids.bin")) * 512 < tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"size": "much"}}, "bench size: got 'much', expected a size such as 50MB"),
        ({"options": {"documents": 0}}, "bench documents: got 0, expected a number from 1"),
        ({"options": {"tokenizer": "nowhere"}}, "bench tokenizer: got nowhere, expected a folder"),
        ({"options": {"text": "nothing.jsonl"}}, "nothing.jsonl: got no such file"),
        ({"dtype": "float16"}, "bench --dtype: got a value for data, expected none"),
    ],
)
def test_a_bad_option_is_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        data_speed.run_data(**given)


def test_the_command_refuses_in_one_line():
    done = command("bench", "data", "--shapes", "rows=3")
    assert done.returncode == 2 and done.stdout == ""
    assert "bench option: got 'rows', expected one of 'text', 'size'" in done.stderr
    assert done.stderr.count("\n") == 1
