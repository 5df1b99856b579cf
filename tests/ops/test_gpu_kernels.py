"""The GPU kernels beyond the checks of every operator: plans, determinism, LSEs, tracing, compilation ahead of time.

Without a GPU the Triton kernels run in the interpreter; tests that need a GPU are skipped.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from dsdistill.bench import aot, verify
from dsdistill.bench.cases import attention_tensors, hidden_cases
from dsdistill.ops import attention_alignment, available_backends, gpu, hidden_alignment, pairwise_alignment
from dsdistill.ops.attention import triton_schedule, triton_tiles
from dsdistill.ops.attention.native import DIVERGENCE_CODES
from dsdistill.ops.backends import extension
from dsdistill.ops.gpu import interpreting, recording
from dsdistill.ops.hidden import rows

if "triton" in available_backends():
    import triton
    import triton.language as tl

    from dsdistill.ops.triton_common import rounded_to_tf32

    @triton.jit
    def tf32_kernel(x, out, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out + at, rounded_to_tf32(tl.load(x + at)))


pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="Triton cannot run here")
DEVICE = verify.device_of("triton")

PLAN_CASES = ("kl-packed", "mse-grouped-ragged", "score_mse-scattered-causal")


def cases(*names):
    found = [case for case in verify.all_cases() if case.name in names]
    assert len(found) == len(names)
    return found


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plan", ["merged", "sweeps"])
@pytest.mark.parametrize("case", cases(*PLAN_CASES), ids=str)
def test_every_plan_is_right(plan, case, monkeypatch):
    monkeypatch.setattr(triton_schedule, "default_plan", plan)
    verify.check_parity(case, "triton", torch.float32)


@pytest.mark.parametrize("plan", ["row", "merged"])
def test_plans_in_bfloat16(plan, monkeypatch):
    monkeypatch.setattr(triton_schedule, "default_plan", plan)
    verify.check_parity(cases("mse-scattered-causal")[0], "triton", torch.bfloat16)


@pytest.fixture
def shared_by_programs(monkeypatch):
    """Prevent that a head is computed by one program alone."""
    monkeypatch.setattr(triton_schedule, "alone_tile", lambda tensors: None)


@pytest.mark.parametrize("case", cases("kl-ragged", "mse-packed"), ids=str)
def test_the_deterministic_row_plan_is_right(case, deterministic, shared_by_programs):
    verify.check_parity(case, "triton", torch.float32)


@pytest.mark.parametrize("case", cases("kl-ragged", "mse-packed", "score_mse-scattered-causal"), ids=str)
def test_the_row_plan_with_atomics_is_right(case, shared_by_programs, monkeypatch):
    seen = kernels_that_run(monkeypatch)
    verify.check_parity(case, "triton", torch.float32)
    assert any(launch["MERGED"] for launch in seen) and not any(launch["ALONE"] for launch in seen)


@pytest.mark.parametrize("tokens", [1, 64, 65, 100, 128, 129])
@pytest.mark.parametrize(("kv", "divergence"), [(2, "kl"), (2, "mse"), (2, "score_mse"), (1, "kl")])
def test_a_short_head_with_keys_of_its_own_is_one_program(tokens, kv, divergence, monkeypatch):
    seen = kernels_that_run(monkeypatch)
    alone = tokens <= 128 and kv == 2
    mask = torch.arange(tokens, device=DEVICE)[None] < torch.tensor([[tokens], [tokens // 2]], device=DEVICE)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        tensors = inputs(dtype, batch=2, heads=2, kv=kv, tokens=tokens)
        options = {"mask": mask, "causal": True, "window": 50, "divergence": divergence, "backend": backend}
        loss = attention_alignment(**tensors, **options)
        loss.backward()
        found.append((loss, tensors["student_query"].grad, tensors["student_key"].grad))
    assert [(launch["ALONE"], launch["MERGED"]) for launch in seen] == [(alone, not alone)]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_one_program_has_the_same_gradient_each_time(deterministic, monkeypatch):
    seen = kernels_that_run(monkeypatch)
    gradients = []
    for _ in range(2):
        tensors = inputs(batch=1, heads=2, tokens=90)
        attention_alignment(**tensors, backend="triton").backward()
        gradients.append(tensors["student_key"].grad)
    assert torch.equal(*gradients) and [launch["ALONE"] for launch in seen] == [True, True]


def kernels_that_run(monkeypatch) -> list[dict]:
    """Return the arguments of the coming launches, in order."""
    seen = []
    original = triton_schedule.launch
    monkeypatch.setattr(
        triton_schedule, "launch", lambda kernel, *rest: (seen.append(rest[1]), original(kernel, *rest))[1]
    )
    return seen


def inputs(dtype=torch.float32, **sizes):
    tensors = {k: v.to(DEVICE, dtype) for k, v in attention_tensors(**sizes).items()}
    for name in ("student_query", "student_key"):
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("plan", ["row", "merged", "auto"])
def test_deterministic_algorithms_never_take_atomics(plan, monkeypatch, deterministic):
    seen = kernels_that_run(monkeypatch)
    monkeypatch.setattr(triton_schedule, "default_plan", plan)
    attention_alignment(**inputs(batch=1, heads=1), backend="triton").backward()
    assert seen and not any(launch.get("MERGED") for launch in seen)


@pytest.mark.parametrize(("tokens", "expected"), [(40, ["full_row"]), (513, ["statistics", "columns"])])
def test_auto_plan_by_length(tokens, expected, monkeypatch):
    names = []
    original = triton_schedule.launch
    monkeypatch.setattr(
        triton_schedule,
        "launch",
        lambda kernel, *rest: (names.append(kernel.fn.__name__), original(kernel, *rest))[1],
    )
    attention_alignment(**inputs(batch=1, heads=1, tokens=tokens), backend="triton").backward()
    assert names == [f"{name}_kernel" for name in expected]


def test_no_gradient_is_computed_when_none_is_needed(monkeypatch):
    seen = kernels_that_run(monkeypatch)
    tensors = {k: v.detach() for k, v in inputs().items()}
    attention_alignment(**tensors, backend="triton")
    assert len(seen) == 1 and "d_query" not in seen[0]
    tensors["student_key"].requires_grad_()
    attention_alignment(**tensors, backend="triton").backward()
    assert seen[1]["WITH_QUERY"] is False


@pytest.mark.parametrize("plan", ["merged", "sweeps"])
@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_given_lse_saves_the_statistics_of_kl(plan, divergence, monkeypatch):
    tensors = [x.detach() for x in inputs(kv=2, t_width=24, tokens=50).values()]
    names = ("student_query", "student_key", "teacher_query", "teacher_key")
    mask = (torch.arange(50)[None] < torch.tensor([[50], [31]])).to(DEVICE)
    lse = []
    for query, key in (tensors[:2], tensors[2:]):
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * 0.25
        exists = (mask[:, None, :] & torch.ones(50, 50, dtype=torch.bool, device=DEVICE).tril())[:, None]
        # The contents of padding must not matter.
        lse.append(
            scores.masked_fill(~exists, -torch.inf).logsumexp(-1).masked_fill(~mask[:, None], torch.nan)
        )
    one = torch.ones((), device=DEVICE)
    rest = (one, DIVERGENCE_CODES[divergence], 0.25, 0.25, True, -1, False, plan, True, True)
    seen = kernels_that_run(monkeypatch)
    found = torch.ops.dsdistill.attention_alignment_triton(*tensors, mask, None, None, None, *lse, *rest)
    assert len(seen) == (1 if plan == "merged" else 2) + (divergence == "mse")
    given = dict(zip(names, (x.clone().requires_grad_(i < 2) for i, x in enumerate(tensors)), strict=True))
    loss = attention_alignment(
        **given,
        mask=mask,
        causal=True,
        divergence=divergence,
        student_scale=0.25,
        teacher_scale=0.25,
        reduction="sum",
        backend="chunked",
    )
    expected = (loss, *torch.autograd.grad(loss, [given[name] for name in names[:2]]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 17, 256])
def test_head_widths_are_padded(width):
    tensors = inputs(batch=1, heads=2, tokens=20, width=width, t_width=33)
    given = list(tensors.values())[:2]
    loss = attention_alignment(**tensors, backend="triton")
    expected = attention_alignment(**tensors, backend="reference")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tensors_of_another_device_than_the_current_one(backend):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 40, 24, generator=generator) for _ in range(2)]
    losses = [hidden_alignment(*(x.cuda(i) for x in states), backend=backend).cpu() for i in range(2)]
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*losses)


def operator_calls():
    """Return (operator, arguments) of each custom operator, with gradients."""
    mask = (torch.arange(20)[None] < torch.tensor([[20], [11]])).to(DEVICE)
    one, weights = torch.ones((), device=DEVICE), mask.float()
    attention = list(inputs(tokens=20).values())
    rest = (mask, None, None, None, None, None, one, 0, 0.25, 0.25, True, -1, False, "auto", True, True)
    student = torch.randn(2, 20, 12, device=DEVICE, requires_grad=True)
    teacher = torch.randn(2, 20, 16, device=DEVICE)
    projection = torch.randn(16, 12, device=DEVICE, requires_grad=True)
    bias = torch.randn(16, device=DEVICE, requires_grad=True)
    ops = torch.ops.dsdistill
    yield ops.attention_alignment_triton, (*attention, *rest)
    index, own = torch.tensor([[3, 15], [7, -1]], device=DEVICE), torch.rand(2, 2, device=DEVICE)
    query, key, teacher_query, teacher_key = attention
    chosen = query.detach()[:, :, :2].requires_grad_(), key, teacher_query[:, :, :2], teacher_key
    yield ops.attention_alignment_triton, (*chosen, mask, None, index, own, *rest[4:])
    for relation in (0, 2):
        yield ops.pairwise_alignment_triton, (student, teacher, mask, weights, one, relation, True)
    hidden = (student, teacher, projection, bias, mask, weights, one, 0, "triton", True, True, True)
    yield ops.hidden_alignment_rows, hidden


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_tiles_are_chosen_by_the_shared_memory_of_the_device(architecture):
    """The preflight compiles these tiles; on GPUs between (sm_86, sm_89) a block has 99 KiB."""
    tensors = [torch.empty(1, 1, 1024, 256, dtype=torch.bfloat16, device="meta")] * 4
    with recording(architecture):
        tile = triton_tiles.tile_of("rows", tensors)
        row = gpu.architecture(tensors[0].device)
    assert row == ("sm_90" if architecture == "sm_90" else "sm_80")
    assert (tile == triton_tiles.SMALL["rows"]) == (architecture in ("sm_86", "sm_89"))
    # Bytes of both models' keys in all stages of the loop.
    assert 2 * tile.columns * tile.stages * 256 * 2 < gpu.SHARED_LIMIT[architecture]


@pytest.mark.parametrize("index", range(5))
def test_opcheck(index):
    operator, arguments = list(operator_calls())[index]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


def test_compiles_into_one_graph():
    tensors = inputs(batch=1, heads=2, tokens=20)
    student = torch.randn(1, 20, 12, device=DEVICE, requires_grad=True)
    teacher = torch.randn(1, 20, 12, device=DEVICE)

    def total(query, key, teacher_query, teacher_key, student, teacher):
        loss = attention_alignment(query, key, teacher_query, teacher_key, causal=True, backend="triton")
        loss = loss + pairwise_alignment(student, teacher, backend="triton")
        return loss + hidden_alignment(student, teacher, backend="triton")

    given = (*tensors.values(), student, teacher)
    wanted = (*given[:2], student)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = total(*given)
    found = compiled(*given)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_half_gradients_wait_and_scale():
    tensors = inputs(torch.float16, batch=1, heads=1)
    (attention_alignment(**tensors, divergence="mse", backend="triton") * 2.0**20).backward()
    exact = {k: v.detach().double() for k, v in tensors.items()}
    exact["student_query"].requires_grad_()
    (attention_alignment(**exact, divergence="mse", backend="reference") * 2.0**20).backward()
    truth = exact["student_query"].grad
    torch.testing.assert_close(
        tensors["student_query"].grad.double(), truth, rtol=1e-2, atol=2e-3 * truth.abs().max().item()
    )


def test_what_goes_through_tf32_is_rounded_to_nearest():
    """A matrix instruction cuts off bits that TF32 lacks, which would make every float16 gradient smaller."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 1024)
    x[:4] = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11 - 2**-20, 0.0]
    )  # ties to even; beyond a tie
    out = torch.zeros_like(x, device=DEVICE)
    tf32_kernel[(1,)](x.to(DEVICE), out, SIZE=1024)
    mantissa, exponent = torch.frexp(x.double())
    expected = torch.ldexp((mantissa * 2**11).round(), exponent - 11)  # rounds ties to even
    assert torch.equal(out.cpu().double(), expected)


@pytest.mark.skipif(extension() is None, reason="the native operators are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [c for c in hidden_cases() if c.name.endswith(("plain", "weighted"))], ids=str
)
def test_rows_of_the_cuda_source_on_the_host(case, dtype, monkeypatch):
    """Test the arithmetic of csrc/hidden/rows.h, its arguments and the products around it, but not the GPU's code."""
    monkeypatch.setitem(rows.ROWS, "triton", rows.cuda_rows)
    monkeypatch.setattr(verify, "device_of", lambda backend: "cpu")
    if not interpreting():
        pytest.skip("here CPU tensors do not reach the operator")
    verify.check_parity(case, "triton", dtype)


def test_missing_requirements_are_named(monkeypatch):
    tensors = {k: v.detach().cpu() for k, v in inputs().items()}
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        attention_alignment(**{k: v.double() for k, v in inputs().items()}, backend="triton")
    with pytest.raises(ValueError, match="at most 256 wide, got 300"):
        attention_alignment(**inputs(batch=1, heads=1, tokens=2, width=300), backend="triton")
    with pytest.raises(ValueError, match="needs CUDA tensors, these are on cpu"):
        hidden_alignment(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), backend="cuda")
    monkeypatch.setattr("dsdistill.ops.gpu.interpreting", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        attention_alignment(**tensors, backend="triton")


def run_aot(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


AOT_SAMPLE = """
import sys
from dsdistill.bench import aot
if __name__ == "__main__":
    from dsdistill.bench.aot_calls import all_calls
    variants = aot.variants_of(all_calls())
    wanted = ("kl all conditions merged", "cosine gradient", "bf16 forward_kl all options")
    aot.variants_of = lambda calls: [v for v in variants if "bf16" in v.label and any(w in v.label for w in wanted)
                                     and not any(d in v.label for d in ("D128", "D256", "score_mse"))]
    sys.exit(aot.run_aot(sys.argv[1]))
"""


def test_a_sample_compiles_ahead_of_time(tmp_path):
    """`dsdistill verify --aot` compiles all of them, in minutes."""
    done = run_aot(AOT_SAMPLE, str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "aot.json").read_text())
    assert {"sm_80", "sm_90"} == {row["architecture"] for row in found}
    assert all(row["failures"] == [] and row["registers"] > 0 for row in found)
    assert all(row["wgmma"] for row in found if row["architecture"] == "sm_90" and "columns" in row["label"])


def test_what_ahead_of_time_compilation_refuses(monkeypatch):
    assert aot.judge("sm_80", 0, 166_912) == []
    assert aot.judge("sm_90", 32, 0) == []
    assert "spills: 40 bytes" in aot.judge("sm_90", 40, 0)[0]
    assert "limit 101376" in aot.judge("sm_86", 0, 101_377)[0]
    assert "limit 166912" in aot.judge("sm_80", 0, 170_000)[0]
    assert aot.judge("sm_90", 0, 170_000) == []
    signature = (("query_s", "*bf16"),)
    wide = (("BR", 32), ("BC", 64))
    variant = aot.Variant("", "", "columns_kernel", "sm_90", signature, wide, (), 4, 2)
    assert aot.needs_wgmma(variant)
    assert not aot.needs_wgmma(aot.Variant("", "", "rows_kernel", "sm_90", signature, wide, (), 4, 2))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "variants_of", lambda calls: [])
    monkeypatch.setattr(aot.shutil, "which", lambda name: None)
    for failures, code in (((), 0), (("spills: 8 bytes of stack",), 1)):
        result = aot.Result("rows", "sm_80", 8, 200, 8, 0, False, failures)
        monkeypatch.setattr(aot, "compile_all", lambda variants, result=result: [result])
        assert aot.run_aot() == code
