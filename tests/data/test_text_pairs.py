"""Texts without labels, alone or in pairs whose texts are a row each, and pairs with scores by people."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsdistill.config.data_section import Data as Section
from dsdistill.config.errors import UserError
from dsdistill.data import Examples, Loader, TextPairs, collate, evaluation_batches, restore
from tests.data.rig import load

ROWS = [
    ("tensor sum", "the sum of a tensor"),
    ("row", "a row of a list"),
    ("mean value of", "mean"),
    ("open file", "open a file read each last of list"),
    ("node", "a node of a graph"),
]

COLUMNS = ("query", "document")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["query\tdocument\tscore", *(f"{a}\t{b}\t{i / 4}" for i, (a, b) in enumerate(ROWS))]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return folder


def section(folder, name="pairs.tsv", **changes):
    settings = {"text": ("query", "document"), "label": None, "max_length": 8} | changes
    return Section(source="files", train=str(folder / name), dev=str(folder / name), **settings)


def texts(batch, tokenizer):
    return [
        tokenizer.decode(ids[valid], skip_special_tokens=True)
        for ids, valid in zip(batch.input_ids, batch.mask, strict=True)
    ]


def test_the_texts_of_a_pair_are_rows_one_after_the_other(folder, tokenizer):
    train = load(section(folder), "embedding", tokenizer).train
    assert isinstance(train, TextPairs) and len(train) == 5
    batch = collate(train, [3, 0], 0)
    assert batch.pair.tolist() == [0, 0, 1, 1] and batch.index.tolist() == [6, 7, 0, 1]
    assert texts(batch, tokenizer) == ["open file", "open a file read each last", *ROWS[0]]
    assert batch.counted is None and batch.labels.isnan().all() and batch.labels.shape == (4,)
    assert batch.token_types is None or not batch.token_types.any()
    assert batch.ids[0] == batch.ids[1] == train.name(3) and "pairs.tsv:5" in train.name(3)
    assert train.lengths.tolist() == [max(train.texts.lengths[2 * i : 2 * i + 2].tolist()) for i in range(5)]


def test_filler_is_no_pair(folder, tokenizer):
    train = load(section(folder), "embedding", tokenizer).train
    batch = collate(train, [], 0)
    assert batch.pair.tolist() == [-1] and not batch.rows.any() and batch.index.tolist() == [-1]


def test_some_of_the_pairs_stay_pairs(folder, tokenizer):
    train = load(section(folder), "embedding", tokenizer).train
    some = train.take([4, 1])
    assert len(some) == 2 and texts(collate(some, [0, 1], 0), tokenizer) == [*ROWS[4], *ROWS[1]]
    limited = load(section(folder, max_train=2, max_dev=3), "embedding", tokenizer)
    assert len(limited.train) == 2 and len(limited.dev) == 3
    assert len(load(section(folder, fraction=0.4), "embedding", tokenizer).train) == 2


def test_several_files_are_limited_together(folder, tokenizer):
    path = str(folder / "pairs.tsv")
    found = section(folder, max_train=7).model_copy(update={"train": (path, path)})
    train = load(found, "embedding", tokenizer).train
    assert len(train) == 7 and texts(collate(train, [6], 0), tokenizer) == list(ROWS[1])


def test_prompts_come_before_the_texts(folder, tokenizer):
    train = load(section(folder, prompts=("read ", "a node ")), "embedding", tokenizer).train
    assert texts(collate(train, [1], 0), tokenizer) == ["read row", "a node a row of a"]
    single = load(section(folder, text=("query",), prompts=("list ",)), "embedding", tokenizer).train
    assert isinstance(single, Examples) and texts(collate(single, [1], 0), tokenizer) == ["list row"]


def test_single_texts_are_trained_on_beside_dev_sets_of_pairs(folder, tokenizer):
    parts = [{"source": "files", "train": str(folder / "pairs.tsv"), "text": [name]} for name in COLUMNS]
    settings = section(folder, prompts=("read ", "a node ")).model_dump() | {"train": parts}
    found = load(Section(**settings), "embedding", tokenizer)
    assert isinstance(found.dev, TextPairs) and not any(isinstance(p, TextPairs) for p in found.train.parts)
    batch = collate(found.train, [0, 5], 0)
    assert batch.pair is None and batch.index.tolist() == [0, 5]
    assert texts(batch, tokenizer) == ["read " + ROWS[0][0], "a node the sum of a"]  # 8 tokens


def test_a_single_text_whose_column_has_no_prompt_is_refused(folder, tokenizer):
    """When the config is checked, the prompts that a sentence encoder's folder brings are not known yet."""
    part = {"source": "files", "train": str(folder / "pairs.tsv"), "text": ["score"]}
    settings = section(folder, prompts=("read ", "a node ")).model_dump() | {"train": [part]}
    with pytest.raises(UserError, match=r"data\.train: got text: \[score\]"):
        load(Section(**settings), "embedding", tokenizer)
    plain = load(Section(**settings | {"prompts": ("", "")}), "embedding", tokenizer).train
    assert len(plain) == len(ROWS)


def test_judged_pairs_have_a_score_in_the_dev_set_alone(folder, tokenizer):
    found = load(section(folder, label="score"), "embedding", tokenizer)
    assert found.dev.labels.tolist() == [0, 0.25, 0.5, 0.75, 1] and found.train.labels.isnan().all()
    batch = collate(found.dev, [2, 1], 0)
    assert batch.labels.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert found.labels == ()


def test_each_text_is_evaluated_once_and_comes_back_in_order(folder, tokenizer):
    train = load(section(folder), "embedding", tokenizer).train
    batches = [batch for rank in range(2) for batch in evaluation_batches(train, 2, 2, rank, 0)]
    index = torch.cat([batch.index for batch in batches])
    assert restore(index.double(), index).tolist() == list(range(10))
    lengths = torch.cat([batch.mask.sum(1) for batch in batches])
    assert restore(lengths, index).tolist() == train.texts.lengths.tolist()


def test_ranks_and_micro_batches_share_pairs_whole(folder, tokenizer):
    train = load(section(folder), "embedding", tokenizer).train
    seen = []
    for rank in range(2):
        loader = Loader(train, 4, 1, 2, rank, seed=0, pad_id=0)
        assert loader.steps_per_epoch == 2
        for step in range(2):
            for batch in loader.step(0, step):
                assert batch.pair.tolist() in ([0, 0], [-1])
                seen += batch.index[batch.index >= 0].tolist()
    assert sorted(seen) == list(range(10))


def test_sources_of_pairs_are_drawn_together(folder, tokenizer):
    (folder / "other.tsv").write_text("text_a\ttext_b\na list\ta file\na line\ta graph\n")
    parts = ({"train": str(folder / "pairs.tsv")}, {"train": str(folder / "other.tsv"), "weight": 2.0})
    train = load(
        section(folder).model_copy(update={"train": Section(train=parts).train}), "embedding", tokenizer
    ).train
    batch = collate(train, [5, 0], 0)
    assert texts(batch, tokenizer) == ["a list", "a file", *ROWS[0]]
    assert batch.source.tolist() == [1, 1, 0, 0] and batch.index.tolist() == [10, 11, 0, 1]


def test_random_masking_hides_of_each_text(folder, tokenizer):
    train = load(section(folder, sampler="random_masked"), "embedding", tokenizer).train
    plain = collate(train.unmasked(), list(range(5)), 0)
    drawn = [collate(train, list(range(5)), 0, epoch).input_ids for epoch in range(20)]
    assert any(not torch.equal(ids, plain.input_ids) for ids in drawn)
    assert all(np.array_equal(ids == 0, plain.input_ids == 0) for ids in drawn)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("query\tdocument\na\t\n", {}, "line 2: got an empty second text of a pair"),
        ("query\tdocument\n \tb\n", {}, "line 2: got an empty first text of a pair"),
        ("query\ttext\na\tb\n", {}, "no column 'document'"),
        ("query\tdocument\tscore\na\tb\tc\n", {"label": "score"}, "label 'c' in column score"),
        ("query\tdocument\na\tb\n", {"label": "score"}, "no column 'score'"),
        ("query\tdocument\na\tb\n", {"max_length": 2}, "data.max_length: got 2, expected above 2"),
    ],
)
def test_bad_rows(tmp_path, tokenizer, content, changes, message):
    (tmp_path / "bad.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        load(section(tmp_path, "bad.tsv", **changes), "embedding", tokenizer)
