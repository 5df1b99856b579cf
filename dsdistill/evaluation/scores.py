"""Score the models on the dev set: the task's metrics and the distance to the teacher."""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
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

    @property
    def seconds(self) -> float:
        """Return the seconds of all passes; this waits for the last of them."""
        total = 0.0
        for start, end in self.passes:
            if isinstance(start, float):
                total += end - start
            else:
                end.synchronize()
                total += start.elapsed_time(end) / 1000
        return total


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

    Returns:
        {"student": {...}, "teacher": {...}}. For classes: accuracy, loss (cross-entropy) and macro_f1; for two classes
        f1 of the positive one instead, and mcc, pearson and spearman of one class's probability, which equal those of
        the other's. For scores: pearson, spearman and loss (squared error). For vectors: the result of
        similarity.scores. For tokens: perplexity. kl: mean KL(teacher‖student), nats, per example or token; for scores
        that of normal distributions of variance 1 around them, half the squared difference. tokens_per_second of the
        forward passes, and texts_per_second for vectors.
    """
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
    tokens = sum(int(part.pop("tokens")) for part in parts)
    everyone = gather((parts, {name: clock.seconds for name, clock in clocks.items()}, tokens))
    parts = [part for rank_parts, _, _ in everyone for part in rank_parts]
    if task == EMBEDDING:
        scores = _vectors(parts, paired, seen, dims)
    else:
        scores = _language(parts) if task in LANGUAGE else _labelled(parts, task, positive, seen)
    read = {"tokens": sum(count for _, _, count in everyone)}
    if task == EMBEDDING:
        read["texts"] = sum(int((part["index"] >= 0).sum()) for part in parts)
    for name, values in scores.items():
        slowest = max(seconds[name] for _, seconds, _ in everyone)
        values |= {f"{unit}_per_second": round(count / slowest, 1) for unit, count in read.items()}
    return scores


def _vectors(
    parts: list[dict], paired: bool, seen: Seen | None, dims: Sequence[int]
) -> dict[str, dict[str, float]]:
    index = torch.cat([part["index"] for part in parts])
    labels, *vectors = (
        restore(torch.cat([part[name] for part in parts]), index)
        for name in ("labels", "student", "teacher")
        if name in parts[0]
    )
    outputs = dict(zip(("student", "teacher"), vectors, strict=False))
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
    parts: list[dict], task: str, positive: int | None, seen: Seen | None
) -> dict[str, dict[str, float]]:
    index = torch.cat([part["index"] for part in parts])
    labels = restore(torch.cat([part["labels"] for part in parts]), index)
    outputs = {
        name: restore(torch.cat([part[name] for part in parts]), index)
        for name in ("student", "teacher")
        if name in parts[0]
    }
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
