"""Words and phrases are runs of tokens: offsets, packing, batches, chunkers and what these lack."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import Words, collate, load_data
from dsdistill.data.batch import PHRASE, WORD
from dsdistill.data.chunkers import _outermost, builtin, chunker, parsed
from dsdistill.data.spans import MOST, found_chunks, limited, token_spans
from tests.data.rig import load, made, tokenize


def words(line):
    found, phrases = builtin(line)
    return [line[a:b] for a, b in found], [line[a:b] for a, b in phrases]


class TestBuiltin:
    def test_words_and_phrases(self):
        found, phrases = words("The quick fox didn't jump over a well-known lazy dog, cat and 3 mice.")
        assert found == "The quick fox didn't jump over a well-known lazy dog cat and 3 mice".split()
        assert phrases == ["quick fox didn't jump", "well-known lazy dog", "cat", "3 mice"]

    def test_ideographs_are_words_of_their_own(self):
        found, phrases = words("血压高的病人,吃 aspirin")
        assert found == [*"血压高的病人吃", "aspirin"] and phrases == ["血压高", "病人", "吃 aspirin"]

    def test_long_runs_are_cut(self):
        assert [len(phrase.split()) for phrase in words("word " * 30)[1]] == [12, 12, 6]

    @pytest.mark.parametrize("line", ["", "...", "the of", " \t"])
    def test_nothing_to_find(self, line):
        assert words(line)[1] == []


class TestTokenSpans:
    def test_overlap(self):
        """The tokens are ab, c, an empty one, de and f; spans cover whole tokens, parts of them, and truncated text."""
        offsets = torch.tensor([[0, 0], [0, 2], [2, 3], [0, 0], [4, 6], [6, 7], [0, 0]]).numpy()
        found = token_spans(offsets, ([(0, 3), (4, 5), (5, 9), (8, 12)], [(1, 5), (3, 4)]))
        assert found.tolist() == [[1, 3, WORD], [4, 5, WORD], [4, 6, WORD], [1, 5, PHRASE]]

    def test_nothing(self):
        offsets = torch.zeros(3, 2, dtype=torch.int64).numpy()
        assert token_spans(offsets, ([(0, 1)], [])).shape == (0, 3)

    def test_parts(self):
        """An example has the spans that lie entirely in it, counted from its first token; others are left out."""
        spans = [(0, 2, 0), (3, 5, 0), (4, 8, 1), (8, 10, 1), (9, 11, 0), (5, 6, 0)]
        whole = made([list(range(12))], spans=[spans])
        parts = replace(whole, starts=torch.tensor([0, 4, 8]), lengths=torch.tensor([4, 4, 2]))
        assert [parts.spans(row).tolist() for row in range(3)] == [
            [[0, 2, 0]],
            [[1, 2, 0], [0, 4, 1]],
            [[0, 2, 1]],
        ]

    def test_at_most_so_many_of_a_kind(self):
        table = torch.tensor([[i, i + 1, i % 2] for i in range(3 * MOST)]).numpy()
        kept = limited(table)
        assert [int((kept[:, 2] == kind).sum()) for kind in (WORD, PHRASE)] == [MOST, MOST]
        assert kept[0].tolist() == [0, 1, WORD] and kept[MOST].tolist() == [1, 2, PHRASE]


def read(examples, tokenizer, row, kind):
    """Return the tokens of an example's spans, joined."""
    tokens = examples.tokens(row).tolist()
    return [
        "".join(tokenizer.convert_ids_to_tokens(tokens[first:past]))
        for first, past, of in examples.spans(row).tolist()
        if of == kind
    ]


class TestExamples:
    """The tokenizer of these tests makes every letter a token and drops spaces."""

    def test_pairs(self, tokenizer):
        texts, labels = [("big cat", "the dog"), ("a", "of it")], [0, 1]
        examples = tokenize(texts, tokenizer, 20, "classification", labels, chunk=builtin)
        assert read(examples, tokenizer, 0, WORD) == ["big", "cat", "the", "dog"]
        assert read(examples, tokenizer, 0, PHRASE) == ["bigcat", "dog"]
        assert read(examples, tokenizer, 1, WORD) == ["a", "of", "it"]
        assert read(examples, tokenizer, 1, PHRASE) == []
        assert tokenize(texts, tokenizer, 20, "classification", labels).documents.spans is None

    def test_truncated(self, tokenizer):
        examples = tokenize(["big cat sat"], tokenizer, 6, "classification", [0], chunk=builtin)
        assert read(examples, tokenizer, 0, WORD) == ["big", "c"]

    def test_packed(self, tokenizer):
        """The blocks are bigc | at⏎d | ogs[SEP] | oxy, so that 'cat' and 'dogs' are cut and dropped."""
        examples = tokenize(["big cat\ndogs", "ox y"], tokenizer, 4, "causal_lm", chunk=builtin)
        found = [read(examples, tokenizer, row, WORD) for row in range(len(examples))]
        assert found == [["big"], [], [], ["ox", "y"]]
        assert [read(examples, tokenizer, row, PHRASE) for row in range(4)] == [[], [], [], ["oxy"]]

    def test_a_share_of_the_examples_keeps_its_own(self, tokenizer):
        texts, labels = ["big cat", "a dog", "ox"], [0, 1, 0]
        examples = tokenize(texts, tokenizer, 20, "classification", labels, chunk=builtin)
        part = examples.take([2, 0])
        assert read(part, tokenizer, 0, WORD) == ["ox"] and read(part, tokenizer, 1, WORD) == ["big", "cat"]

    def test_batches(self, tokenizer):
        texts, labels = ["big cat", "of", "ox"], [0, 1, 0]
        examples = tokenize(texts, tokenizer, 20, "classification", labels, chunk=builtin)
        batch = collate(examples, [2, 1, 0], 0)
        assert batch.spans.tolist() == [
            [0, 1, 3, WORD],
            [0, 1, 3, PHRASE],
            [1, 1, 3, WORD],
            [2, 1, 4, WORD],
            [2, 4, 7, WORD],
            [2, 1, 7, PHRASE],
        ]
        assert batch.to("meta").spans.device.type == "meta"
        assert collate(examples, [], 0).spans.shape == (0, 4)
        plain = tokenize(texts, tokenizer, 20, "classification", labels)
        assert collate(plain, [0], 0).spans is None and collate(plain, [], 0).spans is None

    def test_a_slow_tokenizer_is_refused(self):
        slow = types.SimpleNamespace(is_fast=False)
        with pytest.raises(UserError, match=r"^data.tokenizer: got a tokenizer without token offsets"):
            load_data(Section(), "classification", Words(slow, 0, ""), with_spans=True)

    def test_load(self, tokenizer, tmp_path):
        path = tmp_path / "rows.tsv"
        path.write_text("text\tlabel\nbig cat\tx\nthe dog\ty\n", encoding="utf-8")
        section = Section(source="files", train=str(path), dev=str(path), cache=str(tmp_path / "cache"))
        data = load(section, "classification", tokenizer, with_spans=True)
        assert read(data.dev, tokenizer, 1, WORD) == ["the", "dog"]
        assert load(section, "classification", tokenizer).train.documents.spans is None


def test_chunkers_see_a_line_at_a_time():
    seen = []

    def watch(line):
        seen.append(line)
        return builtin(line)

    assert list(found_chunks(["big cat\nof dogs"], watch)) == [
        ([(0, 3), (4, 7), (8, 10), (11, 15)], [(0, 7), (11, 15)])
    ]
    assert seen == ["big cat", "of dogs"]


class TestWhatIsMissing:
    @pytest.mark.parametrize("name", ["spacy", "jieba"])
    def test_package(self, name, monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UserError, match=f"^data.chunker: got {name}, which is not installed, expected pip"
        ):
            chunker(name)

    def test_spacy_model(self, monkeypatch):
        def fail(name, **options):
            raise OSError(f"[E050] Can't find model '{name}'.")

        monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=fail))
        with pytest.raises(
            UserError, match="got spacy without its model en_core_web_sm, expected python -m spacy"
        ):
            chunker("spacy")


def test_jieba(monkeypatch):
    """Tags decide which words are content words; offsets follow from the words."""
    tagged = [("高血压", "n"), ("患者", "n"), ("的", "uj"), ("血压", "n"), (",", "x"), ("升高", "v")]
    pairs = [types.SimpleNamespace(word=word, flag=flag) for word, flag in tagged]
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(setLogLevel=lambda level: None))
    monkeypatch.setitem(sys.modules, "jieba.posseg", types.SimpleNamespace(cut=lambda line: pairs))
    line = "".join(word for word, _ in tagged)
    found, phrases = chunker("jieba")(line)
    assert [line[a:b] for a, b in found] == ["高血压", "患者", "的", "血压", "升高"]
    assert [line[a:b] for a, b in phrases] == ["高血压患者", "血压", "升高"]


class Token:
    """Token has what parsed() reads from a spaCy token."""

    def __init__(self, i, idx, text, pos, dep):
        self.i, self.idx, self.text, self.pos_, self.dep_ = i, idx, text, pos, dep
        self.is_punct, self.is_space, self.children = pos == "PUNCT", False, []

    def __len__(self):
        return len(self.text)

    @property
    def lefts(self):
        return [child for child in self.children if child.i < self.i]

    @property
    def rights(self):
        return [child for child in self.children if child.i > self.i]

    @property
    def subtree(self):
        return [self, *(token for child in self.children for token in child.subtree)]


def test_parsed_phrases():
    """Old dogs do not chase the cat . — one noun phrase stays, the other lies in the verb phrase."""
    given = [
        ("Old", "ADJ", "amod", 1),
        ("dogs", "NOUN", "nsubj", 4),
        ("do", "AUX", "aux", 4),
        ("not", "PART", "neg", 4),
        ("chase", "VERB", "ROOT", 4),
        ("the", "DET", "det", 6),
        ("cat", "NOUN", "dobj", 4),
        (".", "PUNCT", "punct", 4),
    ]
    line, tokens = "", []
    for i, (text, pos, dep, _) in enumerate(given):
        tokens.append(Token(i, len(line), text, pos, dep))
        line += text + " "
    for token, (*_, head) in zip(tokens, given, strict=True):
        if tokens[head] is not token:
            tokens[head].children.append(token)

    class Doc(list):
        noun_chunks = tuple(
            types.SimpleNamespace(start_char=line.index(text), end_char=line.index(text) + len(text))
            for text in ("Old dogs", "the cat")
        )

    found, phrases = parsed(Doc(tokens))
    assert [line[a:b] for a, b in found] == line.split()[:-1]
    assert [line[a:b] for a, b in phrases] == ["Old dogs", "do not chase the cat"]


def test_outermost():
    assert _outermost([(3, 5), (0, 4), (0, 2), (3, 9), (10, 12), (10, 12)]) == [(0, 4), (3, 9), (10, 12)]
