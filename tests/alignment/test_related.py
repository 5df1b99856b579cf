"""Losses between the examples of a micro-batch: by hand, their symmetries, extremes, and across ranks."""

import math

import pytest
import torch

from dsdistill.alignment import relations
from dsdistill.alignment.units import mean_pool
from dsdistill.config import UserError
from dsdistill.config.checks import check_ranks
from dsdistill.config.load import make_config
from tests.alignment.rig import Rig, make_batch, padded, with_filler
from tests.alignment.two_ranks import NAMES, TERMS, average_over_two_ranks, whole

ALL = 10**9  # compare every triple
LOSSES = {
    "contrastive": lambda s, t: relations.info_nce(s, t, 0.07),
    "sp": relations.similarity_preserving,
    "rkd distance": relations.rkd_distance,
    "rkd angle": lambda s, t: relations.rkd_angle(s, t, ALL),
    "cka": relations.cka,
    "pkt": relations.pkt,
}
MATCHING = [name for name in LOSSES if name != "contrastive"]


def draw(n=7, width=5, teacher_width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, w, generator=generator, dtype=torch.float64) for w in (width, teacher_width))


def rotation(width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


class TestByHand:
    def test_contrastive(self):
        """Cosines are 0.6 and 0.8 with the right and the wrong example, then 0 and 1 the other way round; τ = 0.5."""
        student = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
        expected = (math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(-2.0))) / 2
        assert relations.info_nce(student, teacher, 0.5).item() == pytest.approx(expected, rel=1e-6)

    def test_sp(self):
        """G_S = I; the rows of G_T = [[1, 1], [1, 2]] over √2 and √5."""
        student, teacher = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        a, b = 1 / math.sqrt(2), 1 / math.sqrt(5)
        expected = ((1 - a) ** 2 + a**2 + b**2 + (1 - 2 * b) ** 2) / 4
        assert relations.similarity_preserving(student, teacher).item() == pytest.approx(expected, rel=1e-6)

    def test_rkd_distance(self):
        """On a line at 0, 1, 4 the distances 1, 3, 4 have the mean 8/3; at 0, 1, 2 they are 1, 1, 2: 4/3."""
        student, teacher = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        differences = [3 / 8 - 3 / 4, 9 / 8 - 3 / 4, 12 / 8 - 6 / 4]
        expected = 2 * sum(d**2 / 2 for d in differences) / 9
        assert relations.rkd_distance(student, teacher).item() == pytest.approx(expected, rel=1e-6)

    def test_rkd_angle(self):
        """A right angle with legs 1 and 1 beside one with legs 3 and 4; each is seen from both its ends.

        Triples with i = j have cosine 1 in both models, those with the vertex at an end have 0: neither adds anything.
        """
        student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        teacher = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
        differences = [0.0, 1 / math.sqrt(2) - 0.8, 1 / math.sqrt(2) - 0.6]
        expected = 2 * sum(d**2 / 2 for d in differences) / 27
        assert relations.rkd_angle(student, teacher, ALL).item() == pytest.approx(expected, rel=1e-6)

    def test_cka(self):
        """Centred, x = (−1, 0, 1) and y = (−1, 2, −1): orthogonal; with y = (−1, −1, 2) the cosine² is 3/4."""
        student = torch.tensor([[0.0], [1.0], [2.0]])
        assert relations.cka(student, torch.tensor([[0.0], [3.0], [0.0]])).item() == pytest.approx(1.0)
        assert relations.cka(student, torch.tensor([[0.0], [0.0], [3.0]])).item() == pytest.approx(
            0.25, rel=1e-6
        )

    def test_pkt(self):
        """Two orthogonal vectors: rows (2/3, 1/3); two alike: (1/2, 1/2)."""
        student, teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.eye(2)
        expected = (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 2
        assert relations.pkt(student, teacher).item() == pytest.approx(expected, rel=1e-5)


class TestSymmetries:
    @pytest.mark.parametrize("name", MATCHING)
    def test_a_student_that_is_the_teacher(self, name):
        student, _ = draw()
        other, _ = draw(seed=1)
        assert abs(LOSSES[name](student, student.clone()).item()) < 1e-9 < LOSSES[name](student, other).item()

    @pytest.mark.parametrize("name", MATCHING)
    def test_scale(self, name):
        student, teacher = draw()
        value = LOSSES[name](student, teacher).item()
        assert LOSSES[name](3 * student, teacher).item() == pytest.approx(value, rel=1e-9)

    @pytest.mark.parametrize("name", MATCHING)
    def test_rotation(self, name):
        student, teacher = draw()
        value = LOSSES[name](student, teacher).item()
        assert LOSSES[name](student @ rotation(5), teacher).item() == pytest.approx(value, rel=1e-9)

    @pytest.mark.parametrize("name", MATCHING)
    def test_shift(self, name):
        student, teacher = draw()
        value = LOSSES[name](student, teacher).item()
        shifted = LOSSES[name](student + 2.0, teacher).item()
        same = name in ("cka", "rkd distance", "rkd angle")
        assert (shifted == pytest.approx(value, rel=1e-9)) == same

    @pytest.mark.parametrize("name", LOSSES)
    def test_order(self, name):
        student, teacher = draw(teacher_width=5)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
        value = LOSSES[name](student, teacher).item()
        assert LOSSES[name](student[order], teacher[order]).item() == pytest.approx(value, rel=1e-9)

    def test_sampled_angles_are_near_all_and_always_the_same(self):
        student, teacher = draw(n=40)
        every = relations.rkd_angle(student, teacher, 40**3).item()
        some = relations.rkd_angle(student, teacher, 20000).item()
        assert some == relations.rkd_angle(student, teacher, 20000).item()
        assert some != every and some == pytest.approx(every, rel=0.05)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    student, teacher = draw(n=4, teacher_width=5)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["one unit", "twins", "zeros", "large float16", "two units"])
def test_extremes(name, case):
    student, teacher = (x.float() for x in draw(teacher_width=5))
    if case == "one unit":
        student, teacher = student[:1], teacher[:1]
    elif case == "two units":
        student, teacher = student[:2], teacher[:2]
    elif case == "twins":
        student[1] = student[0]
    elif case == "zeros":
        student = torch.zeros_like(student)
    else:
        student, teacher = (
            (1e4 * student / student.abs().max()).half(),
            (1e4 * teacher / teacher.abs().max()).half(),
        )
    student.requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    if case == "one unit":
        assert loss.item() == 0 and not student.grad.any()


class TestTerms:
    @pytest.mark.parametrize("name", NAMES)
    def test_definition(self, name):
        """The vectors are means of the last layers' states; padding and filler rows take no part."""
        rig = Rig("bert", terms={name: TERMS[name]}, student={"hidden_size": 24, "num_hidden_layers": 2})
        batch = make_batch("classification")
        mine = mean_pool(rig.module.trace(batch).hidden[2], batch.mask)
        other = mean_pool(rig.teacher_trace(batch).hidden[3], batch.mask)
        assert torch.allclose(other[3], rig.teacher_trace(batch).hidden[3][3, 0])  # a sequence of one token
        if name == "contrastive":
            mine = mine @ rig.objective.terms[name].projectors["2-3"].weight.T
        if name == "rkd":
            expected = LOSSES["rkd distance"](mine, other) + 2 * LOSSES["rkd angle"](mine, other)
        else:
            expected = LOSSES[name](mine, other)
        total, raw, gradients = rig.step(batch)
        assert raw[name] == pytest.approx(expected.item(), rel=1e-5) and raw[name] > 1e-6
        for other in (padded(batch, 3), with_filler(batch, 2)):
            again, _, found = rig.step(other)
            assert again == pytest.approx(total, rel=1e-4)
            key = "body.bert.encoder.layer.1.output.dense.weight"
            assert torch.allclose(found[key], gradients[key], rtol=1e-3, atol=1e-5) and gradients[key].any()

    def test_a_step_is_the_mean_over_its_micro_batches_by_units(self):
        rig = Rig("bert", terms={"sp": {}})
        parts = [make_batch("classification", (5, 7, 9)), make_batch("classification", (8,) * 5, seed=1)]
        alone = [rig.step(part)[1]["sp"] for part in parts]
        assert rig.step(*parts)[1]["sp"] == pytest.approx((3 * alone[0] + 5 * alone[1]) / 8, rel=1e-5)

    def test_one_example_at_once_is_refused(self):
        model = {"config": {"model_type": "bert"}}
        settings = {"teacher": model, "student": model, "terms": {"task": {}, "cka": {}}}
        config = make_config(settings | {"train": {"micro_batch_size": 1, "batch_size": 2}})
        with pytest.raises(UserError, match=r"^terms.cka: got one example at a time"):
            check_ranks(config.train, config.run_stages, config.data.sampler, world_size=1)
        check_ranks(config.train, config.run_stages, config.data.sampler, world_size=2)


@pytest.mark.parametrize("form", ["rows", "packed"])
def test_two_ranks_are_one_with_all_rows(tmp_path, form):
    """Values add up and gradients agree under DeepSpeed's rule: loss × world size, gradients averaged over ranks.

    The ranks hold 4 and 2 examples, and in a second micro-batch 3 and none.
    """
    values, gradients = average_over_two_ranks(tmp_path, form)
    expected_values, expected = whole(form)
    assert values == pytest.approx(expected_values, rel=1e-4)
    assert gradients.keys() == expected.keys()
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * size, name
