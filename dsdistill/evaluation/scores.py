"""Score the models on the dev set: the task's metrics and the distance to the teacher."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsdistill.alignment.terms.task import targets
from dsdistill.config.schema import EMBEDDING, LANGUAGE
from dsdistill.data import Batch, restore
from dsdistill.evaluation import metrics, similarity
from dsdistill.models.trace import Trace

Gather = Callable[[Any], list]
Seen = Callable[[dict[str, Tensor], Tensor], None]


@dataclass
class Outputs:
    """Outputs are what a teacher gives for one set: the same for every student, so that one pass can serve many."""

    values: Tensor  # (n, C) logits or scores, or (n, D) vectors of texts, float32, in the set's order
    speeds: dict[str, float]  # of that pass: tokens_per_second, and texts_per_second for vectors


class _Clock:
    """A _Clock measures the time of one model's forward passes; on a GPU by events that are read once, at the end."""

    def __init__(self):
        self.passes: list[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self):
        if not torch.cuda.is_available():
            started = time.perf_counter()
            yield
            self.passes.append((started, time.perf_counter()))
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.passes.append((start, end))

    def seconds(self) -> list[float]:
        """Return the seconds of each pass; this waits for the last of them."""
        found = []
        for start, end in self.passes:
            if isinstance(start, float):
                found.append(end - start)
            else:
                end.synchronize()
                found.append(start.elapsed_time(end) / 1000)
        return found


def evaluate(
    student: Callable[[Batch, Trace | None], Tensor],
    teacher: Callable[[Batch], contextlib.AbstractContextManager[Trace]] | None,
    teacher_values: Callable[[Trace, Batch], Tensor] | None,
    batches: Iterable[Batch],
    *,
    task: str,
    gather: Gather,
    positive: int | None = None,
    seen: Seen | None = None,
    dims: Sequence[int] = (),
    known: Outputs | None = None,
    keep: Callable[[Outputs], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of the student and, if there is one, of the teacher, on every rank.

    Args:
        student: takes a batch and the teacher's trace; returns (B, C) logits, (B, D) vectors of texts, or, if tokens
            are predicted, the sums of the evaluation objective (loss of those tokens; with a teacher also its KL to
            the student).
        teacher: makes the teacher's trace of a batch.
        teacher_values: returns the teacher's own loss, (1,), if tokens are predicted; for texts its vectors, (B, D).
        batches: this rank's share; every rank has the same number.
        task: the config's task.
        gather: returns every rank's object, on every rank.
        positive: index of the class whose f1 is scored, if there are two; None: the second.
        seen: called with outputs in the set's order: for classes each model's (n, C) logits and the (n,) labels, for
            scores (n, 1) and (n,), for queries and documents each model's (n, 2) results of `similarity.search` and
            the indices of the right documents.
        dims: lengths of vector prefixes that are scored too.
        known: the teacher's outputs on this set, if no tokens are predicted; the teacher is not run then.
        keep: called with the teacher's outputs if no tokens are predicted and the teacher was run.

    Returns:
        {"student": {...}, "teacher": {...}}. For classes: accuracy, loss (cross-entropy) and macro_f1; for two classes,
        instead of macro_f1, f1 of the positive one, mcc, and pearson and spearman of one class's probability (which
        equal those of the other's); with a teacher, agreement: the share of examples for which both predict the same
        class. For scores: pearson, spearman and loss (squared error). For vectors: the result of similarity.scores. For
        tokens: perplexity. kl: mean KL(teacher‖student), nats, per example or token; for scores, the KL of normal
        distributions of variance 1 around them, which is half the squared difference. tokens_per_second of the forward
        passes, and texts_per_second for vectors; the first pass of a rank is not timed if it has more.
    """
    if known is not None:
        teacher = None
    parts: list[dict[str, Tensor]] = []
    clocks = {"student": _Clock(), "teacher": _Clock()}
    paired = False
    for batch in batches:
        paired = batch.pair is not None
        with contextlib.ExitStack() as stack:
            with clocks["teacher"].running():
                trace = stack.enter_context(teacher(batch)) if teacher is not None else None
            with clocks["student"].running():
                mine = student(batch, trace)
            part = {"student": mine.detach().float(), "tokens": batch.mask.sum()}
            if trace is not None:
                own = task in (*LANGUAGE, EMBEDDING)
                other = teacher_values(trace, batch) if own else trace.logits
                part["teacher"] = other.detach().float()
            if task in LANGUAGE:
                part["count"] = (targets(batch, task) >= 0).sum()
            else:
                part |= {"labels": batch.labels, "index": batch.index}
            parts.append(part)
    # The only wait for the device: the work of all batches is queued by now.
    parts = [{name: value.cpu() for name, value in part.items()} for part in parts]
    read = {"tokens": [int(part.pop("tokens")) for part in parts]}
    if task == EMBEDDING:
        read["texts"] = [int((part["index"] >= 0).sum()) for part in parts]
    everyone = gather((parts, {name: clock.seconds() for name, clock in clocks.items()}, read))
    parts = [part for rank_parts, _, _ in everyone for part in rank_parts]
    speeds = {
        name: _speeds([(seconds[name], counts) for _, seconds, counts in everyone])
        for name in ("student", "teacher")
        if name in parts[0]
    }
    if task in LANGUAGE:
        scores = _language(parts)
    else:
        outputs, labels = _ordered(parts)
        if known is not None:
            outputs["teacher"], speeds["teacher"] = known.values, known.speeds
        elif "teacher" in outputs and keep is not None:
            keep(Outputs(outputs["teacher"], speeds["teacher"]))
        if task == EMBEDDING:
            scores = _vectors(outputs, labels, paired, seen, dims)
        else:
            scores = _labelled(outputs, labels, task, positive, seen)
    return {name: values | speeds[name] for name, values in scores.items()}


def _speeds(ranks: list[tuple[list[float], dict[str, list[int]]]]) -> dict[str, float]:
    """Return how many tokens and texts a second all ranks read together, from the seconds and counts of their passes.

    A first pass also allocates memory and chooses kernels, so it counts only where there is no other.
    """
    first = 1 if all(len(seconds) > 1 for seconds, _ in ranks) else 0
    slowest = max(sum(seconds[first:]) for seconds, _ in ranks)
    return {
        f"{unit}_per_second": round(sum(sum(counts[unit][first:]) for _, counts in ranks) / slowest, 1)
        for unit in ranks[0][1]
    }


def _ordered(parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return each model's outputs, and the labels, in the order of the set."""
    index = torch.cat([part["index"] for part in parts])
    found = {
        name: restore(torch.cat([part[name] for part in parts]), index)
        for name in ("student", "teacher", "labels")
        if name in parts[0]
    }
    return found, found.pop("labels")


def _vectors(
    outputs: dict[str, Tensor], labels: Tensor, paired: bool, seen: Seen | None, dims: Sequence[int]
) -> dict[str, dict[str, float]]:
    gold = labels[::2] if paired and not labels.isnan().any() else None
    searched = paired and gold is None
    found: dict[str, Tensor] = {}
    if searched:
        found = {name: similarity.search(of[::2], of[1::2]) for name, of in outputs.items()}
        if seen is not None:
            seen(found, torch.arange(len(labels) // 2))
    scores = {}
    for name, of in outputs.items():
        teacher = outputs.get("teacher") if name == "student" else None
        scores[name] = similarity.scores(of, gold, found=found.get(name), teacher=teacher)
        scores[name] |= similarity.by_length(of, gold, dims, searched=searched, teacher=teacher)
    return scores


def _labelled(
    outputs: dict[str, Tensor], labels: Tensor, task: str, positive: int | None, seen: Seen | None
) -> dict[str, dict[str, float]]:
    if seen is not None:
        seen(outputs, labels)
    scores = {}
    for name, output in outputs.items():
        teacher = outputs.get("teacher")
        scores[name] = (
            _regression(output, labels, teacher)
            if task == "regression"
            else _classification(output, labels, teacher, 1 if positive is None else positive)
        )
    return scores


def _classification(
    output: Tensor, labels: Tensor, teacher: Tensor | None, positive: int
) -> dict[str, float]:
    predicted = output.argmax(-1)
    scores = {"accuracy": metrics.accuracy(predicted, labels)}
    if output.shape[1] == 2:
        share = output.double().softmax(-1)[:, 1]
        scores["f1"] = metrics.f1(predicted, labels, positive)
        scores["mcc"] = metrics.mcc(predicted, labels)
        scores["pearson"], scores["spearman"] = (
            metrics.pearson(share, labels),
            metrics.spearman(share, labels),
        )
    else:
        scores["macro_f1"] = metrics.macro_f1(predicted, labels)
    scores["loss"] = metrics.cross_entropy(output, labels)
    if teacher is not None:
        scores["kl"] = metrics.kl(teacher, output)
        scores["agreement"] = metrics.agreement(teacher, output)
    return scores


def _regression(output: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
    predicted = output[:, 0].double()
    scores = {
        "pearson": metrics.pearson(predicted, labels),
        "spearman": metrics.spearman(predicted, labels),
        "loss": (predicted - labels.double()).square().mean().item(),
    }
    if teacher is not None:  # each score is taken as the mean of a normal distribution of variance 1
        scores["kl"] = 0.5 * (teacher[:, 0].double() - predicted).square().mean().item()
    return scores


def _language(parts: list[dict]) -> dict[str, dict[str, float]]:
    count = sum(int(part["count"]) for part in parts)
    student = sum(part["student"].double() for part in parts)
    scores = {"student": {"perplexity": metrics.perplexity(float(student[0]), count)}}
    if "teacher" in parts[0]:
        teacher = sum(part["teacher"].double() for part in parts)
        scores["student"]["kl"] = float(student[1]) / count
        scores["teacher"] = {"perplexity": metrics.perplexity(float(teacher[0]), count), "kl": 0.0}
    return scores
