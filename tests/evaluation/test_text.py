"""Scores of written texts: by hand, and against their own libraries' defaults."""

import math
import sys

import pytest

from dsdistill.config import UserError
from dsdistill.evaluation.text import Words, bleu_signature, check_packages, text_scores


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
    assert "tok:13a" in bleu_signature() and "nrefs:1" in bleu_signature()


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
