"""The compiled operators as torch operators: opcheck, tracing, instruction sets, threads, memory."""

import os

import pytest
import torch

from dsdistill.bench import verify
from dsdistill.bench.cases import Case, attention_tensors
from dsdistill.bench.operators import peak_memory
from dsdistill.ops import attention_alignment, hidden_alignment, pairwise_alignment
from dsdistill.ops.backends import extension

native = extension()
pytestmark = pytest.mark.skipif(native is None, reason="the native operators are not built")


def attention_inputs(tokens=40, requires_grad=True):
    torch.manual_seed(0)
    return [torch.randn(2, 4, tokens, 16, requires_grad=requires_grad and i < 2) for i in range(4)]


def operator_calls():
    """Return (operator, arguments) with gradients, with and without a mask."""
    mask = torch.arange(40)[None] < torch.tensor([[40], [23]])
    query, key, teacher_query, teacher_key = attention_inputs()
    tensors = (query, key, teacher_query, teacher_key)
    student = torch.randn(2, 40, 12, requires_grad=True)
    teacher, weights = torch.randn(2, 40, 20), torch.rand(2, 40, dtype=torch.float64)
    projection, bias = torch.randn(20, 12, requires_grad=True), torch.randn(20, requires_grad=True)
    ops = torch.ops.dsdistill
    for divergence in (0, 1, 2):
        yield (
            ops.attention_alignment,
            (*tensors, mask, None, None, None, divergence, 0.25, 0.25, True, -1, True, True, True),
        )
    segments = (torch.arange(40) // 9).expand(2, 40).contiguous()
    yield (
        ops.attention_alignment,
        (*tensors, None, segments, None, None, 0, 0.25, 0.25, False, 5, False, True, False),
    )
    rows = torch.tensor([[3, 30, -1], [7, 22, 7]]), torch.rand(2, 3, dtype=torch.float64)
    yield (
        ops.attention_alignment,
        (*tensors, mask, None, *rows, 0, 0.25, 0.25, True, -1, True, True, True),
    )
    for relation in (0, 1, 2):
        yield ops.pairwise_alignment, (student, teacher, mask, weights, relation, True, True)
    for divergence in (0, 1):
        wanted = (True, True, True)
        yield (
            ops.hidden_alignment,
            (student, teacher, projection, bias, mask, weights, divergence, True, *wanted),
        )
    yield (
        ops.hidden_alignment,
        (student, student.detach() * 2, None, None, None, None, 0, True, True, False, False),
    )


@pytest.mark.parametrize("index", range(11))
def test_opcheck(index):
    operator, arguments = list(operator_calls())[index]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.default, arguments, test_utils=checks)


@pytest.mark.parametrize("index", [0, 4, 5, 8])
def test_gradients_of_the_bare_operator(index):
    operator, arguments = list(operator_calls())[index]
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    loss, *gradients = operator(*arguments)
    found = torch.autograd.grad(loss * 2, wanted)
    for a, b in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_compiles_into_one_graph():
    inputs = attention_inputs()
    student, teacher = torch.randn(2, 40, 12, requires_grad=True), torch.randn(2, 40, 20)
    projection = torch.randn(20, 12, requires_grad=True)
    mask = torch.arange(40)[None] < torch.tensor([[40], [23]])

    def total(query, key, teacher_query, teacher_key, student, teacher, projection, mask):
        loss = attention_alignment(
            query, key, teacher_query, teacher_key, mask=mask, causal=True, backend="cpp"
        )
        loss = loss + pairwise_alignment(student, teacher, mask=mask, backend="cpp")
        return loss + hidden_alignment(student, teacher, projection=projection, mask=mask, backend="cpp")

    given = (*inputs, student, teacher, projection, mask)
    wanted = (*inputs[:2], student, projection)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), total(*given))
    for a, b in zip(
        torch.autograd.grad(compiled(*given), wanted), torch.autograd.grad(total(*given), wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


SETS = native.instruction_sets() if native else []


@pytest.fixture(params=SETS)
def instruction_set(request):
    before = native.instruction_set()
    native.choose_instruction_set(request.param)
    yield request.param
    native.choose_instruction_set(before)


@pytest.mark.parametrize("operator", ["attention", "pairwise", "hidden"])
def test_every_instruction_set(instruction_set, operator):
    for case in verify.all_cases():
        if case.operator == operator and case.native:
            verify.check_parity(case, "cpp", torch.float32)
            verify.check_parity(case, "cpp", torch.bfloat16)


@pytest.mark.parametrize("divergence", ["kl", "mse", "score_mse"])
def test_several_chunks_of_keys(instruction_set, divergence):
    """bfloat16 exponentials are rescaled from chunk to chunk of 256 keys; some chunks are invisible to a query."""
    tokens = 530
    rising = attention_tensors(batch=1, heads=2, tokens=tokens, width=24, kv=1, peak=3.0)
    for name in ("student_key", "teacher_key"):  # later maxima are larger
        rising[name] = rising[name] * torch.linspace(0.1, 2, tokens, dtype=torch.float64)[:, None]
    segments = {"segments": (torch.arange(tokens) // 300).expand(1, tokens)}
    for tensors, options in (
        (rising, {}),
        (rising, {"causal": True}),
        (rising, {"window": 290}),
        (rising | segments, {"causal": True}),
        (rising, {"student_scale": -0.3, "teacher_scale": 0.1}),
    ):
        case = Case(
            "attention", "chunks", tensors, options | {"divergence": divergence}, divergence == "score_mse"
        )
        verify.check_parity(case, "cpp", torch.bfloat16)


def test_a_scale_of_zero_shows_no_hidden_key(instruction_set):
    """With a scale of 0 all visible keys have the same probability, in both models."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in attention_inputs(tokens=70)]
    options = {"causal": True, "student_scale": 0.0, "backend": "cpp"}
    loss = attention_alignment(*inputs, teacher_scale=0.0, **options)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    expected = attention_alignment(*inputs, **options | {"backend": "reference"})
    assert attention_alignment(*inputs, **options).item() == pytest.approx(expected.item(), rel=1e-5)


def test_products_of_torch_are_undisturbed(instruction_set):
    """Both torch and the kernels configure AMX's tile registers, in the same threads."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in attention_inputs(tokens=130)]
    a, b = torch.randn(70, 96).bfloat16(), torch.randn(96, 50).bfloat16()
    before = a @ b
    first = attention_alignment(*inputs, backend="cpp")
    assert torch.equal(a @ b, before)
    assert torch.equal(attention_alignment(*inputs, backend="cpp"), first)


def test_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="portable"):
        native.choose_instruction_set("mmx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_result_again(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in attention_inputs(tokens=130)]
    first = torch.autograd.grad(attention_alignment(*inputs, backend="cpp"), inputs[:2])
    second = torch.autograd.grad(attention_alignment(*inputs, backend="cpp"), inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_one_head(threads):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, 300, 16, requires_grad=i < 2) for i in range(4)]
    student, teacher = torch.randn(1, 300, 12, requires_grad=True), torch.randn(1, 300, 20)
    options = {"causal": True, "backend": "cpp"}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        attention = torch.autograd.grad(attention_alignment(*inputs, **options), inputs[:2])
        distance = pairwise_alignment(student, teacher, relation="distance", backend="cpp")
        pairwise = torch.autograd.grad(distance, student)
    finally:
        torch.set_num_threads(before)
    options["backend"] = "chunked"
    expected = torch.autograd.grad(attention_alignment(*inputs, **options), inputs[:2])
    distance = pairwise_alignment(student, teacher, relation="distance", backend="chunked")
    for a, b in zip(
        (*attention, *pairwise), (*expected, *torch.autograd.grad(distance, student)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_workspace_grows_linearly():
    sizes = [native.attention_workspace_bytes(tokens, 64, 64) for tokens in (1024, 2048, 4096)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)
    assert sizes[2] < 8 * 2**20
    sizes = [native.pairwise_workspace_bytes(tokens, 768, 768) for tokens in (512, 1024, 2048)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from /proc")
def test_peak_memory_stays_small():
    extra = peak_memory("attention", {"batch": 1, "heads": 12, "tokens": 4096}, "float32", "cpp")
    assert 4 < extra < 32  # two threads; an N×N matrix of one head alone would be 64 MiB
