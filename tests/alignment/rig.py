"""Run tiny real models under an objective, fed step by step as in training."""

import copy
from dataclasses import replace

import torch
from transformers import AutoConfig

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config.terms import Terms
from dsdistill.data.batch import NO_LABEL, PHRASE, WORD, Batch
from dsdistill.engine.module import StudentModule
from dsdistill.models.build import build_model, for_task
from dsdistill.models.domain_fusion import DomainFusion
from dsdistill.models.trace import Trace
from dsdistill.models.tracer import Tracer, callee
from tests.models.families import FAMILIES, peaked

LENGTHS = (14, 9, 3, 1, 12, 7)
ALL_TERMS = {
    "task": {},
    "soft_label": {},
    "hidden": {"weight": 0.7},
    "attention": {"weight": 1.3, "heads": "mean"},
    "pairwise": {"layers": "uniform"},
}


def make_batch(task: str, lengths=LENGTHS, width: int = 14, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, 0)
    if task == "causal_lm":
        labels = ids.masked_fill(~mask, NO_LABEL)
    elif task == "masked_lm":  # every third token is to be predicted, including the first of each row
        chosen = mask & (torch.arange(width) % 3 == 0)
        labels = ids.masked_fill(~chosen, NO_LABEL)
        ids = ids.masked_fill(chosen, 61)
    elif task == "regression":
        labels = torch.randn(len(lengths), generator=generator)
    else:
        labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    draw = torch.randint(2**32, (len(lengths),), generator=generator)
    return Batch(ids, mask, labels, index=torch.arange(len(lengths)), spans=make_spans(lengths), draw=draw)


def make_spans(lengths) -> torch.Tensor:
    """Make words of 1, 2, 1, 2, … tokens from the second token on, and phrases of 3 with a token between them."""
    spans = []
    for row, length in enumerate(lengths):
        for kind, sizes, gap in ((WORD, (1, 2), 0), (PHRASE, (3,), 1)):
            first, index = 1, 0
            while first + sizes[index % len(sizes)] <= length:
                past = first + sizes[index % len(sizes)]
                spans.append((row, first, past, kind))
                first, index = past + gap, index + 1
    return torch.tensor(spans, dtype=torch.int64).reshape(-1, 4)


def rows(batch: Batch, chosen: list[int]) -> Batch:
    """Return some rows of a batch, cut to the longest of them."""
    width = max(2, int(batch.mask[chosen].sum(1).max()))
    labels = batch.labels[chosen]
    return Batch(
        batch.input_ids[chosen, :width],
        batch.mask[chosen, :width],
        labels[:, :width] if labels.dim() == 2 else labels,
        index=batch.index[chosen],
        spans=torch.cat([torch.empty(0, 4, dtype=torch.int64), *_moved(batch.spans, chosen)]),
        draw=batch.draw[chosen],
    )


def _moved(spans: torch.Tensor, chosen: list[int]):
    for place, row in enumerate(chosen):
        own = spans[spans[:, 0] == row].clone()
        own[:, 0] = place
        yield own


def padded(batch: Batch, extra: int) -> Batch:
    def widen(values, fill):
        return torch.nn.functional.pad(values, (0, extra), value=fill)

    labels = widen(batch.labels, NO_LABEL) if batch.labels.dim() == 2 else batch.labels
    return replace(batch, input_ids=widen(batch.input_ids, 0), mask=widen(batch.mask, False), labels=labels)


def with_filler(batch: Batch, count: int) -> Batch:
    """Add rows without a valid token before and after the others."""

    def add(values, fill):
        filler = values.new_full((count, *values.shape[1:]), fill)
        return torch.cat([filler, values, filler])

    return Batch(
        add(batch.input_ids, 0),
        add(batch.mask, False),
        add(batch.labels, NO_LABEL),
        index=add(batch.index, -1),
        spans=batch.spans + torch.tensor([count, 0, 0, 0]),
        draw=add(batch.draw, 0),
    )


class Rig:
    """Rig holds a teacher and a student of one family (or two), and the objective between them."""

    def __init__(
        self,
        family: str,
        task: str = "classification",
        terms: dict | None = None,
        student: dict | None = None,
        teacher: dict | None = None,
        student_family: str | None = None,
        tokens: int = 60,
        domain: DomainFusion | None = None,
        backend: str = "auto",
        **pair,
    ):
        """Build the models; pair: further fields of the Pair."""
        self.task = task
        models = []
        for seed, (kind, changes) in enumerate(((student_family or family, student), (family, teacher))):
            config = AutoConfig.for_model(kind, **FAMILIES[kind] | (changes or {}))
            torch.manual_seed(seed)
            model = build_model(
                for_task(config, task, ("a", "b", "c"), 0), None, task, "student", needs_head=False
            )
            models.append(peaked(model, 6.0))
        self.student, self.teacher = models[0].train(), models[1].eval().requires_grad_(False)
        width = 0 if domain is None else domain.lift.in_features
        shapes = Shape.of(self.student.config), Shape.of(self.teacher.config)
        self.pair = Pair(*shapes, task, backend, tokens, width, **pair)
        torch.manual_seed(7)
        self.objective = Objective(Terms.model_validate(terms or ALL_TERMS), self.pair)
        self.before = None  # the student as the stage before left it
        if self.objective.needs("previous"):
            self.before = copy.deepcopy(self.student).eval().requires_grad_(False)
            for parameter in self.before.parameters():
                parameter.mul_(1.1)
        previous = None
        if self.before is not None:
            previous = Tracer(callee(self.before, task, "student"), self.objective.layers("student_hidden"))
        layers = self.objective.layers("teacher_hidden"), self.objective.layers("teacher_attention")
        self.module = StudentModule(
            self.student,
            self.objective,
            Objective(Terms(task={}), self.pair),
            teacher=Tracer(
                callee(self.teacher, task, "teacher"),
                *layers,
                unrotated=bool(self.objective.needs("unrotated")),
            ),
            previous=previous,
            domain=domain,
        )

    def teacher_trace(self, batch: Batch) -> Trace:
        with self.module.teacher.frozen(batch) as trace:
            return trace

    def loss(self, batch: Batch, counts):
        with self.module.traces(batch) as traces:
            return self.module(batch, counts, *traces)

    def counts(self, batches: list[Batch]):
        if not self.module.geometry:
            with torch.no_grad():
                self.module.trace(batches[0])
            self.module.geometry = self.module.student.capture.geometry
        return self.module.own_counts(batches)

    def step(self, *batches: Batch):
        """Return (total, raw by term, gradients by name) of one step over these micro-batches."""
        counts = self.counts(list(batches))
        self.module.zero_grad()
        total, raw = 0.0, 0.0
        for batch in batches:
            loss, terms = self.loss(batch, counts)
            loss.backward()
            total, raw = total + loss.item(), raw + terms.double()
        gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        return total, {name: term["raw"] for name, term in self.objective.report(raw).items()}, gradients
