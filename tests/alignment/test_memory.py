"""At 2,048 tokens no term makes a tensor of N×N or tokens×vocabulary, in the forward or the backward pass."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsdistill.alignment.objective import Objective
from dsdistill.alignment.terms import TERMS, Pair, Shape
from dsdistill.config.terms import Terms
from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.models.trace import AttentionTrace, Geometry, Trace
from tests.alignment.rig import make_spans

N, LENGTHS, VOCABULARY = 2048, (2048, 1500), 8192
STUDENT = Shape(depth=2, width=16, heads=2, key_heads=2, head_width=8, vocabulary=VOCABULARY)
TEACHER = Shape(depth=3, width=24, heads=2, key_heads=2, head_width=12, vocabulary=VOCABULARY)
CASES = {
    "task": {},
    "soft_label": {"divergence": "jsd"},
    "hidden": {},
    "feature": {},
    "attention": {"relations": ["query_key", "value_value"]},
    "attention, relation heads": {"relations": ["query_query", "key_key"], "relation_heads": 4},
    "attention, mse of mean heads": {"divergence": "mse", "heads": "mean"},
    "attention, scores": {"divergence": "score_mse"},
    "pairwise": {"center": True},
    "pairwise, distance": {"relation": "distance"},
    "contrastive": {},
    "sp": {},
    "rkd": {},
    "cka": {},
    "pkt": {},
    "trajectory": {"word_layers": [[1, 2]], "phrase_layers": [[2, 3]]},
    "fdd": {},
}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            # A tensor expanded without memory of its own holds only what its storage holds.
            if isinstance(leaf, torch.Tensor) and (held := _held(leaf)) > self.elements:
                self.elements, self.where = held, str(function)
        return found


def _held(x: torch.Tensor) -> int:
    return min(x.numel(), x.untyped_storage().nbytes() // x.element_size())


def trace(shape: Shape, seed: int, causal: bool) -> Trace:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator).requires_grad_(shape is STUDENT)

    batch, geometry = len(LENGTHS), Geometry(causal, None)
    found = Trace({layer: draw(batch, N, shape.width) for layer in range(shape.depth + 1)})
    size = (batch, shape.heads, N, shape.head_width)
    for layer in range(1, shape.depth + 1):
        found.attention[layer] = AttentionTrace(draw(*size), draw(*size), draw(*size), 0.3, geometry)
    if causal:
        found.output, found.head = draw(batch, N, shape.width), draw(VOCABULARY, shape.width)
    else:
        found.logits = draw(batch, 3)
    return found


def largest(term: str, options: dict, task: str, backend: str = "auto") -> Largest:
    causal = task == "causal_lm"
    mask = torch.arange(N) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(~mask, NO_LABEL) if causal else torch.zeros(len(LENGTHS), dtype=torch.int64)
    batch = Batch(ids, mask, labels, spans=make_spans(LENGTHS))
    objective = Objective(
        Terms.model_validate({term: options}), Pair(STUDENT, TEACHER, task, backend, VOCABULARY)
    )
    student, teacher = trace(STUDENT, 1, causal), trace(TEACHER, 2, causal)
    with Largest() as seen:
        geometry = {layer: Geometry(causal, None) for layer in (1, 2)}
        loss = objective(student, teacher, batch, objective.counts(batch, geometry)).total
        loss.backward()
    assert loss.isfinite()
    return seen


LANGUAGE = {"task", "soft_label", "fdd"}  # the terms that read a vocabulary
NATIVE = {
    "hidden",
    "attention",
    "pairwise",
    "trajectory",
}  # that "auto" runs in C++, which is not watched here
RUNS = [(name, "auto") for name in CASES]
RUNS += [(name, "chunked") for name in CASES if name.split(",")[0] in NATIVE and "mean heads" not in name]


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_largest_tensor(name, backend):
    term = name.split(",")[0]
    seen = largest(term, CASES[name], "causal_lm" if term in LANGUAGE else "classification", backend)
    assert seen.elements < N * N, seen.where
    assert seen.elements < N * VOCABULARY / 4


@pytest.mark.parametrize("term", ["attention", "pairwise"])
def test_a_whole_matrix_is_seen(term):
    assert largest(term, {}, "classification", backend="reference").elements >= N * N


def test_every_term_is_here():
    alone = {"smooth"}  # compares states of one model token by token
    assert {name.split(",")[0] for name in CASES} | alone == set(TERMS)
