"""Sets larger than the disk: real `datasets` streaming over local files, in parts of 200 characters."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pytest

from dsdistill.config.errors import RunError, UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import Loader, Packed, StreamedLoader, hub, load_data, streamed
from dsdistill.data.streamed import KEPT
from dsdistill.data.streamed_loader import as_one
from tests.data.rig import made, words

ROWS = 300
TEXTS = ["abcdefghij"[: 3 + i % 7] + "klmnop"[: i // 60 + 1] for i in range(ROWS)]
load_dataset = datasets.load_dataset


def local(folder):
    """Return a replacement for `load_dataset` that reads the files of a folder like those of the hub."""

    def loaded(name, subset, split, **options):
        options.pop("cache_dir", None)
        files = sorted(map(str, Path(folder, split).glob("*.parquet")))
        return load_dataset("parquet", data_files={split: files}, split=split, **options)

    return loaded


def write(folder, split, texts, files):
    (folder / split).mkdir(parents=True)
    for index, own in enumerate(np.array_split(texts, files)):
        rows = {"text": own.tolist(), "other": [0] * len(own)}
        datasets.Dataset.from_dict(rows).to_parquet(folder / split / f"{index}.parquet", batch_size=17)


@pytest.fixture
def source(tmp_path, monkeypatch):
    write(tmp_path / "hub", "train", TEXTS, 4)
    write(tmp_path / "hub", "dev", ["abc", "def"], 1)
    monkeypatch.setattr(datasets, "load_dataset", local(tmp_path / "hub"))
    monkeypatch.setattr(streamed, "CHARACTERS", 200)
    monkeypatch.setattr(streamed, "LEAST", 30)
    monkeypatch.setattr(streamed, "POLL", 0.01)
    monkeypatch.setattr(hub, "ROWS", 13)
    hub.revision.cache_clear()
    return tmp_path


def train(folder, tokenizer, **more):
    settings = {"source": "some/set", "streaming": True, "max_length": 16, "cache": str(folder / "cache")}
    options = {name: more.pop(name) for name in ("packed", "run", "bad") if name in more}
    section = Section(**settings | more)
    return load_data(section, more.pop("task", "causal_lm"), words(tokenizer), **{"run": "here"} | options)


def loader(examples, rank=0, ranks=1, size=8):
    return StreamedLoader(examples, size, 2, ranks, rank, 5, 0)


def seen(loading, steps):
    """Return the sorted texts of each step, as lists of tokens."""
    found = []
    for step in steps:
        rows = [
            tuple(batch.input_ids[row][batch.mask[row]].tolist())
            for batch in loading.step(0, step)
            for row in range(len(batch.input_ids))
            if batch.mask[row].any()
        ]
        found.append(sorted(rows))
    return found


def parts_of(folder):
    return sorted(int(path.name) for path in folder.glob("cache/stream-*/[0-9]*/"))


@pytest.fixture
def opened():
    """Keep what a test opens, to close it."""
    held = []
    yield held
    for examples in held:
        examples.close()


def test_each_row_comes_once_a_turn(source, tokenizer, opened):
    found = train(source, tokenizer)
    opened.append(found.train)
    steps = seen(loader(found.train, size=10), range(60))
    assert all(len(step) == 10 for step in steps)
    once, again = (sorted(chain(*turn)) for turn in (steps[:30], steps[30:]))
    wanted = sorted((*tokenizer(text, add_special_tokens=False)["input_ids"], 3) for text in TEXTS)
    assert once == again == wanted
    assert steps[:30] != steps[30:]  # in another order
    front = [(*tokenizer(text, add_special_tokens=False)["input_ids"], 3) for text in TEXTS[:10]]
    assert steps[0] != sorted(front)  # and not in the order of the file


def test_a_few_parts_lie_on_the_disk_at_a_time(source, tokenizer, opened, caplog):
    caplog.set_level("INFO", "dsdistill")
    examples = train(source, tokenizer).train
    opened.append(examples)
    loading, most, all_of_them = loader(examples), 0, set()
    for step in range(36):
        loading.step(0, step)
        time.sleep(0.03)
        most = max(most, len(parts_of(source)))
        all_of_them |= {*parts_of(source)}
    assert len(all_of_them) > 2 * KEPT and most == KEPT
    examples.close()
    assert parts_of(source) == []
    assert len(list(source.glob("cache/stream-*/parts.jsonl"))) == 1
    assert len([line for line in caplog.messages if "train:" in line and "tokens/s" in line]) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_two_ranks_see_what_one_sees(source, tokenizer, opened, packed):
    one = train(source, tokenizer, packed=packed, run="one").train
    two = [train(source, tokenizer, packed=packed, run="two").train for _ in range(2)]
    opened.extend([one, *two])
    alone, others = loader(one), [loader(of, rank, 2) for rank, of in enumerate(two)]
    for step in range(20):
        both = sorted(chain(*(seen(of, [step])[0] for of in others)))
        assert both == seen(alone, [step])[0], step


@pytest.mark.parametrize("cache", ["kept", "without parts", "lost"])
def test_a_resume_goes_on_exactly(source, tokenizer, opened, cache):
    whole = train(source, tokenizer, run="whole").train
    opened.append(whole)
    wanted = seen(loader(whole), range(30))
    first = train(source, tokenizer).train
    seen(loader(first), range(23))
    first.close() if cache == "without parts" else first._closed.set()
    if cache == "lost":
        first.close()
        for path in source.glob("cache/stream-*/parts.jsonl"):
            path.unlink()
    second = train(source, tokenizer).train
    opened.append(second)
    assert seen(loader(second), range(22, 30)) == wanted[22:]
    assert seen(loader(second), range(3)) == wanted[:3]  # and back to the start, as a baseline does


def test_blocks_hold_whole_documents(source, tokenizer, opened):
    examples = train(source, tokenizer, packed=True).train
    opened.append(examples)
    (batch, *_) = loader(examples).step(0, 0)
    assert batch.places is not None and batch.mask.sum(1).max() <= 16
    assert sum(int(batch.documents.sum()) for batch in loader(examples).step(0, 1)) > 8


def test_the_first_part_stays_for_passes(source, tokenizer, opened):
    examples = train(source, tokenizer).train
    opened.append(examples)
    first = examples.first()
    texts = [first.tokens(row).tolist() for row in range(3)]
    assert texts == [[*tokenizer(text, add_special_tokens=False)["input_ids"], 3] for text in TEXTS[:3]]
    seen(loader(examples), range(30))
    assert 0 in parts_of(source) and len(parts_of(source)) <= KEPT
    assert examples.first() is first


def test_dev_sets_and_looks_read_what_they_need(source, tokenizer, monkeypatch):
    monkeypatch.setattr("dsdistill.data.sets.LOOKED", 20)
    found = train(source, tokenizer, bad=[].append)
    assert len(found.train) == 20 and len(found.dev) == 2
    assert not parts_of(source)


def test_another_source_of_the_same_name_is_refused(source, tokenizer, opened):
    first = train(source, tokenizer).train
    seen(loader(first), range(2))
    first.close()
    for path in (source / "hub" / "train").glob("*"):
        path.unlink()
    (source / "hub" / "train").rmdir()
    write(source / "hub", "train", [text[::-1] for text in TEXTS], 4)
    second = train(source, tokenizer).train
    opened.append(second)
    with pytest.raises(UserError, match="some/set train, part 1: got contents that have changed"):
        seen(loader(second), range(2))


def test_a_row_that_cannot_be_used_ends_every_rank(source, tokenizer, opened, monkeypatch):
    write(source / "bad", "train", ["abc"] * 200, 1)
    datasets.Dataset.from_dict({"text": ["abc", None], "other": [0, 0]}).to_parquet(
        source / "bad" / "train" / "1.parquet"
    )
    write(source / "bad", "dev", ["abc"], 1)
    monkeypatch.setattr(datasets, "load_dataset", local(source / "bad"))
    ranks = [train(source, tokenizer).train for _ in range(2)]
    opened.extend(ranks)
    for rank, examples in enumerate(ranks):
        with pytest.raises(UserError, match="some/set train, row 202: got no text, expected a text"):
            seen(loader(examples, rank, 2), range(60))


def test_a_network_that_fails_is_one_line(source, tokenizer, opened, monkeypatch):
    examples = train(source, tokenizer).train
    opened.append(examples)
    real = hub.Remote._dataset

    class Failing:
        def __init__(self, dataset):
            self.dataset, self.features, self.column_names = dataset, dataset.features, dataset.column_names
            self.state_dict = dataset.state_dict

        def select_columns(self, names):
            return Failing(self.dataset.select_columns(names))

        def with_format(self, kind):
            return Failing(self.dataset.with_format(kind))

        def iter(self, rows):
            yield next(self.dataset.iter(rows))
            raise ConnectionError("the cable is cut\nhere")

    monkeypatch.setattr(hub.Remote, "_dataset", lambda self: Failing(real(self)))
    with pytest.raises(RunError, match=r"^reading some/set train failed: the cable is cut$"):
        seen(loader(examples), range(3))


KILLED = """
import sys, time
from pathlib import Path
import datasets
from tests.data import test_streamed as here
from dsdistill.data import hub, streamed
from transformers import AutoTokenizer
datasets.load_dataset = here.local(sys.argv[1] + "/hub")
streamed.CHARACTERS, streamed.LEAST, streamed.POLL, hub.ROWS = 200, 30, 0.01, 13
examples = here.train(Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])).train
print(here.seen(here.loader(examples), [0]), flush=True)
time.sleep(60)
"""


def test_where_the_writer_is_killed_another_goes_on(source, tokenizer, opened, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    whole = train(source, again, run="whole").train
    opened.append(whole)
    wanted = seen(loader(whole), range(30))
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "tokenizer")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert json.loads(process.stdout.readline().replace("(", "[").replace(")", "]"))
        other = train(source, again).train
        opened.append(other)
        assert seen(loader(other), [0]) == wanted[:1]  # the part that the other process has made
        assert not other._failure
        process.send_signal(signal.SIGKILL)
    assert seen(loader(other), range(30)) == wanted


def test_parts_joined_are_the_parts_one_after_the_other():
    """A step may begin in one part and end in the next."""
    mine = made([[1, 2], [3, 4, 5]], ranges=[[(1, 2)], [(0, 1), (2, 3)]], spans=[[], [(1, 3, 0)]])
    other = made([[6], [7, 8, 9, 10]], ranges=[[(0, 1)], [(1, 3)]], spans=[[(0, 1, 1)], [(2, 4, 0)]])
    both = as_one([mine, other])
    apart = [(of, row) for of in (mine, other) for row in range(2)]
    for row, (of, own) in enumerate(apart):
        assert both.tokens(row).tolist() == of.tokens(own).tolist() and both.name(row) == of.name(own)
        assert both.ranges(row).tolist() == of.ranges(own).tolist()
        assert both.spans(row).tolist() == of.spans(own).tolist()
    blocks = as_one(
        [
            Packed(mine, np.array([1, 0]), np.array([0, 2])),
            Packed(other, np.array([0, 1]), np.array([0, 1, 2])),
        ]
    )
    assert [blocks.of(block) for block in range(len(blocks))] == [[1, 0], [2], [3]]
    assert blocks.lengths.tolist() == [5, 1, 4] and blocks.parts.tokens(3).tolist() == [7, 8, 9, 10]


def test_ordinary_loaders_are_as_before(tokenizer):
    loading = Loader(made([[1, 2], [3, 4], [5, 6]]), 2, 1, 1, 0, 0, 0)
    assert sorted(chain(*seen(loading, [0, 1]))) == [(1, 2), (3, 4), (5, 6)]
