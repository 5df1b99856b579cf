"""Show the results of a run as text."""

import re
import sys
from collections.abc import Iterable
from typing import Any

# Column titles of scores, in the order of the table; any other score keeps its own name.
TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "mcc": "MCC",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "recall_1": "recall@1",
    "recall_10": "recall@10",
    "mrr_10": "MRR@10",
    "ndcg_10": "nDCG@10",
    "teacher_pearson": "Pearson to teacher",
    "teacher_spearman": "Spearman to teacher",
    "distance": "distance to teacher",
    "perplexity": "perplexity",
    "bleu": "BLEU",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "cer": "CER",
    "agreement": "agreement",
    "loss": "dev loss",
    "kl": "KL to teacher",
    "rcs": "RCS",
    "cka_distance": "1 - CKA",
    "semantic_alignment": "semantic alignment",
    "representation_compactness": "compactness",
    "structural_consistency": "structural consistency",
    "domain_capture": "domain capture",
    "latency_ms": "latency ms",
    "token_accuracy": "token accuracy",
    "decoder_accuracy": "token accuracy (light decoder)",
    "token_ms": "tokens ms",
    "decoder_ms": "tokens ms (light decoder)",
    "parameters": "parameters",
    "texts_per_second": "sentences/s",
    "tokens_per_second": "tokens/s",
    "training_tokens_per_second": "training tokens/s",
}
START = "start: the student before its first step"
_PARTS = {"erank", "participation_ratio", "C", "R"}
MODELS = ("teacher", "start", "student", "baseline")


def table(summary: dict[str, Any]) -> str:
    """Return a table of a run's models: one per line, or one per column if lines would exceed 100 characters.

    Args:
        summary: content of summary.json: `models` (those of MODELS: name of a score → number; any may be absent)
            and, if known, name, task, data (what else was scored), steps, world_size, seconds, peak_memory_mib (of a
            rank), positive_class (the class whose F1 is scored) and bleu_signature.
    """
    models = {name: summary["models"][name] for name in MODELS if name in summary["models"]}
    scores = in_order(score for of in models.values() for score in of)
    rows = [["", *map(title, scores)]]
    rows += [[name, *(shown(score, has.get(score)) for score in scores)] for name, has in models.items()]
    lines = aligned(turned(rows))
    told = notes(summary, set(map(metric, scores)), models)
    return "\n".join([" | ".join(facts(summary)), "", *lines, *(["", *told] if told else [])])


def turned(rows: list[list[str]]) -> list[list[str]]:
    """Return a table as it is, or transposed if its lines would exceed 100 characters."""
    if sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) > 102:
        return list(map(list, zip(*rows, strict=True)))
    return rows


def aligned(rows: list[list[str]]) -> list[str]:
    """Return the lines of a table whose first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def metric(score: str) -> str:
    """Return a score's name without its dev set: `accuracy` for `matched/accuracy`."""
    return score.rpartition("/")[2]


def title(score: str) -> str:
    """Return the name of a score in tables and plots."""
    named, _, measured = score.rpartition("/")
    base, width = _length(measured)
    found = TITLES.get(base, base) + (f", {width} values" if width else "")
    return f"{found} ({named})" if named else found


def in_order(scores: Iterable[str]) -> list[str]:
    """Return the scores that tables show, each once, as TITLES lists them; others come last."""
    places = {score: place for place, score in enumerate(TITLES)}
    kept = {score for score in scores if not detail(score)}

    def key(score: str) -> tuple[int, str, int, str]:
        base, width = _length(metric(score))
        return places.get(base, len(places)), base, -width if width else -sys.maxsize, score

    return sorted(kept, key=key)


def _length(measured: str) -> tuple[str, int]:
    """Return recall_10 and 128 for recall_10_of_128, a score of vectors' first 128 values; 0 means all values."""
    found = re.fullmatch(r"(.+)_of_(\d+)", measured)
    return (found[1], int(found[2])) if found else (measured, 0)


def detail(score: str) -> bool:
    """Return whether a score is only in the file, not in tables: interval ends and parts of other scores."""
    score = metric(score)
    return score.endswith(("_low", "_high")) or score.startswith("rho_") or score in _PARTS


def facts(summary: dict[str, Any]) -> list[str]:
    """Return name, task, steps, ranks, duration and memory of a run, those that its summary has."""
    found = [summary.get("name", "run"), summary.get("task"), summary.get("data")]
    if "steps" in summary:
        ranks = summary.get("world_size", 1)
        found.append(f"{summary['steps']} steps on {ranks} process{'es' * (ranks > 1)}")
    if "seconds" in summary:
        found.append(_duration(summary["seconds"]))
    if "peak_memory_mib" in summary:
        found.append(f"at most {summary['peak_memory_mib']:,} MiB per process")
    return [fact for fact in found if fact]


def notes(summary: dict[str, Any], found: set[str], models: Iterable[str] = ()) -> list[str]:
    """Return a line on the meaning of each score in a table.

    found: the scores' names (`metric`). models: the table's models.
    """
    told = [START] if "start" in models else []
    if "f1" in found and "positive_class" in summary:
        told.append(f"F1 is that of class {summary['positive_class']}")
    if "kl" in found:
        unit = "token" if summary.get("task") in ("causal_lm", "masked_lm") else "example"
        told.append(f"KL(teacher || model): nats, mean over the dev set's {unit}s")
    if "recall_1" in found:
        told.append(
            "recall, MRR, nDCG: from the rank of each query's document among all documents of the dev set"
        )
    if any(_length(score)[1] for score in found):
        told.append("N values: scores of the first N values of each vector (Matryoshka), normalised again")
    if "teacher_spearman" in found:
        told.append(
            "to teacher: correlation of the student's cosines between texts with the teacher's; distance: mean of "
            "1 - cosine of both models' vectors of a text"
        )
    if "rcs" in found:
        told.append(
            "RCS: how much the representations changed in training, 0 to 1; a model that does not train has 0"
        )
    if "bleu" in found:
        told.append(
            "BLEU (0 to 100), ROUGE (F1) and CER (edits per character): scores of the texts that follow the prompts"
        )
        told.append(f"BLEU: {summary.get('bleu_signature', 'by sacreBLEU')}")
    if "decoder_accuracy" in found:
        told.append(
            "token accuracy: share of the hidden tokens that are found, by the head or by the light decoder from the "
            "aggregated vector; tokens ms: median time of one example, from its tokens to those predicted"
        )
    if "latency_ms" in found:
        told.append("latency: median time of a single example, on one process")
    if "tokens_per_second" in found:
        units = "tokens/s, sentences/s" if "texts_per_second" in found else "tokens/s"
        told.append(f"{units}: speed of forward passes on the dev set, with all processes")
    return told


def shown(score: str, value: float | None) -> str:
    """Return a score's value as tables show it."""
    if value is None:
        return "-"
    score = metric(score)
    if score == "parameters":
        return _count(value)
    if score.endswith("_per_second"):
        return f"{value:,.0f}"
    if score == "bleu":
        return f"{value:.2f}"
    if score in ("kl", "perplexity"):
        return f"{value:.4g}"
    if score == "latency_ms":
        return f"{value:.2f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
