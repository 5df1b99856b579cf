"""How near written texts come to their references: BLEU, ROUGE and the character error rate.

Each by the library that publications use (sacrebleu, rouge-score, jiwer), which `pip install dsdistill[generation]`
brings; nothing else of ours needs them.
"""

import importlib.util
import re
from collections.abc import Sequence
from statistics import fmean

from dsdistill.config import UserError

PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score", "jiwer": "jiwer"}

# Words of letters and digits in any script; Chinese, Japanese and Korean characters one by one, as they have no spaces.
_EAST = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+")


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
        bleu: of the corpus, 0 to 100; rouge_1, rouge_2, rouge_l: mean F1, 0 to 1, without stemming; cer: edits of all
        texts (substituted, deleted and inserted characters) over characters of all references, which may pass 1.
    """
    import jiwer
    from rouge_score.rouge_scorer import RougeScorer

    written, references = list(written), list(references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    rouge = [scorer.score(reference, text) for reference, text in zip(references, written, strict=True)]
    edits = jiwer.process_characters(references, written)
    characters = edits.hits + edits.substitutions + edits.deletions
    return {
        "bleu": _bleu().corpus_score(written, [references]).score,
        **{
            name: fmean(scores[key].fmeasure for scores in rouge)
            for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
        },
        "cer": (edits.substitutions + edits.deletions + edits.insertions) / max(1, characters),
    }


def bleu_signature() -> str:
    """What sacreBLEU asks publications to print beside a score of `text_scores`."""
    metric = _bleu()
    metric.corpus_score([""], [[""]])  # it learns the number of references from a score
    return str(metric.get_signature())


def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU()
