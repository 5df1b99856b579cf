import math

import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck

from dsdistill.ops import BackendError, attention_alignment, backends, relation_heads
from dsdistill.ops.attention import chunked


@every_check("attention")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@gradient_cases(
    "attention",
    *(
        f"{d}-{v}"
        for d in ("kl", "mse", "score_mse")
        for v in ("packed", "grouped-ragged", "odd-width", "causal", "rows", "rows-packed")
    ),
    *(f"{d}-mean-heads-masked" for d in ("kl", "mse")),
    *(
        f"{d}-group-heads{v}"
        for d in ("kl", "mse")
        for v in ("", "-masked", "-packed", "-one-token", "-rows")
    ),
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


PLAIN = ("reference", "chunked")


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_groups_by_hand(backend, divergence):
    """Only row 0 differs. Student heads have (1/4, 3/4) and (1/2, 1/2).

    The four teacher heads give the second key 1/2, 3/4, 1/4 and 1/10, so the groups give it 5/8 and 7/40.
    """

    def query(*shares):
        row = torch.tensor([math.log(share / (1 - share)) for share in shares], dtype=torch.float64)
        return torch.stack([row, torch.zeros_like(row)], dim=1)[None, :, :, None]

    key = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    options = {"divergence": divergence, "heads": "group", "reduction": "sum", "backend": backend}
    found = attention_alignment(query(3 / 4, 1 / 2), key, query(1 / 2, 3 / 4, 1 / 4, 1 / 10), key, **options)
    if divergence == "kl":
        first = 3 / 8 * math.log((3 / 8) / (1 / 4)) + 5 / 8 * math.log((5 / 8) / (3 / 4))
        second = 33 / 40 * math.log((33 / 40) / (1 / 2)) + 7 / 40 * math.log((7 / 40) / (1 / 2))
    else:
        first, second = 2 * (1 / 8) ** 2, 2 * (13 / 40) ** 2
    assert found.item() == pytest.approx(first + second, rel=1e-12)
    mean = attention_alignment(
        query(3 / 4, 1 / 2),
        key,
        query(1 / 2, 3 / 4, 1 / 4, 1 / 10),
        key,
        **options | {"reduction": "mean"},
    )
    assert mean.item() == pytest.approx(
        (first + second) / (2 * 2 if divergence == "kl" else 2 * 4), rel=1e-12
    )


VISIBLE = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "mask": {"mask": torch.arange(9)[None] < torch.tensor([[9], [5]])},
    "packed": {"segments": torch.tensor([[0] * 6 + [1] * 3] * 2), "causal": True},
}


def both(tensors, options, others, other_options):
    """Return values and gradients at the student's query and key of two calls."""
    found = []
    for given, chosen in ((tensors, options), (others, other_options)):
        leaves = [given[0].clone().requires_grad_(), given[1].clone().requires_grad_()]
        loss = attention_alignment(*leaves, *given[2:], **chosen)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("visible", VISIBLE.values(), ids=VISIBLE)
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", ["kl", "mse"])
class TestGroups:
    def test_whole_matrices(self, divergence, backend, visible):
        """Softmax, repeated keys and the mean of each group are written out; head widths differ."""
        torch.manual_seed(0)
        query, key = torch.randn(2, 4, 9, 5).double(), torch.randn(2, 2, 9, 5).double()
        teacher_query, teacher_key = torch.randn(2, 12, 9, 3).double(), torch.randn(2, 3, 9, 3).double()
        query.requires_grad_(), key.requires_grad_()
        options = {"divergence": divergence, "heads": "group", "backend": backend, **visible}
        found = attention_alignment(query, key, teacher_query, teacher_key, **options)

        distance = torch.arange(9)[:, None] - torch.arange(9)
        seen = torch.ones(2, 9, 9, dtype=torch.bool)
        seen &= distance >= 0 if "causal" in visible else True
        seen &= distance.abs() < visible.get("window", 99)
        if "segments" in visible:
            seen &= visible["segments"][:, :, None] == visible["segments"][:, None]
        valid = visible.get("mask", torch.ones(2, 9, dtype=torch.bool))
        seen = (seen & valid[:, None] & valid[:, :, None])[:, None]
        maps = []
        for q, k in ((query, key), (teacher_query, teacher_key)):
            scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(q.shape[-1])
            maps.append(scores.masked_fill(~seen, -1e9).softmax(-1))
        mine, other = maps[0], torch.stack([maps[1][:, 3 * g : 3 * g + 3].mean(1) for g in range(4)], 1)
        if divergence == "kl":
            rows = (other * (other.clamp_min(1e-30) / mine.clamp_min(1e-30)).log()).sum(-1)
            expected = rows[valid[:, None].expand_as(rows)].sum() / (4 * valid.sum())
        else:
            expected = (mine - other)[seen.expand_as(mine)].square().sum() / (4 * seen.sum())
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(torch.autograd.grad(x, (query, key)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)

    def test_groups_of_one_are_heads_that_match(self, divergence, backend, visible):
        torch.manual_seed(0)
        tensors = [torch.randn(2, 4, 9, 5), torch.randn(2, 2, 9, 5)]
        tensors += [torch.randn(2, 4, 9, 7), torch.randn(2, 1, 9, 7)]
        options = {"divergence": divergence, "backend": backend, **visible}
        grouped = options | {"heads": "group"}
        for mine, true in both(tensors, grouped, tensors, options):
            torch.testing.assert_close(mine, true)

    def test_one_group_is_the_mean(self, divergence, backend, visible):
        torch.manual_seed(0)
        tensors = [torch.randn(2, 1, 9, 5), torch.randn(2, 1, 9, 5)]
        tensors += [torch.randn(2, 6, 9, 7), torch.randn(2, 3, 9, 7)]
        options = {"divergence": divergence, "backend": backend, **visible}
        for mine, true in both(tensors, options | {"heads": "group"}, tensors, options | {"heads": "mean"}):
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("visible", ["all", "causal", "window"])
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_packed_groups_equal_separate_sequences(divergence, backend, visible):
    torch.manual_seed(0)
    tensors = [torch.randn(1, h, 10, 8) for h in (2, 1, 6, 3)]
    options = {"divergence": divergence, "heads": "group", "reduction": "sum", "backend": backend}
    segments = torch.tensor([[0] * 6 + [1] * 4])
    packed = attention_alignment(*tensors, segments=segments, **options, **VISIBLE[visible])
    parts = [
        attention_alignment(*(t[:, :, part] for t in tensors), **options, **VISIBLE[visible])
        for part in (slice(0, 6), slice(6, 10))
    ]
    torch.testing.assert_close(packed, sum(parts))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_groups_have_no_kernel(backend, monkeypatch):
    tensors = [torch.randn(1, h, 6, 8) for h in (2, 2, 4, 4)]
    with pytest.raises(
        BackendError, match=f"^backend '{backend}' cannot run attention_alignment: [^\n]*can run"
    ):
        attention_alignment(*tensors, heads="group", backend=backend)
    monkeypatch.setattr(backends, "_taken", {})
    attention_alignment(*tensors, heads="group")
    assert backends.backends_taken() == {"attention_alignment": ["chunked"]}


def test_groups_in_blocks(monkeypatch):
    """Blocks of 16 rows of one sequence give what whole matrices give."""
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)
    torch.manual_seed(0)
    tensors = [torch.randn(3, h, 40, 8).double() for h in (2, 1, 6, 3)]
    options = {"heads": "group", "causal": True, "window": 7}
    for mine, true in both(
        tensors, options | {"backend": "chunked"}, tensors, options | {"backend": "reference"}
    ):
        torch.testing.assert_close(mine, true)


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
        ({"heads": "group", "divergence": "score_mse"}, "heads='group' averages probabilities"),
        (
            {
                "heads": "group",
                "teacher_query": torch.randn(1, 6, 6, 8),
                "teacher_key": torch.randn(1, 6, 6, 8),
            },
            "teacher_query: got H=6, expected a multiple of the student's H=4",
        ),
        (
            {
                "heads": "group",
                "teacher_query": torch.randn(1, 2, 6, 8),
                "teacher_key": torch.randn(1, 2, 6, 8),
            },
            "teacher_query: got H=2, expected a multiple of the student's H=4",
        ),
        ({"heads": "groups"}, "'match', 'mean', 'group'"),
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
