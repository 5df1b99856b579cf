import math

import pytest
import torch
import torch.nn.functional as F
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import logit_alignment, soft_label_alignment, token_cross_entropy
from dsdistill.ops.soft_label import head as head_module
from dsdistill.ops.soft_label.divergence import DIVERGENCES

PLAIN = tuple(backend for backend in BACKENDS if backend in ("reference", "chunked"))


@every_check("soft-label")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@every_check("cross-entropy")
def test_cross_entropy_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


# The factors of akl are constants for its gradient, so that it is not the slope of its value.
SLOPES = tuple(divergence for divergence in DIVERGENCES if divergence != "akl")


@gradient_cases(
    "soft-label",
    *(f"{divergence}-{kind}" for divergence in SLOPES for kind in ("warm", "capped")),
    "student-capped",
    "teacher-capped",
)
def test_gradcheck(case, backend):
    run_gradcheck(case, backend)


@gradient_cases("cross-entropy", "plain", "ragged", "capped", "smoothed")
def test_cross_entropy_gradcheck(case, backend):
    run_gradcheck(case, backend)


def entropy_terms(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


P, Q = (0.5, 0.5), (0.25, 0.75)
BY_HAND = {
    "forward_kl": entropy_terms(P, Q),
    "reverse_kl": entropy_terms(Q, P),
    # β = 0.25: m = 0.25 p + 0.75 q.
    "jsd": 0.25 * entropy_terms(P, (0.3125, 0.6875)) + 0.75 * entropy_terms(Q, (0.3125, 0.6875)),
    # α = 0.2: 0.2 p + 0.8 q.
    "skew_kl": entropy_terms(P, (0.3, 0.7)),
    "skew_reverse_kl": entropy_terms(Q, (0.45, 0.55)),  # α = 0.2: 0.2 q + 0.8 p
    "akl": (entropy_terms(P, Q) + entropy_terms(Q, P))
    / 2,  # head and tail have one entry each; both differ by 0.25
    "tvd": 0.25,
    "logit_mse": (math.log(2) ** 2 + math.log(1.5) ** 2) / 2,
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_by_hand(divergence):
    # Temperature 2 halves the logits: z = 2 log of the probabilities wanted.
    logits_s, logits_t = 2 * torch.tensor(Q).log(), 2 * torch.tensor(P).log()
    loss = logit_alignment(
        logits_s, logits_t, divergence=divergence, temperature=2.0, beta=0.25, alpha=0.2, reduction="sum"
    )
    assert loss.item() == pytest.approx(BY_HAND[divergence], rel=1e-5)


def adaptive_kl(student, teacher, mu):
    """Return the adaptive KL of a row of logits, entry by entry (Wu et al. 2024), and its head's number of entries."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i].item())
    head, mass = [], 0.0
    for i in order:
        mass += p[i].item()
        if head and mass > mu:
            break
        head.append(i)
    gaps = [sum(abs(p[i] - q[i]).item() for i in part) for part in (head, set(order) - set(head))]
    forward, reverse = (sum(a[i] * (a[i] / b[i]).log() for i in order) for a, b in ((p, q), (q, p)))
    return (gaps[0] * forward + gaps[1] * reverse) / sum(gaps), len(head)


@pytest.mark.parametrize("mu", [0.4, 0.5, 0.8])
def test_adaptive_kl_by_loops(mu):
    """Compare value and gradient; in some rows the likeliest entry alone exceeds μ, in some the head has several."""
    torch.manual_seed(0)
    hidden_s, hidden_t = (torch.randn(1, 12, 3, dtype=torch.float64) for _ in range(2))
    head_s, head_t = (torch.randn(9, 3, dtype=torch.float64) for _ in range(2))
    hidden_s.requires_grad_()
    rows = [
        adaptive_kl(s, t, mu) for s, t in zip(hidden_s[0] @ head_s.T, hidden_t[0] @ head_t.T, strict=True)
    ]
    expected = sum(value for value, _ in rows)
    assert {1, 2} <= {size for _, size in rows}
    true = torch.autograd.grad(expected, hidden_s)[0]
    options = {"divergence": "akl", "mu": mu, "reduction": "sum"}
    for backend in PLAIN:
        loss = soft_label_alignment(hidden_s, head_s, hidden_t, head_t, **options, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden_s)[0], true)
    loss = logit_alignment(hidden_s @ head_s.T, hidden_t @ head_t.T, **options)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_heads_equal_their_logits(backend, divergence):
    torch.manual_seed(0)
    hidden_s, hidden_t = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    head_s, head_t = torch.randn(11, 3), torch.randn(11, 4)
    options = {"divergence": divergence, "temperature": 3.0}
    expected = logit_alignment(hidden_s @ head_s.T, hidden_t @ head_t.T, **options)
    loss = soft_label_alignment(hidden_s, head_s, hidden_t, head_t, **options, backend=backend)
    torch.testing.assert_close(loss, expected)


def test_bounds_and_symmetry():
    torch.manual_seed(0)
    student, teacher = 20 * torch.randn(50, 9), 20 * torch.randn(50, 9)
    for divergence in ("skew_kl", "skew_reverse_kl"):
        assert logit_alignment(student, teacher, divergence=divergence, alpha=0.1).item() <= math.log(10)
    there = logit_alignment(student, teacher, divergence="jsd", beta=0.5)
    back = logit_alignment(teacher, student, divergence="jsd", beta=0.5)
    torch.testing.assert_close(there, back)
    assert logit_alignment(student, teacher, divergence="tvd").item() <= 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_logits_are_never_read(divergence):
    torch.manual_seed(0)
    student = torch.randn(4, 6, requires_grad=True)
    teacher = torch.randn(4, 6)
    mask = torch.tensor([True, False, True, False])
    expected = logit_alignment(student[mask], teacher[mask], divergence=divergence)
    with torch.no_grad():
        student[1] = math.nan
        teacher[3] = math.inf
    loss = logit_alignment(student, teacher, mask=mask, divergence=divergence)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[~mask].any()


@pytest.mark.parametrize("backend", PLAIN)
def test_cross_entropy_is_pytorchs(backend):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 40, 8), torch.randn(101, 8)
    labels = torch.randint(101, (2, 40))
    labels[0, :7] = -100
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(token_cross_entropy(hidden, head, labels, backend=backend), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_blocks_and_slices(divergence, monkeypatch):
    """All tokens in ranges, in blocks of 7 and slices of 3, must give the same as whole logits."""
    inputs, (teacher, teacher_head) = draws(torch.float64)
    student, head, bias = inputs
    options = {"student_bias": bias, "divergence": divergence}
    expected = soft_label_alignment(student, head, teacher, teacher_head, **options, backend="reference")
    for name in ("MIN_TOKENS", "MAX_TOKENS"):
        monkeypatch.setattr(head_module, name, 7)
    monkeypatch.setattr(head_module, "SLICE_ELEMENTS", 3 * 211)
    found = soft_label_alignment(student, head, teacher, teacher_head, **options, backend="chunked")
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("caps", [(2.0, 3.0), (2.0, None), (None, 3.0)], ids=str)
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_capped_logits_are_those_of_gemma_2(backend, divergence, caps):
    """Compare with c · tanh(z / c) of whole logits in plain PyTorch, in one block of tokens or several."""
    inputs, (teacher, teacher_head) = draws(torch.float64)
    student, head, bias = inputs

    def capped(z, cap):
        return z if cap is None else cap * torch.tanh(z / cap)

    options = {"divergence": divergence, "temperature": 1.5}
    logits = capped(F.linear(student, head, bias), caps[0]), capped(teacher @ teacher_head.T, caps[1])
    expected = logit_alignment(*logits, **options)
    found = soft_label_alignment(
        student,
        head,
        teacher,
        teacher_head,
        student_bias=bias,
        student_softcap=caps[0],
        teacher_softcap=caps[1],
        **options,
        backend=backend,
    )
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("backend", PLAIN)
def test_cross_entropy_of_capped_logits(backend):
    (hidden, head, bias), _ = draws(torch.float64)
    labels = torch.randint(211, (3, 40)).masked_fill(~MASKS["some"], -100)
    logits = 1.5 * torch.tanh(F.linear(hidden, head, bias) / 1.5)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    found = token_cross_entropy(hidden, head, labels, bias=bias, softcap=1.5, backend=backend)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, (hidden, head, bias)) for loss in (found, expected))
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("backend", PLAIN)
def test_smoothed_cross_entropy_is_pytorchs(backend, smoothing, softcap):
    """Compare value and gradients in float64, with bias, ignored labels and capped logits."""
    inputs, _ = draws(torch.float64)
    hidden, head, bias = inputs
    labels = torch.randint(211, (3, 40)).masked_fill(~MASKS["some"], -100)
    logits = F.linear(hidden, head, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    found = token_cross_entropy(
        hidden, head, labels, bias=bias, softcap=softcap, label_smoothing=smoothing, backend=backend
    )
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (found, expected))
    for mine, true in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, true)


def test_smoothing_is_a_share():
    with pytest.raises(ValueError, match="label_smoothing"):
        token_cross_entropy(
            torch.randn(1, 4, 3), torch.randn(7, 3), torch.zeros(1, 4).long(), label_smoothing=1.5
        )


@pytest.mark.parametrize("backend", PLAIN)
def test_frozen_head_gets_no_gradient(backend):
    hidden, head = torch.randn(1, 5, 3, requires_grad=True), torch.randn(7, 3)
    soft_label_alignment(hidden, head, torch.randn(1, 5, 4), torch.randn(7, 4), backend=backend).backward()
    assert head.grad is None
    assert hidden.grad.abs().sum() > 0


def draws(dtype):
    torch.manual_seed(0)
    student = torch.randn(3, 40, 8, dtype=dtype).requires_grad_()
    head, bias = (
        torch.randn(211, 8, dtype=dtype).requires_grad_(),
        torch.randn(211, dtype=dtype).requires_grad_(),
    )
    teacher, teacher_head = torch.randn(3, 40, 6, dtype=dtype), torch.randn(211, 6, dtype=dtype)
    return (student, head, bias), (teacher, teacher_head)


MASKS = {
    "some": torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.7,
    "one row": torch.tensor([[False], [True], [False]]).expand(3, 40),
    "none": torch.zeros(3, 40, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", PLAIN)
def test_places_give_what_the_mask_gives(backend, dtype, reduction, mask):
    """Soft labels and cross-entropy are equal to the last bit, gradients too."""
    inputs, (teacher, teacher_head) = draws(dtype)
    student, head, bias = inputs
    gold = torch.randint(211, (3, 40))
    index, options = mask.flatten().nonzero()[:, 0], {"reduction": reduction, "backend": backend}

    caps = {"student_softcap": 4.0, "teacher_softcap": 5.0} if reduction == "sum" else {}
    cap = {"softcap": 4.0} if reduction == "sum" else {}

    def soft(**counted):
        return soft_label_alignment(
            student, head, teacher, teacher_head, student_bias=bias, **counted, **options, **caps
        )

    losses = [
        (soft(mask=mask), soft(index=index)),
        (
            token_cross_entropy(student, head, gold.masked_fill(~mask, -100), bias=bias, **options, **cap),
            # Labels at other positions are not read.
            token_cross_entropy(
                student, head, gold.masked_fill(~mask, 5), bias=bias, index=index, **options, **cap
            ),
        ),
    ]
    for expected, found in losses:
        assert torch.equal(expected, found) and bool(found) == bool(mask.any())
        for mine, true in zip(
            *(torch.autograd.grad(loss, inputs) for loss in (found, expected)), strict=True
        ):
            assert torch.equal(mine, true)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), r"^index: got \(2, 2\) torch.int64, expected \(K,\) int64"),
        (torch.zeros(2), r"^index: got \(2,\) torch.float32, expected"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "^index: got device meta, expected cpu"),
    ],
)
def test_wrong_places_are_named(index, message):
    (student, head, _), (teacher, teacher_head) = draws(torch.float32)
    with pytest.raises(ValueError, match=message):
        soft_label_alignment(student, head, teacher, teacher_head, index=index)
    with pytest.raises(ValueError, match=message):
        token_cross_entropy(student, head, torch.zeros(3, 40, dtype=torch.int64), index=index)


def test_mask_and_places_exclude_each_other():
    (student, head, _), (teacher, teacher_head) = draws(torch.float32)
    mask = MASKS["some"]
    with pytest.raises(ValueError, match=r"^mask, index: got both, expected one of them"):
        soft_label_alignment(
            student, head, teacher, teacher_head, mask=mask, index=mask.flatten().nonzero()[:, 0]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_head": torch.randn(12, 4)}, "vocabularies of 11 and 12"),
        ({"student_head": torch.randn(11, 4)}, "D_s=3"),
        ({"temperature": 0.0}, "above 0"),
        ({"divergence": "kl"}, "'forward_kl'"),
        ({"beta": 1.5}, "beta"),
        ({"mu": -0.1}, "mu"),
        ({"student_bias": torch.randn(10)}, "V=11"),
        ({"student_softcap": 0.0}, "student_softcap: got 0.0, expected a number above 0, or None"),
        ({"teacher_softcap": -3.0}, "teacher_softcap: got -3.0, expected"),
        ({"backend": "cpp"}, "have only 'chunked', 'reference', 'triton'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {
        "student_hidden": torch.randn(2, 5, 3),
        "student_head": torch.randn(11, 3),
        "teacher_hidden": torch.randn(2, 5, 4),
        "teacher_head": torch.randn(11, 4),
    } | changes
    with pytest.raises(ValueError, match=message):
        soft_label_alignment(**arguments)


def test_labels_must_be_whole_numbers_of_the_right_shape():
    with pytest.raises(ValueError, match="int64"):
        token_cross_entropy(torch.randn(1, 4, 3), torch.randn(7, 3), torch.zeros(1, 4))
