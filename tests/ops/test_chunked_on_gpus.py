"""The chunked forms compute as on a GPU, but on a CPU: half-precision operands, large blocks, no wait.

Tensors say that they lie on a GPU, and products of half precision summed in float32, which torch has on GPUs alone, are
computed from the same operands here. What a GPU's own products give is not shown.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.bench import verify
from dsdistill.ops import (
    attention_alignment,
    gpu,
    hidden_alignment,
    pairwise_alignment,
    soft_label_alignment,
    token_cross_entropy,
    vocabulary_losses,
)
from dsdistill.ops.attention import chunked as attention

MATRICES = {"mm": 2, "bmm": 3}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Return how often each product in half precision ran."""
    ran: Counter[str] = Counter()

    def emulated(name, plain):
        def product(left, right, *, out_dtype=None, **options):
            if out_dtype is None:
                return plain(left, right, **options)
            assert left.dtype == right.dtype in (torch.bfloat16, torch.float16) and out_dtype == torch.float32
            assert left.dim() == right.dim() == MATRICES[name]
            ran[name] += 1
            return plain(left.float(), right.float())

        return product

    for name in MATRICES:
        monkeypatch.setattr(torch, name, emulated(name, getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return ran


CASES = [
    case
    for case in verify.all_cases()
    if case.name.endswith(("plain", "ragged", "packed", "grouped-ragged", "warm", "capped", "bias", "twins"))
    or case.name == "distance-shifted"
    or case.operator == "cross-entropy"
]

BY_IDENTITY = (
    *("score_mse-plain", "score_mse-ragged", "score_mse-grouped-ragged"),
    *(f"{relation}-{kind}" for relation in ("cosine", "dot") for kind in ("long-ragged", "twins")),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_meets_as_it_is(case, on_a_gpu):
    """Compare bfloat16 and float16 with float64; only identities and distances multiply numbers of higher precision."""
    for dtype in (torch.bfloat16, torch.float16):
        on_a_gpu.clear()
        verify.check_parity(case, "chunked", dtype)
        wide = case.operator == "pairwise" and case.options["relation"] == "distance"
        without = case.operator == "hidden" and "projection" not in case.tensors
        identity = case.name in BY_IDENTITY
        assert bool(on_a_gpu) != (wide or without or identity), "products of half precision"


@pytest.mark.parametrize("case", [c for c in CASES if c.operator == "pairwise"], ids=str)
def test_distances_in_float32(case, on_a_gpu):
    verify.check_parity(case, "chunked", torch.float32)
    assert not on_a_gpu


def test_blocks_are_large(on_a_gpu, monkeypatch):
    """A block holds its share of all matrices that exist at a time; calls that fit are one block."""
    x = torch.zeros(1)
    assert gpu.block_elements(x, 5) * 8 == 2**27
    calls = []
    original = attention._scores
    monkeypatch.setattr(attention, "_scores", lambda q, *rest: (calls.append(q.shape), original(q, *rest))[1])
    shape = (8, 2, 300, 4)
    attention_alignment(*(torch.randn(shape) for _ in range(4)), backend="chunked")
    assert calls == [shape] * 2  # once for each model
    monkeypatch.setattr(gpu, "BLOCK_ELEMENTS", 2 * 300 * 100)
    calls.clear()
    attention_alignment(*(torch.randn(shape) for _ in range(4)), backend="chunked")
    assert calls == [(1, 2, 100, 4)] * 2 * 3 * 8


class Waits(TorchDispatchMode):
    """Waits fails if an operation waits for a GPU: a value for Python, positions of unknown number, a copy to it."""

    NAMES = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in self.NAMES, f"{name} waits for the device"
        if name.startswith("index"):
            places = [x for given in args if isinstance(given, (list, tuple)) for x in given]
            assert not any(x is not None and x.dtype == torch.bool for x in places), f"{name} by a mask"
        return function(*args, **(kwargs or {}))


def calls():
    """Return (name, call with a backend); the caller says which tokens count, by a mask or by their positions."""
    mask = torch.arange(20)[None] < torch.tensor([[20], [11]])
    index, labels = mask.flatten().nonzero()[:, 0], torch.randint(61, (2, 20))
    heads = [torch.randn(2, 4, 20, 8) for _ in range(4)]
    segments = torch.arange(20).expand(2, 20) // 7
    states, projection = [torch.randn(2, 20, 12) for _ in range(2)], torch.randn(12, 12)
    matrices = [torch.randn(61, 12) for _ in range(2)]
    for options in ({}, {"mask": mask, "causal": True}, {"mask": mask, "segments": segments, "window": 5}):
        for divergence in ("kl", "mse", "score_mse"):
            given = options | {"divergence": divergence}
            yield f"attention {divergence} {list(options)}", attention_alignment, heads, given
    for relation in ("cosine", "dot", "distance"):
        for given in ({}, {"mask": mask}):
            yield (
                f"pairwise {relation} {list(given)}",
                pairwise_alignment,
                states,
                given | {"relation": relation},
            )
    for divergence in ("mse", "cosine"):
        given = {"projection": projection, "mask": mask, "divergence": divergence}
        yield f"hidden {divergence}", hidden_alignment, states, given
    s, t = states
    for given in ({}, {"index": index}):
        yield f"soft labels {list(given)}", soft_label_alignment, (s, matrices[0], t, matrices[1]), given
    yield "cross-entropy", token_cross_entropy, (s, matrices[0], labels), {"index": index}
    given = {"labels": labels, "index": index, "weights": (0.5, torch.tensor(2.0))}
    yield "vocabulary", vocabulary_losses, (s, matrices[0], t, matrices[1]), given


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize(
    ("name", "function", "tensors", "options"), list(calls()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_nothing_waits_for_the_device(name, function, tensors, options, backend, on_a_gpu):
    """Neither forward nor backward waits. Triton's launches are collected, not run, as its interpreter is no GPU."""
    if backend == "triton" and not gpu.interpreting():
        pytest.skip("on CPU tensors the kernels are asked for in the interpreter alone")
    for dtype in (torch.float32, torch.bfloat16):
        given = [
            x.to(dtype).requires_grad_(x.is_floating_point()) if x.is_floating_point() else x for x in tensors
        ]
        rest = {k: x.to(dtype) if k == "projection" else x for k, x in options.items()}
        upstream = torch.ones(())
        with Waits(), gpu.recording("sm_90") as launches:
            loss = function(*given, **rest, backend=backend)
            (loss if isinstance(loss, torch.Tensor) else loss.total).backward(upstream)
        assert bool(launches) == (backend == "triton")


def test_what_the_mode_finds():
    x = torch.randn(4)
    for wait in (
        lambda: x.sum().item(),
        lambda: (x > 0).nonzero(),
        lambda: torch.tensor(3, device="cpu"),
        lambda: x[x > 0],
    ):
        with pytest.raises(AssertionError), Waits():
            wait()
