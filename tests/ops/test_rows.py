"""Operators compare rows drawn from a sequence, and the mean over all draws is the whole loss."""

import itertools
import math

import pytest
import torch
from operator_checks import BACKENDS

from dsdistill.bench import verify
from dsdistill.ops import attention_alignment, pairwise_alignment
from dsdistill.ops.attention import triton_schedule

EXACT = tuple(b for b in BACKENDS if b != "triton")
N = 6
MASK = torch.arange(N)[None] < torch.tensor([[6], [4], [0]])
VISIBLE = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "masked": {"mask": MASK},
    "masked-causal": {"mask": MASK, "causal": True},
    "segments": {"segments": torch.tensor([[0, 0, 0, 0, 1, 1]] * 3), "causal": True, "window": 3},
}


def tensors(heads=(4, 2, 4, 1), tokens=N, batch=3, widths=(5, 3)):
    torch.manual_seed(0)
    made = [torch.randn(batch, h, tokens, widths[i // 2], dtype=torch.float64) for i, h in enumerate(heads)]
    return [x.requires_grad_() if i < 2 else x for i, x in enumerate(made)]


def with_gradients(given, function=attention_alignment, **options):
    """Return the loss and its gradients with respect to the student's tensors."""
    loss = function(*given, **options)
    return [loss, *torch.autograd.grad(loss, [x for x in given if x.requires_grad])]


def all_draws(counts, rows):
    """Yield every choice of `rows` tokens of each sequence; shorter sequences give all tokens, filled up with −1."""
    choices = []
    for count in counts:
        own = itertools.combinations(range(count), min(rows, count))
        choices.append([[*chosen, *[-1] * (rows - len(chosen))] for chosen in own])
    for chosen in itertools.product(*choices):
        yield torch.tensor(chosen)


def mean_over_draws(given, counts, rows, function=attention_alignment, **options):
    total, number = None, 0
    for index in all_draws(counts, rows):
        found = with_gradients(given, function, rows=(index, None), **options)
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        number += 1
    return [x / number for x in total]


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("divergence", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize("backend", EXACT)
def test_the_mean_over_all_draws_of_attention_rows_is_the_whole_loss(backend, divergence, visible):
    """Lengths are unequal, keys grouped in both models; divisors are those of all rows."""
    given = tensors()
    options = {"divergence": divergence, "backend": backend, **VISIBLE[visible]}
    counts = MASK.sum(1).tolist() if "mask" in options else [N, 2, 1]
    if "mask" not in options:  # 15 draws instead of 3375: the other sequences have one each
        options["mask"] = torch.arange(N)[None] < torch.tensor(counts)[:, None]
    expected = with_gradients(given, **options | {"backend": "reference"})
    for mine, true in zip(mean_over_draws(given, counts, 2, **options), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("heads", ["mean", "group"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_mean_over_all_draws_with_averaged_heads_is_the_whole_loss(backend, divergence, heads):
    given = tensors(heads=(2, 1, 4, 2))
    options = {"divergence": divergence, "heads": heads, "mask": MASK, "causal": True, "backend": backend}
    expected = with_gradients(given, **options | {"backend": "reference"})
    for mine, true in zip(mean_over_draws(given, [6, 4, 0], 3, **options), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", EXACT)
def test_a_relation_of_one_side_keeps_both_gradients(backend):
    """Q-Q: the rows are queries, all tokens are keys."""
    query, _, teacher, _ = tensors(heads=(4, 4, 4, 4), batch=1)
    options = {"divergence": "mse", "backend": backend}

    def related(student, teacher, **given):
        return attention_alignment(student, student, teacher, teacher, **options | given)

    expected = with_gradients((query, teacher), related, backend="reference")
    for mine, true in zip(mean_over_draws((query, teacher), [N], 2, related), expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "rows"),
    [
        # Student (1/4, 3/4) against (1/2, 1/2) in row 0, the other way round in row 1.
        ("kl", (math.log(2) / 2 + math.log(2 / 3) / 2, math.log(1 / 2) / 4 + math.log(3 / 2) * 3 / 4)),
        ("mse", (2 / 16, 2 / 16)),
        ("score_mse", (math.log(3) ** 2, math.log(3) ** 2)),
    ],
)
def test_rows_by_hand(backend, divergence, rows):
    student = torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1)
    teacher = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)

    def loss(index, weights=None, **options):
        chosen = torch.tensor([index]), None if weights is None else torch.tensor([weights])
        given = {"divergence": divergence, "reduction": "sum", "backend": backend, "rows": chosen}
        return attention_alignment(student, key, teacher, key, **given | options).item()

    assert loss([1]) == pytest.approx(2 * rows[1], rel=1e-6)  # n/R = 2
    assert loss([-1, 0]) == pytest.approx(2 * rows[0], rel=1e-6)
    assert loss([0, 0]) == pytest.approx(2 * rows[0], rel=1e-6)  # twice, 2/2 each
    assert loss([1, 0], [0.5, 3.0]) == pytest.approx(3 * rows[0] + rows[1] / 2, rel=1e-6)
    assert loss([-1, -1]) == 0
    whole = 2 if divergence == "kl" else 4
    assert loss([1], reduction="mean") == pytest.approx(2 * rows[1] / whole, rel=1e-6)
    # A masked token is neither row nor column: nothing is left of row 1, and row 0 sees only its own key.
    hidden = {"mask": torch.tensor([[True, False]])}
    assert loss([1], **hidden) == 0
    assert loss([0, 1], **hidden) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("divergence", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize("backend", EXACT)
def test_all_rows_in_any_order_are_the_whole(backend, divergence, visible):
    given = tensors()
    options = {"divergence": divergence, **VISIBLE[visible]}
    index = torch.tensor([[3, 1, 0, 5, 4, 2]] * 3)
    expected = with_gradients(given, backend="reference", **options)
    found = with_gradients(given, rows=(index, None), backend=backend, **options)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(
    ("divergence", "tokens", "drawn"), [("kl", 150, 70), ("mse", 150, 70), ("score_mse", 150, 70)]
)
def test_many_rows_in_blocks(backend, divergence, tokens, drawn):
    """There are more rows than in a block, unordered, with repeats, weights of their own and filler."""
    given = tensors(tokens=tokens, batch=2)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-1, tokens, (2, drawn), generator=generator)
    weights = torch.rand(2, drawn, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, tokens, generator=generator) > 0.2
    for order in ({"causal": True}, {"window": 11}, {"causal": True, "window": 40}, {}):
        options = {"divergence": divergence, "mask": mask, "rows": (index, weights), **order}
        expected = with_gradients(given, backend="reference", **options)
        for mine, true in zip(with_gradients(given, backend=backend, **options), expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


def pairwise_tensors(tokens=N, batch=3):
    torch.manual_seed(0)
    student, teacher = torch.randn(batch, tokens, 4).double(), torch.randn(batch, tokens, 3).double()
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("relation", ["cosine", "dot"])
@pytest.mark.parametrize("backend", EXACT)
def test_the_mean_over_all_draws_of_pairwise_rows_is_the_whole_loss(backend, relation, weighted):
    given = pairwise_tensors()
    options = {"mask": MASK, "relation": relation, "backend": backend}
    if weighted:
        options["weights"] = torch.rand(3, N, generator=torch.Generator().manual_seed(1)).double()
    expected = with_gradients(given, pairwise_alignment, **options | {"backend": "reference"})
    found = mean_over_draws(given, [6, 4, 0], 2, pairwise_alignment, **options)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tokens", [20, 90])  # for 90 rows Gram matrices need fewer products
@pytest.mark.parametrize("backend", EXACT)
def test_pairwise_rows_in_any_order_with_repeats(backend, tokens):
    given = pairwise_tensors(tokens, batch=2)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-1, tokens, (2, tokens), generator=generator)
    rows = index, torch.rand(2, tokens, generator=generator).double()
    options = {"mask": torch.rand(2, tokens, generator=generator) > 0.2, "rows": rows}
    expected = with_gradients(given, pairwise_alignment, backend="reference", **options)
    found = with_gradients(given, pairwise_alignment, backend=backend, **options)
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-13)


def test_pairwise_rows_by_hand():
    """Compare the dots of (1,0), (1,1) with those of (1,0), (0,2): row 0 differs by 1 once, row 1 by 1 and by 2."""
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    for backend in EXACT:
        for index, expected in ((0, 2 * 1 / 4), (1, 2 * 5 / 4)):
            rows = torch.tensor([[index]]), None
            loss = pairwise_alignment(student, teacher, relation="dot", rows=rows, backend=backend)
            assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_wrong_pairwise_rows_are_named():
    given, rows = pairwise_tensors(batch=1), (torch.tensor([[0, 1]]), None)
    with pytest.raises(
        ValueError, match=r"^rows: got relation 'distance', [^\n]*expected 'cosine' or 'dot'$"
    ):
        pairwise_alignment(*given, relation="distance", rows=rows)
    single = [x.float() for x in given]
    with pytest.raises(ValueError, match=r"'triton' cannot run pairwise_alignment: [^\n]*; can run"):
        pairwise_alignment(*single, rows=rows, backend="triton")


@pytest.mark.parametrize("heads", ["mean", "group"])
def test_rows_of_averaged_heads_have_no_kernel(heads):
    given = [x.float() for x in tensors(heads=(2, 1, 4, 2))]
    rows = torch.zeros(3, 1, dtype=torch.int64), None
    for backend in ("cpp", "triton"):
        with pytest.raises(
            ValueError, match=f"'{backend}' cannot run attention_alignment: [^\n]*; can run: chunked"
        ):
            attention_alignment(*given, heads=heads, rows=rows, backend=backend)


def test_wrong_rows_are_named():
    given = tensors(batch=1)
    for rows, message in (
        ((torch.tensor([[0, N]]), None), "rows: got position 6, expected at most N − 1 = 5"),
        ((torch.tensor([0, 1]), None), r"rows: got an index \(2,\) torch.int64, expected \(1, R\) int64"),
        ((torch.zeros(1, 2), None), "torch.float32, expected"),
        ((torch.zeros(2, 2, dtype=torch.int64), None), r"\(2, 2\) torch.int64, expected \(1, R\)"),
        ((torch.tensor([[0, 1]]), torch.ones(1, 3)), r"weights of rows: got shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_alignment(*given, rows=rows)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels do not run here on CPU tensors")
@pytest.mark.parametrize("plan", ["merged", "sweeps"])
@pytest.mark.parametrize("name", ["kl-rows", "mse-rows", "score_mse-rows", "mse-rows-packed"])
def test_both_plans_of_triton(name, plan, monkeypatch):
    monkeypatch.setattr(triton_schedule, "default_plan", plan)
    (case,) = (case for case in verify.all_cases() if str(case) == f"attention-{name}")
    verify.check_parity(case, "triton", torch.float32)
