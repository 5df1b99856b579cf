"""Words and phrases as runs of tokens: offsets, packing, batches, chunkers and what they lack."""

import sys
import types

import pytest
import torch

from dsdistill.config.errors import UserError
from dsdistill.config.schema import Data as Section
from dsdistill.data import load_data, tokenize
from dsdistill.data import spans as module
from dsdistill.data.batch import PHRASE, WORD
from dsdistill.data.chunkers import _outermost, builtin, chunker, parsed
from dsdistill.data.loader import collate
from dsdistill.data.sample import draw
from dsdistill.data.spans import MOST, chunks, in_blocks, pack, token_spans
from tests.data.test_tokenize import rows


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
        """Tokens ab c (nothing) de f; spans of whole tokens, parts of them, and of what was truncated."""
        offsets = torch.tensor([[0, 0], [0, 2], [2, 3], [0, 0], [4, 6], [6, 7], [0, 0]]).numpy()
        found = token_spans(offsets, ([(0, 3), (4, 5), (5, 9), (8, 12)], [(1, 5), (3, 4)]))
        assert found.tolist() == [[1, 3, WORD], [4, 5, WORD], [4, 6, WORD], [1, 5, PHRASE]]

    def test_nothing(self):
        offsets = torch.zeros(3, 2, dtype=torch.int64).numpy()
        assert token_spans(offsets, ([(0, 1)], [])).shape == (0, 3)

    def test_blocks(self):
        """Of 4, 4 and 2 tokens; what a block's end cuts is dropped, and so is what lies past the last."""
        table = torch.tensor(
            [[0, 2, 0], [3, 5, 0], [4, 8, 1], [8, 10, 1], [9, 11, 0], [10, 12, 0], [5, 6, 0]]
        )
        found = in_blocks(table.numpy(), [0, 4, 8, 10])
        assert [block.tolist() for block in found] == [[[0, 2, 0]], [[0, 4, 1], [1, 2, 0]], [[0, 2, 1]]]

    def test_at_most_so_many_of_a_kind(self):
        table = torch.tensor([[i, i + 1, i % 2] for i in range(3 * MOST)]).numpy()
        kept = pack([table]).of(0)
        assert [int((kept[:, 2] == kind).sum()) for kind in (WORD, PHRASE)] == [MOST, MOST]
        assert kept[0].tolist() == [0, 1, WORD] and kept[MOST].tolist() == [1, 2, PHRASE]


def find(texts, ids):
    return [builtin(text) for text in texts]


def read(examples, tokenizer, row, kind):
    """The tokens of an example's spans, joined."""
    tokens = examples.tokens[examples.starts[row] : examples.starts[row + 1]].tolist()
    return [
        "".join(tokenizer.convert_ids_to_tokens(tokens[first:past]))
        for first, past, of in examples.spans.of(row).tolist()
        if of == kind
    ]


class TestExamples:
    """The tokenizer of these tests makes every letter a token and drops spaces."""

    def test_pairs(self, tokenizer):
        texts = rows(("big cat", "the dog"), ("a", "of it"), labels=[0, 1])
        examples = tokenize(texts, tokenizer, 20, "classification", find)
        assert read(examples, tokenizer, 0, WORD) == ["big", "cat", "the", "dog"]
        assert read(examples, tokenizer, 0, PHRASE) == ["bigcat", "dog"]
        assert read(examples, tokenizer, 1, WORD) == ["a", "of", "it"]
        assert read(examples, tokenizer, 1, PHRASE) == []
        assert tokenize(texts, tokenizer, 20, "classification").spans is None

    def test_truncated(self, tokenizer):
        examples = tokenize(rows("big cat sat", labels=[0]), tokenizer, 6, "classification", find)
        assert read(examples, tokenizer, 0, WORD) == ["big", "c"]

    def test_packed(self, tokenizer):
        """bigc | at⏎d | ogs[SEP] | oxy: 'cat' and 'dogs' are cut and dropped."""
        texts = rows("big cat\ndogs", "ox y")
        examples = tokenize(texts, tokenizer, 4, "causal_lm", lambda t, i: chunks_of_lines(t))
        found = [read(examples, tokenizer, row, WORD) for row in range(len(examples))]
        assert found == [["big"], [], [], ["ox", "y"]]
        assert [read(examples, tokenizer, row, PHRASE) for row in range(4)] == [[], [], [], ["oxy"]]

    def test_a_limit_reads_no_further(self, tokenizer):
        seen = []

        def watch(texts, ids):
            seen.append((list(texts), list(ids)))
            return find(texts, ids)

        tokenize(rows("abcdefghij", "klm", limit=2), tokenizer, 3, "causal_lm", watch)
        assert seen == [(["abcdef"], ["x"])]

    def test_a_share_of_the_examples_keeps_its_own(self, tokenizer):
        texts = rows("big cat", "a dog", "ox", labels=[0, 1, 0])
        examples = tokenize(texts, tokenizer, 20, "classification", find)
        part = examples.take([2, 0])
        assert read(part, tokenizer, 0, WORD) == ["ox"] and read(part, tokenizer, 1, WORD) == ["big", "cat"]
        assert draw(examples, 0.5, 0).spans.table.dtype == torch.int32

    def test_batches(self, tokenizer):
        texts = rows("big cat", "of", "ox", labels=[0, 1, 0])
        examples = tokenize(texts, tokenizer, 20, "classification", find)
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
        plain = tokenize(texts, tokenizer, 20, "classification")
        assert collate(plain, [0], 0).spans is None and collate(plain, [], 0).spans is None

    def test_a_slow_tokenizer_is_refused(self):
        slow = types.SimpleNamespace(is_fast=False)
        with pytest.raises(UserError, match=r"^data.tokenizer: got one that does not tell"):
            tokenize(rows("a", labels=[0]), slow, 9, "classification", find)

    def test_load(self, tokenizer, tmp_path):
        path = tmp_path / "rows.tsv"
        path.write_text("text\tlabel\nbig cat\tx\nthe dog\ty\n", encoding="utf-8")
        section = Section(source="files", train=str(path), dev=str(path), cache=str(tmp_path / "cache"))
        data = load_data(section, "classification", tokenizer, with_spans=True)
        assert read(data.dev, tokenizer, 1, WORD) == ["the", "dog"]
        assert len(list((tmp_path / "cache").glob("spans-*.jsonl"))) == 1  # both splits are one file
        assert load_data(section, "classification", tokenizer).train.spans is None


def chunks_of_lines(texts):
    found = []
    for text in texts:
        lines, at, both = text.split("\n"), 0, ([], [])
        for line in lines:
            for into, spans in zip(both, builtin(line), strict=True):
                into += [(a + at, b + at) for a, b in spans]
            at += len(line) + 1
        found.append(both)
    return found


class TestCache:
    def test_read_back_by_id(self, tmp_path, monkeypatch):
        texts, ids = ["big cat\nof dogs", "ox"], ["one", "two"]
        first = chunks(texts, ids, "builtin", str(tmp_path))
        assert first[0] == ([(0, 3), (4, 7), (8, 10), (11, 15)], [(0, 7), (11, 15)])
        monkeypatch.setattr(module, "chunker", lambda name: pytest.fail)
        again = chunks(texts, ids, "builtin", str(tmp_path))
        assert [tuple([tuple(s) for s in spans] for spans in of) for of in again] == first

    def test_another_text_or_chunker_is_found_anew(self, tmp_path, monkeypatch):
        chunks(["big cat"], ["one"], "builtin", str(tmp_path))
        assert chunks(["ox"], ["one"], "builtin", str(tmp_path))[0][0] == [(0, 2)]
        monkeypatch.setattr(module, "chunker", lambda name: lambda line: ([(0, 1)], []))
        assert chunks(["big cat"], ["one"], "jieba", str(tmp_path)) == [([(0, 1)], [])]


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
    """Tags decide what is content; offsets follow from the words."""
    tagged = [("高血压", "n"), ("患者", "n"), ("的", "uj"), ("血压", "n"), (",", "x"), ("升高", "v")]
    pairs = [types.SimpleNamespace(word=word, flag=flag) for word, flag in tagged]
    monkeypatch.setitem(sys.modules, "jieba", types.SimpleNamespace(setLogLevel=lambda level: None))
    monkeypatch.setitem(sys.modules, "jieba.posseg", types.SimpleNamespace(cut=lambda line: pairs))
    line = "".join(word for word, _ in tagged)
    found, phrases = chunker("jieba")(line)
    assert [line[a:b] for a, b in found] == ["高血压", "患者", "的", "血压", "升高"]
    assert [line[a:b] for a, b in phrases] == ["高血压患者", "血压", "升高"]


class Token:
    """What parsed() reads of a spaCy token."""

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
