"""Scores of written texts: by hand, and against their own libraries' defaults."""

import importlib.util
import math
import sys

import pytest

from dsdistill.config import UserError
from dsdistill.evaluation.text import Words, bleu_signature, bleu_tokenizer, check_packages, text_scores


def test_by_hand():
    found = text_scores(["the cat sat", "a dog"], ["the cat lay down", "a dog"])
    # Words in common 2 of 3 and 4: F1 4/7; pairs 1 of 2 and 3: 2/5; longest common run "the cat"; the second is right.
    assert found["rouge_1"] == pytest.approx((4 / 7 + 1) / 2)
    assert found["rouge_2"] == pytest.approx((2 / 5 + 1) / 2)
    assert found["rouge_l"] == pytest.approx((4 / 7 + 1) / 2)
    # "sat" into "lay down": s→l, t→y, then " down" put in: 7 edits over 16 + 5 characters.
    assert found["cer"] == pytest.approx(7 / 21)


def test_bleu_by_hand():
    """Matches of 1 to 4 words 5/6, 3/5, 2/4, 1/3; one word fewer than the reference: the brevity penalty."""
    found = text_scores(["a b c d x e"], ["a b c d e f g"])["bleu"]
    expected = 100 * math.exp(1 - 7 / 6) * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert found == pytest.approx(expected)
    assert text_scores(["a b c d e"], ["a b c d e"])["bleu"] == pytest.approx(100)
    signature = bleu_signature(["a b c d e"])
    assert "tok:13a" in signature and "nrefs:1" in signature


def test_bleu_of_chinese_counts_characters():
    """Nine characters of ten alike, the sixth is not: runs of 1 to 4 match 9/10, 7/9, 5/8 and 3/7."""
    written, references = ["他昨天去了学校上课。"], ["他昨天去了书校上课。"]
    found = text_scores(written, references)["bleu"]
    assert found == pytest.approx(100 * (9 / 10 * 7 / 9 * 5 / 8 * 3 / 7) ** 0.25)
    assert "tok:zh" in bleu_signature(references)


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        (["Der Hund schläft."], "13a"),
        (["한국어 문장은 띄어 쓴다"], "13a"),
        ([""], "13a"),
        (["他去学校。", "the cat"], "zh"),  # five characters, two words
        (["他去 school every single day with me"], "13a"),
        (["これは日本語の文です。"], "char"),
        (["東京都の人口"], "char"),
        (["สวัสดีครับ"], "char"),
        (["ភាសាខ្មែរ"], "char"),
        (["မြန်မာဘာသာ"], "char"),
    ],
)
def test_tokenizer_of_bleu(references, expected, monkeypatch):
    find = importlib.util.find_spec
    missing = {"MeCab", "ipadic"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    assert bleu_tokenizer(references) == expected
    assert f"tok:{expected}" in bleu_signature(references)
    assert text_scores(references, references)["cer"] == 0


def test_japanese_by_its_words_where_they_can_be_found(monkeypatch):
    found = {"MeCab", "ipadic"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in found else None)
    assert bleu_tokenizer(["これは日本語の文です。"]) == "ja-mecab"
    assert bleu_tokenizer(["他去学校。"]) == "zh"


def test_texts_without_a_word():
    blank = text_scores(["", " \n", "..."], ["", "", "..."])
    assert all(blank[name] == 1 for name in ("rouge_1", "rouge_2", "rouge_l")) and blank["cer"] <= 1
    assert text_scores(["?", "", "word"], ["!", "word", ""])["rouge_l"] == 0


def test_nothing_written_and_too_much():
    found = text_scores(["", "abcd"], ["ab", "b"])
    assert found["rouge_l"] == 0 and found["cer"] == pytest.approx((2 + 3) / 3)
    assert text_scores(["aaaa"], ["b"])["cer"] == 4


def test_words_are_those_of_rouge_score_in_english_and_whole_elsewhere():
    from rouge_score.tokenizers import DefaultTokenizer

    for text in ("The cat's 2nd nap, at 10:30 -- ok?", "A", "", "..."):
        assert Words.tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)
    assert Words.tokenize("Ein schönes Mädchen") == ["ein", "schönes", "mädchen"]
    assert Words.tokenize("头痛吃药 CT") == ["头", "痛", "吃", "药", "ct"]


def test_missing_packages_are_named(monkeypatch):
    check_packages()
    for module in ("rouge_score", "jiwer"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="no package rouge-score and no jiwer, expected pip install"):
        check_packages()
