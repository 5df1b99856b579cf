"""How near written texts come to their references: BLEU, ROUGE and the character error rate.

Each by the library that publications use (sacrebleu, rouge-score, jiwer), which `pip install dsdistill[generation]`
brings; nothing else of ours needs them.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from dsdistill.config import UserError

PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jiwer": "jiwer"}

# Words of letters and digits in any script; Chinese, Japanese and Korean characters one by one, as they have no spaces.
_EAST = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+")

# Scripts that put no spaces between words. Thai, Lao, Tibetan, Burmese and Khmer have marks that are no letters.
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
_KANA = 0.05  # of the characters of Japanese text many more are kana, of Chinese text hardly any


class Words:
    """What rouge-score counts; its own tokenizer, equal for English, knows no other letters than a to z."""

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
    """Scores of n texts against one reference each.

    Returns:
        bleu: of the corpus, 0 to 100, its words as `bleu_tokenizer` says; rouge_1, rouge_2, rouge_l: mean F1, 0 to 1,
        without stemming; cer: edits of all texts (substituted, deleted and inserted characters) over characters of all
        references, which may pass 1. Two texts without a word have a ROUGE of 1 where they are equal, such as two
        blank ones.
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
    """Return what sacreBLEU asks publications to print beside the BLEU of `text_scores` against these references."""
    metric = _bleu(references)
    metric.corpus_score([""], [[""]])  # it learns the number of references from a score
    return str(metric.get_signature())


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Return the name of sacreBLEU's tokenizer for texts like these.

    Where most words are of a script without spaces, each of its characters counted as one: zh for Chinese, ja-mecab for
    Japanese where its packages are installed, char for others such as Thai; else sacreBLEU's default, 13a.
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
