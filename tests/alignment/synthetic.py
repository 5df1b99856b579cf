"""Every term, with settings that use all of its parts, and random traces in place of models."""

import dataclasses

import torch

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import Pair, Shape
from dsdistill.config.terms import Terms
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.models.trace import AttentionTrace, DomainTrace, Geometry, Trace
from tests.alignment.rig import make_spans

STUDENT = Shape(depth=2, width=16, heads=2, key_heads=2, head_width=8, vocabulary=0)
TEACHER = Shape(depth=3, width=24, heads=2, key_heads=2, head_width=12, vocabulary=0)
FEATURES = 5  # of domain structural mapping
CASES = {
    "task": {},
    "soft_label": {"divergence": "jsd"},
    "soft_label, all tokens": {"positions": "valid"},
    "embedding": {"dims": [16, 8]},
    "hidden": {},
    "hidden, components": {"components": 5},
    "feature": {},
    "feature, first token": {"positions": "first", "divergence": "mse"},
    "feature_map": {},
    "attention": {"relations": ["query_key", "value_value"]},
    "attention, relation heads": {"relations": ["query_query", "key_key"], "relation_heads": 4},
    "attention, mse of mean heads": {"divergence": "mse", "heads": "mean"},
    "attention, groups of heads": {"heads": "group"},
    "attention, scores": {"divergence": "score_mse"},
    "pairwise": {"center": True},
    "pairwise, distance": {"relation": "distance"},
    "ckd": {"window": 5},
    "contrastive": {},
    "sp": {},
    "rkd": {},
    "cka": {},
    "pkt": {},
    "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 3]]},
    "fdd": {},
    "domain": {},
    "smooth": {},
}
NO_KERNEL = {"attention, mse of mean heads", "attention, groups of heads"}  # in C++
LANGUAGE = {"task", "soft_label", "fdd"}  # the terms that read a vocabulary


def term_of(case: str) -> str:
    return case.split(",")[0]


class Synthetic:
    """Synthetic holds a batch of random traces and the objective of a case; the traces have its scale and dtype."""

    def __init__(
        self,
        case: str,
        lengths: tuple[int, ...],
        vocabulary: int = 50,
        backend: str = "auto",
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        term = term_of(case)
        self.causal = term in LANGUAGE
        self.geometry = {layer: Geometry(self.causal, None) for layer in (1, 2)}
        self.scale, self.dtype = scale, dtype
        shapes = [dataclasses.replace(shape, vocabulary=vocabulary) for shape in (STUDENT, TEACHER)]
        if "groups" in case:
            shapes[1] = dataclasses.replace(shapes[1], heads=6, key_heads=6, head_width=4)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(0))
        classes = torch.zeros(len(lengths), dtype=torch.int64)
        labels = ids.masked_fill(~mask, NO_LABEL) if self.causal else classes
        self.batch = Batch(ids, mask, labels, spans=make_spans(lengths))
        task = "causal_lm" if self.causal else "embedding" if term == "embedding" else "classification"
        torch.manual_seed(0)
        self.objective = Objective(
            Terms.model_validate({term: CASES[case]}), Pair(*shapes, task, backend, vocabulary, FEATURES)
        )
        self.leaves: list[torch.Tensor] = []  # of the student
        self.student = self._trace(shapes[0], 1, self.leaves)
        self.teacher = self._trace(shapes[1], 2, None)
        self.student.previous = self._trace(shapes[0], 3, None)

    def _trace(self, shape: Shape, seed: int, leaves: list | None) -> Trace:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            found = (self.scale * torch.randn(*size, generator=generator)).to(self.dtype)
            if leaves is not None:
                leaves.append(found.requires_grad_())
            return found

        batch, tokens = self.batch.mask.shape
        found = Trace({layer: draw(batch, tokens, shape.width) for layer in range(shape.depth + 1)})
        size = (batch, shape.heads, tokens, shape.head_width)
        for layer in range(1, shape.depth + 1):
            geometry = Geometry(self.causal, None)
            found.attention[layer] = AttentionTrace(draw(*size), draw(*size), draw(*size), 0.3, geometry)
        if self.causal:
            found.output, found.head = draw(batch, tokens, shape.width), draw(shape.vocabulary, shape.width)
        else:
            found.logits = draw(batch, 3)
            found.output = found.hidden[shape.depth]
        if leaves is not None:
            targets = {n: torch.randn(batch, tokens, FEATURES, generator=generator) for n in (2, 3)}
            found.domain = DomainTrace(targets, draw(batch, tokens, FEATURES))
        return found

    def loss(self) -> torch.Tensor:
        counts = self.objective.counts(self.batch, self.geometry)
        return self.objective(self.student, self.teacher, self.batch, counts).total
