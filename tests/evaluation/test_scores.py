"""Scores on the dev set are checked by hand: two batches, out of order, with a filler row."""

import contextlib
import math

import pytest
import torch

from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.evaluation.scores import _speeds, evaluate
from dsdistill.models.trace import Trace


def run(task: str, order: list[list[int]], labels, student, teacher=None, positive=None, **further) -> dict:
    """Return scores of given outputs, (examples, C). order: the examples of each batch; −1 is a filler."""
    batches, outputs = [], {}
    for chosen in order:
        index = torch.tensor(chosen)
        mask = (index >= 0)[:, None].expand(-1, 3)
        kept = torch.where(index >= 0, labels[index], torch.tensor(NO_LABEL, dtype=labels.dtype))
        batch = Batch(mask.long(), mask, kept, index=index)
        outputs[id(batch)] = [None if x is None else x[index] for x in (student, teacher)]
        batches.append(batch)
    return evaluate(
        lambda batch, trace: outputs[id(batch)][0],
        None
        if teacher is None
        else lambda batch: contextlib.nullcontext(Trace(logits=outputs[id(batch)][1])),
        None,
        batches,
        task=task,
        gather=lambda found: [found],
        positive=positive,
        **further,
    )


def test_two_classes():
    """The student gives class 1 the probabilities 0.9, 0.25, 0.75, 0.1, the teacher 1/2 and once 0.8."""
    share, other = torch.tensor([0.9, 0.25, 0.75, 0.1]), torch.tensor([0.8, 0.5, 0.5, 0.5])
    labels = torch.tensor([1, 0, 0, 0])
    logits = [torch.stack([(1 - p).log(), p.log()], dim=1) + 3 for p in (share, other)]
    found = run("classification", [[2, 0], [-1, 3, 1]], labels, *logits)
    scores = found["student"]
    assert scores.pop("tokens_per_second") > 0
    assert scores == pytest.approx(
        {
            "accuracy": 3 / 4,  # one true positive, one false, two true negatives
            "f1": 2 / 3,
            "mcc": 2 / math.sqrt(12),
            # Probabilities minus their mean: 0.4, −0.25, 0.25, −0.4; labels: 0.75 and three times −0.25.
            "pearson": 0.4 / math.sqrt(0.445 * 0.75),
            "spearman": 3 / math.sqrt(5 * 3),  # ranks 4, 2, 3, 1 and 4, 2, 2, 2
            "loss": -math.log(0.9 * 0.75 * 0.25 * 0.9) / 4,
            "agreement": 3 / 4,  # the teacher predicts class 1 for the first alone, and class 0 for ties
            "kl": (
                0.8 * math.log(0.8 / 0.9)
                + 0.2 * math.log(0.2 / 0.1)
                - 0.5 * math.log(4 * 0.25 * 0.75) * 2
                - 0.5 * math.log(4 * 0.1 * 0.9)
            )
            / 4,
        },
        rel=1e-5,
    )
    assert found["teacher"]["accuracy"] == 1 and found["teacher"]["kl"] == pytest.approx(0, abs=1e-9)
    # The other class: two of its three examples are found, and no other example is taken for it.
    other = run("classification", [[2, 0], [-1, 3, 1]], labels, *logits, positive=0)["student"]
    other.pop("tokens_per_second")
    assert other.pop("f1") == pytest.approx(2 * 2 / (2 + 3)) and scores.pop("f1")
    assert other == scores  # all other scores concern both classes
    alone = run("classification", [[0, 1, 2, 3]], labels, logits[0])
    assert set(alone) == {"student"} and "kl" not in alone["student"]


def test_three_classes_have_a_macro_f1():
    """Class 0: 2/3, class 1: 2/3, class 2: 1."""
    logits = torch.eye(3)[[0, 0, 1, 2]]
    scores = run("classification", [[3, 1], [0, 2]], torch.tensor([0, 1, 1, 2]), logits)["student"]
    assert scores["accuracy"] == 3 / 4 and scores["macro_f1"] == pytest.approx(7 / 9)
    assert scores["loss"] == pytest.approx(math.log(math.e + 2) - 3 / 4)
    assert not {"f1", "pearson"} & set(scores)


def test_scores():
    """Predictions 1, 2, 4 of 1, 3, 2; the teacher's 2, 2, 2.5."""
    labels, student, teacher = torch.tensor([[1.0, 3.0, 2.0], [1.0, 2.0, 4.0], [2.0, 2.0, 2.5]])
    found = run("regression", [[1, -1], [2, 0]], labels, student[:, None], teacher[:, None])
    scores = found["student"]
    assert scores.pop("tokens_per_second") > 0
    assert scores == pytest.approx(
        {
            "pearson": 1 / math.sqrt(42 / 9 * 2),  # −4/3, −1/3, 5/3 with −1, 1, 0
            "spearman": 1 / 2,
            "loss": (0 + 1 + 4) / 3,
            "kl": (1 + 0 + 1.5**2) / 3 / 2,
        },
        rel=1e-6,
    )
    assert found["teacher"]["loss"] == pytest.approx((1 + 1 + 0.5**2) / 3) and found["teacher"]["kl"] == 0


def test_kept_outputs_of_a_teacher_serve_another_student():
    """The order of the batches does not matter; the teacher is not run (it would raise)."""
    generator = torch.Generator().manual_seed(0)
    labels, teacher, student, other = torch.tensor([1, 0, 0, 1]), *torch.randn(3, 4, 2, generator=generator)
    kept = []
    first = run("classification", [[2, 0], [-1, 3, 1]], labels, student, teacher, keep=kept.append)
    assert torch.equal(kept[0].values, teacher)
    assert kept[0].speeds == {"tokens_per_second": first["teacher"]["tokens_per_second"]}
    wanted = run("classification", [[0, 1, 2, 3]], labels, other, teacher)
    wrong = torch.full_like(teacher, math.nan)
    found = run("classification", [[3, 2], [1, 0]], labels, other, wrong, known=kept[0], keep=kept.append)
    assert len(kept) == 1
    for model in ("student", "teacher"):
        wanted[model].pop("tokens_per_second")
        assert (found[model].pop("tokens_per_second") == kept[0].speeds["tokens_per_second"]) == (
            model == "teacher"
        )
        assert found[model] == pytest.approx(wanted[model], rel=1e-6, abs=1e-9)


def test_speeds_leave_out_the_first_pass():
    """Two ranks read 30 and 20 tokens in 2 and 4 seconds after their first passes."""
    ranks = [([9.0, 1.0, 1.0], {"tokens": [50, 10, 20]}), ([9.0, 4.0], {"tokens": [70, 20]})]
    assert _speeds(ranks) == {"tokens_per_second": 12.5}
    assert _speeds([([2.0], {"tokens": [10], "texts": [4]})]) == {
        "tokens_per_second": 5.0,
        "texts_per_second": 2.0,
    }
