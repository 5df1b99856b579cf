"""Stores of tokenised documents: contents, kills, several processes, bad rows, damage."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dsdistill.config.data_section import Data as Section
from dsdistill.config.errors import UserError
from dsdistill.data import store, store_writer
from dsdistill.data.documents import PlainReader
from dsdistill.data.examples import cut
from dsdistill.data.files import stream
from dsdistill.data.store_check import verify_stores
from dsdistill.data.store_writer import Limit, stored
from tests.data.rig import lists, load, made

BOS, EOS, A = 0, 1, 2


@pytest.fixture(scope="module")
def letters():
    """Return a tokenizer with a token per letter and a token that begins every text, as Llama 3's has."""
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", " ", "\n"])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def write(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def opened(folder: Path, path: Path, tokenizer, limit=None, bad=None, entries=30):
    source = stream(str(path), None, ["text"], 2**30)
    settings = {"source": source.identity}
    return stored(folder, source, PlainReader(tokenizer, "text"), entries, settings, limit or Limit(), bad)


def texts_of(documents) -> list[list[int]]:
    return [
        documents.tokens.read(a, b).tolist()
        for a, b in zip(documents.starts, documents.starts[1:], strict=False)
    ]


def spelled(text):
    return [BOS, *(A + "abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text), EOS]


def test_documents_begin_and_end_as_the_tokenizer_says(tmp_path, letters):
    path = write(tmp_path / "a.jsonl", ["abc", " ", "d"])
    found = opened(tmp_path / "store", path, letters)
    assert texts_of(found) == [spelled("abc"), spelled("d")]
    assert found.name(1) == f"{path}:3" and found.tokens.parts[0].dtype == np.uint16
    assert opened(tmp_path / "wide", path, letters, entries=2**16 + 1).tokens.parts[0].dtype == np.int32


def test_what_a_text_brings_itself_is_not_doubled(tmp_path, letters):
    path = write(tmp_path / "a.jsonl", ["<s>ab</s>", "<s>c"])
    assert texts_of(opened(tmp_path / "store", path, letters)) == [spelled("ab"), spelled("c")]


@pytest.mark.parametrize("packing", [True, False])
def test_training_and_perplexity_see_the_same_beginnings(tmp_path, letters, packing):
    path = write(tmp_path / "a.jsonl", ["abc", "de"])
    section = Section(source="files", train=str(path), dev=str(path), max_length=32, packing=packing)
    data = load(section, "causal_lm", letters, packed=packing)
    if packing:
        assert lists(data.train.parts) == lists(data.dev) == [spelled("abc"), spelled("de")]
    else:  # the end of the last document lies between two
        assert lists(data.train) == lists(data.dev) == [[*spelled("abc"), *spelled("de")[:-1]]]


def test_a_second_opening_tokenises_nothing(tmp_path, letters, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["abc"])
    first = opened(tmp_path / "store", path, letters)
    monkeypatch.setattr(PlainReader, "documents", lambda *_: pytest.fail("tokenised again"))
    assert texts_of(opened(tmp_path / "store", path, letters)) == texts_of(first)


TEXTS = [letter * (3 + i) for i, letter in enumerate("abcdefghij")]


def test_a_stopped_process_is_gone_on_from(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD", 16)
    monkeypatch.setattr(store_writer, "MOST", 1)
    path = write(tmp_path / "a.jsonl", TEXTS)
    whole = opened(tmp_path / "whole", path, letters)
    seen, plain = [], PlainReader.documents

    def stops(self, items, place):
        seen.extend(item.line for item in items)
        if 7 in seen and len(seen) < 8:
            raise KeyboardInterrupt
        return plain(self, items, place)

    monkeypatch.setattr(PlainReader, "documents", stops)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "store", path, letters)
    kept = sorted(name.name for name in (tmp_path / "store").iterdir())
    assert kept and all(name.isdigit() for name in kept), "shards are complete or absent"
    assert not store.is_complete(tmp_path / "store")
    seen[:] = [0] * 8
    again = opened(tmp_path / "store", path, letters)
    assert texts_of(again) == texts_of(whole) and again.digest == whole.digest
    assert min(seen[8:]) > 3, "what complete shards hold is not tokenised again"


def test_a_killed_process_is_gone_on_from(tmp_path, letters):
    """The process is killed at a random moment between two shards."""
    write(tmp_path / "a.jsonl", TEXTS * 200)
    letters.save_pretrained(tmp_path / "tokenizer")
    code = f"""
        import sys, time
        from transformers import AutoTokenizer
        from dsdistill.data import store_writer
        from tests.data.test_store import opened
        from pathlib import Path
        store_writer.SHARD, store_writer.MOST = 200, 8
        complete = store_writer._Writer._complete
        def slowly(self, *arguments):
            complete(self, *arguments)
            print("shard", flush=True)
            time.sleep(0.05)
        store_writer._Writer._complete = slowly
        home = Path({str(tmp_path)!r})
        found = opened(home / sys.argv[1], home / "a.jsonl", AutoTokenizer.from_pretrained(home / "tokenizer"))
        print(found.digest)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "store"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(5):
            assert process.stdout.readline() == "shard\n"
        process.send_signal(signal.SIGKILL)
    done, other = (
        subprocess.run([*command[:-1], name], capture_output=True, text=True, check=True)
        for name in ("store", "other")
    )
    assert done.stdout.splitlines()[-1] == other.stdout.splitlines()[-1]
    assert done.stdout.count("shard") <= other.stdout.count("shard") - 5


def test_one_process_writes_and_another_waits(tmp_path, letters):
    write(tmp_path / "a.jsonl", TEXTS)
    letters.save_pretrained(tmp_path / "tokenizer")
    code = f"""
        import logging, sys, time
        from pathlib import Path
        from transformers import AutoTokenizer
        from dsdistill.data.documents import PlainReader
        from tests.data.test_store import opened
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        plain = PlainReader.documents
        def slowly(*arguments):
            print("tokenising", flush=True)
            time.sleep(1)
            return plain(*arguments)
        PlainReader.documents = slowly
        home = Path({str(tmp_path)!r})
        opened(home / "store", home / "a.jsonl", AutoTokenizer.from_pretrained(home / "tokenizer"))
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(said).count("tokenising\n") == 1
    assert not list(tmp_path.glob("*.lock"))


def test_a_row_that_cannot_be_used_is_named_and_leaves_nothing(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": 5}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: got a int in text"):
        opened(tmp_path / "store", path, letters)
    assert sorted(name.name for name in tmp_path.iterdir()) == ["a.jsonl"]


def test_bad_rows_are_told_and_left_out(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\nnot json\n{"text": 5}\n{"text": "c"}\n[1]\n')
    told = []
    found = opened(tmp_path / "store", path, letters, bad=told.append)
    assert texts_of(found) == [spelled("ab"), spelled("c")]
    lines = [str(error).split(": got")[0].rpartition(" ")[2] for error in told]
    assert lines == ["2", "3", "5"]
    assert not list(tmp_path.glob("store*")), "a run must not find a store that lacks rows"
    opened(tmp_path / "store", write(tmp_path / "b.jsonl", ["ab"]), letters, bad=told.append)
    assert store.is_complete(tmp_path / "store") and len(told) == 3


def test_where_every_row_is_bad_the_first_says_why(tmp_path, letters):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "ab"}\n{"text": 5}\n')
    told = []
    with pytest.raises(UserError, match=r"a\.jsonl: got no column 'text', expected one of its columns: body"):
        opened(tmp_path / "store", path, letters, bad=told.append)
    assert len(told) == 2 and not list(tmp_path.glob("store*"))


def test_a_limit_reads_no_further(tmp_path, letters, monkeypatch):
    monkeypatch.setattr(store_writer, "MOST", 1)
    path = write(tmp_path / "a.jsonl", [*TEXTS, 7])  # the last row is no text
    assert len(opened(tmp_path / "some", path, letters, Limit(documents=3))) == 3
    assert len(opened(tmp_path / "tokens", path, letters, Limit(tokens=12))) == 3
    with pytest.raises(UserError, match="line 11"):
        opened(tmp_path / "all", path, letters)


@pytest.mark.parametrize("harm", ["cut", "note", "gone"])
def test_a_damaged_store_is_refused_in_one_line(tmp_path, letters, harm):
    path = write(tmp_path / "a.jsonl", TEXTS)
    opened(tmp_path / "store", path, letters)
    ids = tmp_path / "store" / "00000" / "ids.bin"
    if harm == "cut":
        ids.write_bytes(ids.read_bytes()[:-2])
    elif harm == "gone":
        ids.unlink()
    else:
        (tmp_path / "store" / "store.json").write_text("{}")
    with pytest.raises(UserError, match=r"store: got a damaged store .*, expected an intact one: remove it"):
        opened(tmp_path / "store", path, letters)


@pytest.mark.parametrize("column", ["begins", "lines", "ranges"])
def test_a_store_without_part_of_a_column_is_refused(tmp_path, letters, column):
    """Without its ranges, all tokens would have labels; without some begins, documents would run together."""
    settings = {"cache": str(tmp_path), "text": ("a", "b"), "layout": "separator", "label": None}
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": "u", "b": "v"}\n')
    section = Section(source="files", root=str(tmp_path), train="a.jsonl", dev="a.jsonl", **settings)
    assert load(section, "causal_lm", letters).train.prompted
    (path,) = tmp_path.glob(f"tokens-*/00000/{column}.bin")
    held = path.read_bytes()
    for harmed in [None] if column == "ranges" else [None, held[: len(held) // 2]]:
        path.unlink() if harmed is None else path.write_bytes(harmed)
        with pytest.raises(UserError, match="got a damaged store"):
            load(section, "causal_lm", letters)


def test_verify(tmp_path, letters):
    path = write(tmp_path / "a.jsonl", TEXTS)
    found = opened(tmp_path / "store", path, letters)
    assert verify_stores(found.paths) == 1
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("jjj", "jkj", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time are unchanged
    with pytest.raises(UserError, match=r"a\.jsonl: got a file that has changed since .*store was made from"):
        verify_stores(found.paths)
    path.write_text(text)
    ids = tmp_path / "store" / "00000" / "ids.bin"
    ids.write_bytes(bytes([5]) + ids.read_bytes()[1:])
    with pytest.raises(UserError, match=r"ids\.bin: got a file that has changed since it was written"):
        verify_stores(found.paths)


def test_a_changed_source_is_tokenised_anew(tmp_path, letters):
    path = write(tmp_path / "a.jsonl", ["abc"])
    section = Section(
        source="files", train=str(path), dev=str(path), max_length=32, cache=str(tmp_path / "cache")
    )
    assert lists(load(section, "causal_lm", letters).train) == [spelled("abc")]
    time.sleep(0.01)
    write(path, ["abd"])
    assert lists(load(section, "causal_lm", letters).train) == [spelled("abd")]


class TestOverlong:
    """Documents of 9, 4 and 1 tokens, the second with a label on its last token alone; blocks of 4."""

    def examples(self, overlong, ranges):
        documents = made([list(range(9)), [10, 11, 12, 13], [20]], ranges=ranges).documents
        return cut(documents, 4, overlong)

    def test_split(self):
        found = self.examples("split", None)
        assert lists(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13]]
        assert (found.lost.truncated, found.lost.dropped) == (
            0,
            2,
        )  # a remainder of one token, and a document of one token

    def test_truncate(self):
        found = self.examples("truncate", None)
        assert lists(found) == [[0, 1, 2, 3], [10, 11, 12, 13]]
        assert (found.lost.truncated, found.lost.dropped) == (1, 1)

    def test_drop(self):
        found = self.examples("drop", None)
        assert lists(found) == [[10, 11, 12, 13]] and (found.lost.truncated, found.lost.dropped) == (0, 2)

    def test_parts_without_labels_are_left_out(self):
        ranges = [[(5, 9)], [(3, 4)], [(0, 1)]]
        found = self.examples("split", ranges)
        assert lists(found) == [[4, 5, 6, 7], [10, 11, 12, 13]]
        assert [found.ranges(row).tolist() for row in range(2)] == [[[1, 4]], [[3, 4]]]
        assert found.token_labels(0).tolist() == [-100, 5, 6, 7]
        assert lists(self.examples("truncate", ranges)) == [[10, 11, 12, 13]]

    def test_a_label_on_a_first_token_alone_predicts_nothing(self):
        assert lists(self.examples("split", [[(4, 5)], [(0, 1)], [(0, 1)]])) == []


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_labelled_tokens_are_counted_without_looking_at_each_example(overlong):
    ranges = [[(0, 2), (5, 9)], [(3, 4)], [], [(1, 6)], [(0, 12)]]
    rows = [list(range(length)) for length in (9, 4, 5, 6, 12)]
    found = cut(made(rows, ranges=ranges).documents, 4, overlong)
    each = [int((found.token_labels(row) != -100).sum()) for row in range(len(found))]
    assert sum(each) == found.count_labelled() > 0
