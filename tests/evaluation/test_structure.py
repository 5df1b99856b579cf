"""Metrics of representation spaces: by hand, and on synthetic spaces whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dsdistill.evaluation import structure

WIDTH = 256


def space(n: int, width: int = WIDTH, seed: int = 0, decay: float = 0.75):
    """Return n vectors whose k-th direction has a standard deviation of k^−decay, rotated at random."""
    generator = np.random.default_rng(seed)
    turned = np.linalg.qr(np.random.default_rng(99).normal(size=(width, width)))[0]
    return (generator.normal(size=(n, width)) / np.arange(1, width + 1) ** decay) @ turned


def halves(x):
    return x[: len(x) // 4], x[len(x) // 4 :]


@pytest.fixture(scope="module")
def teacher():
    return halves(space(4000))


@pytest.fixture(scope="module")
def unrelated():
    return halves(space(4000, seed=1))


@pytest.fixture(scope="module")
def collapsed(teacher):
    """Return vectors on one line, the teacher's first principal component (with noise far below it)."""
    direction = np.linalg.svd(teacher[1], full_matrices=False)[2][0]
    noise = 1e-6 * np.random.default_rng(3).normal(size=(4000, WIDTH))
    return tuple(x @ direction[:, None] * direction + n for x, n in zip(teacher, halves(noise), strict=True))


class TestByHand:
    def test_rcs(self):
        """Rotate by 90°, 180°, not at all, and by 60°: (1 + 2 + 0 + 0.5) / 2 / 4. Then nothing moves."""
        first = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
        second = np.array([[0.0, 3.0], [-1.0, 0.0], [0.0, 1.0], [1.0, math.sqrt(3)]])
        assert structure.change([first, second]).rcs == pytest.approx(3.5 / 8)
        assert structure.change([first, second, second]).rcs == pytest.approx(3.5 / 16)
        assert structure.change([first, 2 * first]).rcs == pytest.approx(0.0)

    def test_debiased_cka(self):
        """Sum HSIC over all ordered quadruples of different examples; the formula is its closed form."""
        generator = np.random.default_rng(0)
        x, y = generator.normal(size=(5, 3)), generator.normal(size=(5, 2))

        def hsic(k, m):
            total, count = 0.0, 0
            for i, j, q, r in np.ndindex(5, 5, 5, 5):
                if len({i, j, q, r}) == 4:
                    total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                    count += 1
            return total / count

        k, m = x @ x.T, y @ y.T
        expected = hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
        assert structure.debiased_cka(x, y) == pytest.approx(expected, rel=1e-9)

    def test_semantic_alignment(self):
        """The teacher is the student rotated by 90°, as is W; one of two held-out vectors is rotated back by 60°."""
        generator = np.random.default_rng(0)
        fit = generator.normal(size=(4000, 2))
        fit = (fit - fit.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(fit.T, ddof=0))).T
        turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        held = np.array([[1.0, 0.0], [0.0, 1.0]])
        answer = np.array([[0.0, 1.0], [-0.5, math.sqrt(3) / 2]])
        found = structure.semantic_alignment(held, answer, fit, fit @ turn)
        assert found.value == pytest.approx(100 * (1 + 0.5) / 2)
        assert found.low == pytest.approx(50) and found.high == pytest.approx(100)

    def test_ranks(self):
        """Variances 4, 4, 1 and 0: shares 4/9, 4/9, 1/9."""
        held = np.array(
            [[2.0, 0, 0, 0], [-2, 0, 0, 0], [0, 2, 0, 0], [0, -2, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0]]
        )
        found = structure.representation_compactness(held, held, held, held, samples=0)
        entropy = -(2 * 4 / 9 * math.log(4 / 9) + math.log(1 / 9) / 9)
        assert found.effective_rank == pytest.approx(math.exp(entropy))
        assert found.participation_ratio == pytest.approx(81 / 33)
        assert found.compactness == pytest.approx(1 - (math.exp(entropy) - 1) / 3)
        # Ridge shrinks a component of variance v by v / (v + λ), λ = 1e-3 · mean variance; R² = 1 − (shrinkage)².
        penalty = 1e-3 * 18 / 4
        r = [1 - (penalty / (v + penalty)) ** 2 for v in (8, 8, 2)]
        assert found.retention == pytest.approx(sum(r) / 3)
        c = found.compactness
        assert found.score.value == pytest.approx(200 * c * found.retention / (c + found.retention))

    def test_structural_consistency(self):
        """Angles 0°, 30°, 90° have distances in the order 01, 12, 02; 0°, 60°, 90° in the order 12, 01, 02."""

        def at(*degrees):
            return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

        rho = stats.spearmanr([1, 3, 2], [2, 3, 1]).statistic
        found = structure.structural_consistency({"sequence": ([at(0, 30, 90)], [at(0, 60, 90)])}, samples=0)
        assert found.levels == {"sequence": pytest.approx(rho)} and found.score.value == pytest.approx(
            100 * rho
        )
        two = {
            "token": ([at(0, 30, 90), at(0, 30, 90), at(5, 7)], [at(0, 60, 90), 2 * at(0, 30, 90), at(7, 5)]),
            "sequence": ([at(0, 30, 90)], [at(0, 30, 90)]),
        }
        found = structure.structural_consistency(two, samples=0)
        assert found.levels["token"] == pytest.approx((1 + rho) / 2)  # a group of two gives no order
        assert found.score.value == pytest.approx(100 * ((1 + rho) / 2 + 1) / 2)


class TestSyntheticSpaces:
    def test_identical(self, teacher):
        held, fit = teacher
        assert structure.semantic_alignment(held, held, fit, fit).value == pytest.approx(100, abs=0.5)
        found = structure.representation_compactness(held, held, fit, fit, samples=20)
        assert found.score.value == pytest.approx(96, abs=2) and found.retention > 0.99
        groups = {"token": ([x for x in held.reshape(-1, 10, WIDTH)],) * 2, "sequence": ([held], [held])}
        assert structure.structural_consistency(groups, samples=5).score == pytest.approx((100, 100, 100))
        assert structure.change([held, held]) == pytest.approx((0, 0), abs=1e-9)

    def test_unrelated(self, teacher, unrelated):
        (held, fit), (other, other_fit) = teacher, unrelated
        assert structure.semantic_alignment(other, held, other_fit, fit).value < 5
        assert structure.representation_compactness(other, held, other_fit, fit, samples=5).score.value < 3
        found = structure.structural_consistency({"sequence": ([other], [held])}, samples=5)
        assert found.score.value < 5
        assert structure.change([held[:200], other[:200]]).cka_distance == pytest.approx(1, abs=0.05)

    def test_collapse_to_one_direction(self, teacher, collapsed):
        """The student keeps the largest share of variance that one direction can, and is as compact as possible."""
        (held, fit), (student, student_fit) = teacher, collapsed
        found = structure.representation_compactness(student, held, student_fit, fit, samples=20)
        assert found.effective_rank == pytest.approx(1, abs=1e-3) and found.compactness > 0.999
        assert found.score.value < 5 and found.score.high < 5

    def test_all_alike(self, teacher):
        held, fit = teacher
        student, student_fit = (np.ones((len(x), 8)) for x in teacher)
        found = structure.representation_compactness(student, held, student_fit, fit, samples=2)
        assert found.score.value == 0 and found.effective_rank == 1
        assert structure.semantic_alignment(student, held, student_fit, fit, samples=2).value == 0

    def test_rotation_and_width_do_not_matter(self, teacher):
        """The student is the teacher, rotated into a wider space."""
        held, fit = teacher
        turn = np.linalg.qr(np.random.default_rng(5).normal(size=(300, WIDTH)))[0].T
        found = structure.semantic_alignment(held @ turn, held, fit @ turn, fit)
        assert found.value == pytest.approx(100, abs=0.5)
        groups = {"sequence": ([held @ turn], [held])}
        assert structure.structural_consistency(groups, samples=2).score.value == pytest.approx(100, abs=1e-6)
        turned = structure.change([held[:, :50], held[:, :50] @ turn[:50, :50]])
        assert turned.rcs > 0.4
        square = np.linalg.qr(np.random.default_rng(6).normal(size=(50, 50)))[0]
        turned = structure.change([held[:, :50], held[:, :50] @ square])
        assert turned.rcs > 0.4 and turned.cka_distance == pytest.approx(0, abs=1e-9)

    def test_domain_capture_looks_at_the_domain_alone(self, teacher, unrelated):
        """The student has lost the terms of the domain and nothing else."""
        (held, fit), (other, _) = teacher, unrelated
        domain = np.arange(len(held)) < 100
        student = np.where(domain[:, None], other, held)
        everything = structure.semantic_alignment(student, held, fit, fit).value
        assert structure.domain_capture(student, held, domain, fit, fit).value < 10 < 85 < everything
        assert structure.domain_capture(student, held, ~domain, fit, fit).value > 99

    def test_debiased_cka_of_few_unrelated_vectors(self):
        """There the plain CKA is far from 0."""
        values = []
        for seed in range(10):
            x, y = np.random.default_rng(seed).normal(size=(2, 50, 64))
            values.append(structure.debiased_cka(x, y))
        assert abs(np.mean(values)) < 0.05
        centred = [z - z.mean(0) for z in (x, y)]
        grams = [z @ z.T for z in centred]
        plain = (grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1])
        assert plain > 0.3

    def test_intervals_hold_the_value_and_shrink(self, teacher):
        held, fit = teacher
        noise = np.random.default_rng(8).normal(size=(4000, WIDTH)) * 0.1
        student, student_fit = (x + n for x, n in zip(teacher, halves(noise), strict=True))
        widths = []
        for n in (100, 1000):
            found = structure.semantic_alignment(student[:n], held[:n], student_fit, fit)
            assert found.low < found.value < found.high
            widths.append(found.high - found.low)
        assert widths[1] < widths[0] / 2
        again = structure.semantic_alignment(student[:n], held[:n], student_fit, fit)
        assert again == found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: structure.change([np.ones((5, 2))]), "got 1, expected at least 2"),
        (lambda: structure.debiased_cka(np.ones((3, 2)), np.ones((3, 2))), "at least 4"),
        (lambda: structure.debiased_cka(np.ones((5, 2)), np.ones((4, 2))), "5 and 4 vectors"),
        (lambda: structure.debiased_cka(np.ones(5), np.ones(5)), r"shape \(5,\)"),
        (lambda: structure.change([np.full((5, 2), np.nan)] * 2), "10 of 10 values are NaN"),
        (lambda: structure.structural_consistency({}), "levels: got none"),
        (
            lambda: structure.structural_consistency({"token": ([np.ones((2, 2))], [np.ones((2, 2))])}),
            "token: got no group of 3 units",
        ),
        (
            lambda: structure.domain_capture(*[np.ones((5, 2))] * 2, [False] * 5, *[np.ones((5, 2))] * 2),
            "none of 5 spans",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_torch_tensors_are_welcome():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert structure.debiased_cka(x, 3 * x) == pytest.approx(1.0)
