"""How good the models are on the dev set: the task's metrics and the distance to the teacher."""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dsdistill.data import Batch, restore
from dsdistill.evaluation import metrics
from dsdistill.models.trace import Trace

Gather = Callable[[Any], list]


class _Clock:
    """Seconds of one model's forward passes."""

    def __init__(self):
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self):
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started


def evaluate(
    student: Callable[[Batch, Trace | None], Tensor],
    teacher: Callable[[Batch], contextlib.AbstractContextManager[Trace]] | None,
    teacher_sums: Callable[[Trace, Batch], Tensor] | None,
    batches: Iterable[Batch],
    *,
    task: str,
    gather: Gather,
) -> dict[str, dict[str, float]]:
    """Metrics of the student and, with one, of the teacher; the same on every rank.

    Args:
        student: of a batch and the teacher's trace: (B, C) logits, or for causal_lm the sums of the evaluation
            objective (next-token loss; with a teacher also its KL to the student).
        teacher: makes the teacher's trace of a batch.
        teacher_sums: for causal_lm: the teacher's own next-token loss, (1,).
        batches: this rank's share; every rank has equally many.
        task: classification, regression or causal_lm.
        gather: one object of each rank → all of them, on every rank.

    Returns:
        {"student": {...}, "teacher": {...}}: accuracy and macro_f1, pearson and spearman, or perplexity; kl (mean
        KL(teacher‖student), nats, an example or token); tokens_per_second of the forward passes.
    """
    parts, clocks, tokens = [], {"student": _Clock(), "teacher": _Clock()}, 0
    for batch in batches:
        tokens += int(batch.mask.sum())
        with contextlib.ExitStack() as stack:
            with clocks["teacher"].running():
                trace = stack.enter_context(teacher(batch)) if teacher is not None else None
            with clocks["student"].running():
                mine = student(batch, trace)
            part = {
                "student": mine.detach().float().cpu(),
                "labels": batch.labels.cpu(),
                "index": batch.index.cpu(),
            }
            if trace is not None:
                other = teacher_sums(trace, batch) if task == "causal_lm" else trace.logits
                part["teacher"] = other.detach().float().cpu()
            if task == "causal_lm":
                part["count"] = int(((batch.labels[:, 1:] >= 0) & batch.mask[:, 1:]).sum())
            parts.append(part)
    everyone = gather((parts, {name: clock.seconds for name, clock in clocks.items()}, tokens))
    parts = [part for rank_parts, _, _ in everyone for part in rank_parts]
    scores = _language(parts) if task == "causal_lm" else _labelled(parts, task)
    all_tokens = sum(count for _, _, count in everyone)
    for name, found in scores.items():
        found["tokens_per_second"] = round(all_tokens / max(seconds[name] for _, seconds, _ in everyone), 1)
    return scores


def _labelled(parts: list[dict], task: str) -> dict[str, dict[str, float]]:
    index = torch.cat([part["index"] for part in parts])
    labels = restore(torch.cat([part["labels"] for part in parts]), index)
    outputs = {
        name: restore(torch.cat([part[name] for part in parts]), index)
        for name in ("student", "teacher")
        if name in parts[0]
    }
    scores = {}
    for name, output in outputs.items():
        if task == "regression":
            predicted = output[:, 0]
            scores[name] = {
                "pearson": metrics.pearson(predicted, labels),
                "spearman": metrics.spearman(predicted, labels),
            }
            continue
        predicted = output.argmax(-1)
        scores[name] = {
            "accuracy": metrics.accuracy(predicted, labels),
            "macro_f1": metrics.macro_f1(predicted, labels),
        }
        if "teacher" in outputs:
            scores[name]["kl"] = metrics.kl(outputs["teacher"], output)
    return scores


def _language(parts: list[dict]) -> dict[str, dict[str, float]]:
    count = sum(part["count"] for part in parts)
    student = sum(part["student"].double() for part in parts)
    scores = {"student": {"perplexity": metrics.perplexity(float(student[0]), count)}}
    if "teacher" in parts[0]:
        teacher = sum(part["teacher"].double() for part in parts)
        scores["student"]["kl"] = float(student[1]) / count
        scores["teacher"] = {"perplexity": metrics.perplexity(float(teacher[0]), count), "kl": 0.0}
    return scores
