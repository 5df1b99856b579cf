import math

import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import attention_alignment, relation_heads


@every_check("attention")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@gradient_cases(
    "attention",
    *(
        f"{d}-{v}"
        for d in ("kl", "mse", "score_mse")
        for v in ("packed", "grouped-ragged", "odd-width", "causal")
    ),
    *(f"{d}-mean-heads-masked" for d in ("kl", "mse")),
)
def test_gradcheck(case, backend):
    run_gradcheck(case, backend)


def two_tokens():
    """Student scores [[0, log 3], [0, 0]] and teacher scores [[0, 0], [0, log 3]], one head of width 1."""
    student_query = torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1)
    teacher_query = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    return student_query, key, teacher_query, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("divergence", "causal", "expected"),
    [
        # Rows of (student, teacher): (1/4, 3/4) against (1/2, 1/2), then the other way round. Causal order
        # leaves a single key to row 0, which then agrees.
        ("kl", False, math.log(2) / 2 + math.log(2 / 3) / 2 + math.log(1 / 2) / 4 + math.log(3 / 2) * 3 / 4),
        ("kl", True, math.log(1 / 2) / 4 + math.log(3 / 2) * 3 / 4),
        ("mse", False, 4 / 16),
        ("mse", True, 2 / 16),
        ("score_mse", False, 2 * math.log(3) ** 2),
        ("score_mse", True, math.log(3) ** 2),
    ],
)
def test_by_hand(backend, divergence, causal, expected):
    options = {"divergence": divergence, "causal": causal, "reduction": "sum"}
    loss = attention_alignment(*two_tokens(), **options, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["kl", "mse", "score_mse"])
def test_mean_divides_by_existing_entries(backend, divergence):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 9, 4) for _ in range(4)]
    mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
    counts = {
        False: {"kl": 3 * 14, "mse": 3 * (81 + 25), "score_mse": 3 * (81 + 25)},
        True: {"kl": 3 * 14, "mse": 3 * (45 + 15), "score_mse": 3 * (45 + 15)},
    }
    for causal in (False, True):
        options = {"mask": mask, "causal": causal, "divergence": divergence, "backend": backend}
        mean = attention_alignment(*tensors, **options)
        total = attention_alignment(*tensors, **options, reduction="sum")
        assert mean.item() == pytest.approx(total.item() / counts[causal][divergence], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_keys_equal_repeated_keys(backend):
    torch.manual_seed(0)
    query, teacher_query = torch.randn(2, 6, 11, 8), torch.randn(2, 6, 11, 8)
    key, teacher_key = torch.randn(2, 2, 11, 8), torch.randn(2, 3, 11, 8)
    grouped = attention_alignment(query, key, teacher_query, teacher_key, backend=backend)
    repeated = attention_alignment(
        query,
        key.repeat_interleave(3, 1),
        teacher_query,
        teacher_key.repeat_interleave(2, 1),
        backend=backend,
    )
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments_equal_separate_sequences(backend):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 10, 8) for _ in range(4)]
    segments = torch.tensor([[0] * 6 + [1] * 4])
    packed = attention_alignment(*tensors, segments=segments, backend=backend, reduction="sum")
    parts = [
        attention_alignment(*(t[:, :, part] for t in tensors), backend=backend, reduction="sum")
        for part in (slice(0, 6), slice(6, 10))
    ]
    torch.testing.assert_close(packed, sum(parts))


def test_relation_heads_of_the_same_count_are_the_identity():
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(relation_heads(x, 4), x)


def test_relation_heads_split_the_joined_width():
    x = torch.randn(2, 4, 5, 6)
    split = relation_heads(x, 8)
    assert split.shape == (2, 8, 5, 3)
    assert torch.equal(split[:, 2], x[:, 1, :, :3])
    with pytest.raises(ValueError, match="divisor"):
        relation_heads(x, 7)


def call(**changes):
    arguments = {name: torch.randn(1, 4, 6, 8) for name in ("student_query", "student_key")}
    arguments |= {name: torch.randn(1, 4, 6, 8) for name in ("teacher_query", "teacher_key")}
    arguments |= changes
    tensors = [arguments.pop(n) for n in ("student_query", "student_key", "teacher_query", "teacher_key")]
    return attention_alignment(*tensors, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher_query": torch.randn(1, 2, 6, 8), "teacher_key": torch.randn(1, 2, 6, 8)},
            r"teacher_query.*H=4",
        ),
        ({"student_key": torch.randn(1, 3, 6, 8)}, "divisor of H=4"),
        ({"student_key": torch.randn(1, 4, 6, 9)}, "D=8"),
        ({"teacher_key": torch.randn(1, 4, 7, 8)}, "N=6"),
        ({"divergence": "js"}, "'kl', 'mse', 'score_mse'"),
        ({"heads": "mean", "divergence": "score_mse"}, "averages probabilities"),
        ({"mask": torch.ones(1, 6)}, "torch.bool"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"expected \(1, 6\)"),
        ({"window": 0}, "at least 1"),
        ({"segments": torch.zeros(1, 6)}, "integers"),
        ({"reduction": "none"}, "reduction"),
        ({"student_query": torch.zeros(1, 4, 6, 8, dtype=torch.int64)}, "floating"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
