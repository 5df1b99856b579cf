"""A language model's task and soft labels, computed together, must equal the same terms one by one."""

from dataclasses import replace

import pytest
import torch

from dsdistill.alignment.objective import Objective
from dsdistill.config.terms import Terms
from tests.alignment.rig import Rig, make_batch
from tests.alignment.test_counted import Asked, batches

TERMS = {
    "task": {"weight": 0.4},
    "soft_label": {"weight": 1.7, "temperature": 3.0, "divergence": "jsd"},
    "hidden": {},
}
CASES = {
    "causal": ("gpt2", "causal_lm", {}),
    "masked": ("bert", "masked_lm", {}),
    "smoothed": ("gpt2", "causal_lm", {"smoothing": 0.2}),
    "heads of unequal widths": ("llama", "causal_lm", {"teacher": {"vocab_size": 72}}),
}


def make(case, terms=TERMS):
    family, task, options = CASES[case]
    rig = Rig(family, task, terms, **options)
    rig.module.double()
    rig.teacher.double()
    return rig, batches(task)


@pytest.mark.parametrize("distill_weight", [None, 0.3])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_apart(case, counted, distill_weight):
    """Compare total, terms and gradients of two micro-batches in float64, also if w weighs the terms."""
    rig, found = make(case)
    rig.objective.distill_weight = distill_weight
    batch = found[counted]
    together = rig.step(batch, make_batch(rig.task, seed=1))
    assert rig.objective._joined == {"task": "soft_label"}
    rig.objective._joined = {}
    apart = rig.step(batch, make_batch(rig.task, seed=1))
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    assert together[1] == pytest.approx(apart[1], rel=1e-6) and list(together[1]) == list(TERMS)
    assert set(together[2]) == set(apart[2])
    for name, gradient in apart[2].items():  # the gradient of BERT's key biases is 0
        allowed = 1e-6 * gradient.abs().max() + 1e-15
        assert (together[2][name] - gradient).abs().max() <= allowed, name


def test_in_float32():
    rig = Rig("gpt2", "causal_lm", TERMS)
    batch = batches("causal_lm")[1]
    together = rig.step(batch)
    rig.objective._joined = {}
    apart = rig.step(batch)
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    assert together[1] == pytest.approx(apart[1], rel=1e-6)


@pytest.mark.parametrize("terms", ["task", "soft_label"])
def test_alone_a_term_has_its_own_operator(terms):
    assert make("causal", {terms: TERMS[terms]})[0].objective._joined == {}


def test_classifiers_compute_them_apart():
    assert Rig("bert", terms={"task": {}, "soft_label": {}}).objective._joined == {}


def test_the_order_of_raw_losses_and_evaluation():
    """Evaluation adds up the same sums, with and without a teacher."""
    rig, (_, batch) = make("causal")
    objective = Objective(Terms.model_validate(TERMS), rig.pair).double()
    objective.load_state_dict(rig.objective.state_dict())
    student, teacher = rig.module.trace(batch), rig.teacher_trace(batch)
    with torch.no_grad():
        together = objective.sums(student, teacher, batch)
        alone = objective.sums(student, None, batch)
        objective._joined = {}
        apart = objective.sums(student, teacher, batch)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0)
    assert torch.equal(alone, together[:1])


class Widened(Asked):
    """Widened also counts how many rows are turned into logits of the student's vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(function, types, args, kwargs)
        if function.name().startswith("aten::mm") and found.shape[1] == self.vocabulary:
            self.rows += found.shape[0]
        return found


def test_logits_are_computed_once():
    """Both models' logits are computed once for each token that counts; nothing is searched for."""
    rig, (_, batch) = make("causal", {"task": {}, "soft_label": {}})
    counts, rows = rig.counts([batch]), []
    for joined in (True, False):
        if not joined:
            rig.objective._joined = {}
        student, teacher = rig.module.trace(batch), rig.teacher_trace(batch)
        with Widened(rig.pair.student.vocabulary) as asked:
            rig.objective(student, teacher, batch, counts)
        assert not {"aten::nonzero", "aten::_local_scalar_dense"} & asked.names
        rows.append(asked.rows)
    assert rows == [2 * batch.counted.numel(), 3 * batch.counted.numel()]


def test_nothing_counted():
    rig, (batch, _) = make("causal")
    nothing = replace(batch, labels=torch.full_like(batch.labels, -100))
    total, raw, _ = rig.step(nothing)
    assert raw["task"] == raw["soft_label"] == 0.0 and total == pytest.approx(raw["hidden"])
