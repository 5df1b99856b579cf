"""Score written texts against their references: BLEU, ROUGE and the character error rate.

Each is computed by the library that publications use (sacrebleu, rouge-score, jiwer);
`pip install dsdistill[generation]` installs them, and nothing else here needs them.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from dsdistill.config import UserError

PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jiwer": "jiwer"}

# Words of letters and digits in any script; each Chinese, Japanese or Korean character is one word.
_EAST = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+")

# Scripts without spaces between words. Thai, Lao, Tibetan, Burmese and Khmer have marks that are not letters.
_SCRIPTS = {
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "marked": "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff",
}
_UNSPACED = "".join(_SCRIPTS.values())
_PIECE = re.compile(
    "|".join(
        [
            *(f"(?P<{name}>[{range_}])" for name, range_ in _SCRIPTS.items()),
            rf"(?P<spaced>[^\W_{_UNSPACED}]+)",
        ]
    )
)
_KANA = 0.05  # share of kana: Japanese text has far more, Chinese text almost none


class Words:
    """Words is a tokenizer for rouge-score. rouge-score's own knows only the letters a to z; both agree for English."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return _WORD.findall(text.lower())


def check_packages() -> None:
    """Raise UserError naming what to install."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            "evaluation.generate",
            f"no package {' and no '.join(missing)}",
            f"pip install {' '.join(missing)}",
        )


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the scores of n texts against one reference each.

    Returns:
        bleu: of the corpus, 0 to 100, with the tokenizer of `bleu_tokenizer`; rouge_1, rouge_2, rouge_l: mean F1, 0 to
        1, without stemming; cer: edits of all texts (substituted, deleted and inserted characters) divided by the
        characters of all references, which may exceed 1. Two texts without a word have a ROUGE of 1 if they are equal,
        such as two blank ones.
    """
    import jiwer
    from rouge_score.rouge_scorer import RougeScorer

    written, references = list(written), list(references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    rouge = [_rouge(scorer, reference, text) for reference, text in zip(references, written, strict=True)]
    edits = jiwer.process_characters(references, written)
    characters = edits.hits + edits.substitutions + edits.deletions
    return {
        "bleu": _bleu(references).corpus_score(written, [references]).score,
        **{
            name: fmean(scores[key] for scores in rouge)
            for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
        },
        "cer": (edits.substitutions + edits.deletions + edits.insertions) / max(1, characters),
    }


def bleu_signature(references: Sequence[str]) -> str:
    """Return the signature that sacreBLEU asks publications to print with the BLEU of `text_scores`."""
    metric = _bleu(references)
    metric.corpus_score([""], [[""]])  # the signature's number of references comes from a score
    return str(metric.get_signature())


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Return the name of sacreBLEU's tokenizer for texts like these.

    It is sacreBLEU's default, 13a, unless most words are of a script without spaces, whose characters count as a word
    each: then zh for Chinese, ja-mecab for Japanese if its packages are installed (else char), and char for others,
    such as Thai.
    """
    found = Counter(match.lastgroup for text in references for match in _PIECE.finditer(text))
    unspaced = found["han"] + found["kana"] + found["marked"]
    if unspaced <= found["spaced"]:
        return "13a"
    if found["marked"] > found["han"] + found["kana"]:
        return "char"
    if found["kana"] <= _KANA * unspaced:
        return "zh"
    installed = all(importlib.util.find_spec(module) is not None for module in ("MeCab", "ipadic"))
    return "ja-mecab" if installed else "char"


def _bleu(references: Sequence[str]):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=bleu_tokenizer(references))


def _rouge(scorer, reference: str, text: str) -> dict[str, float]:
    if not Words.tokenize(reference) and not Words.tokenize(text):
        return dict.fromkeys(scorer.rouge_types, float(reference.split() == text.split()))
    return {key: score.fmeasure for key, score in scorer.score(reference, text).items()}
