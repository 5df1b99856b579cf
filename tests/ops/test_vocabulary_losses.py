"""Task and soft labels in one pass are compared with their own operators and with float64."""

from collections import Counter

import pytest
import torch
from operator_checks import BACKENDS, every_check, gradient_cases, run_check, run_gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dsdistill.bench import verify
from dsdistill.ops import common, soft_label_alignment, token_cross_entropy, vocabulary_losses
from dsdistill.ops.gpu import Tile
from dsdistill.ops.soft_label import chunked, fused
from dsdistill.ops.soft_label import head as head_module
from dsdistill.ops.soft_label.divergence import DIVERGENCES, FUSED

PLAIN = ("reference", "chunked")
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is not chosen")
BATCH, TOKENS, VOCABULARY, OTHER, COMMON = 3, 40, 211, 205, 203
COUNTED = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7


@every_check("vocabulary")
def test_check(check, case, backend, dtype):
    run_check(check, case, backend, dtype)


@gradient_cases(
    "vocabulary",
    "plain",
    # The factors of akl are constants for its gradient, so that it is not the slope of its value.
    *(
        f"{divergence}-{kind}"
        for divergence in DIVERGENCES
        if divergence != "akl"
        for kind in ("warm", "capped")
    ),
    "padded",
    "padded-capped",
)
def test_gradcheck(case, backend):
    run_gradcheck(case, backend)


def draws(dtype=torch.float64):
    """Return hidden states, heads and biases (the student's need gradients), and labels, some ignored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = {"student_hidden": draw(BATCH, TOKENS, 8), "student_head": draw(VOCABULARY, 8)}
    student["student_bias"] = draw(VOCABULARY)
    teacher = {"teacher_hidden": draw(BATCH, TOKENS, 6), "teacher_head": draw(OTHER, 6)}
    teacher["teacher_bias"] = draw(OTHER)
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator).masked_fill(~COUNTED, -100)
    return {name: x.requires_grad_() for name, x in student.items()}, teacher, labels


def apart(student, teacher, labels, reduction, smoothing=0.1, caps=(None, None), **formula):
    """Return task and soft labels over the common entries, by the definitions of their own operators."""
    hidden, head, bias = student.values()
    task = token_cross_entropy(
        hidden,
        head,
        labels,
        bias=bias,
        softcap=caps[0],
        label_smoothing=smoothing,
        reduction=reduction,
        backend="reference",
    )
    soft = soft_label_alignment(
        hidden,
        head[:COMMON],
        teacher["teacher_hidden"],
        teacher["teacher_head"][:COMMON],
        student_bias=bias[:COMMON],
        teacher_bias=teacher["teacher_bias"][:COMMON],
        student_softcap=caps[0],
        teacher_softcap=caps[1],
        mask=labels != -100,
        reduction=reduction,
        backend="reference",
        **formula,
    )
    return task, soft


@pytest.mark.parametrize("caps", [(None, None), (2.0, 3.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_are_those_of_both_apart(divergence, backend, reduction, caps):
    """Gradients are those of the total and those of the losses that are weighted afterwards."""
    student, teacher, labels = draws()
    formula = {"divergence": divergence, "temperature": 1.5, "beta": 0.3, "alpha": 0.2}
    task, soft = apart(student, teacher, labels, reduction, caps=caps, **formula)
    found = vocabulary_losses(
        **student,
        **teacher,
        labels=labels,
        weights=(0.7, torch.tensor(1.6)),
        common=COMMON,
        student_softcap=caps[0],
        teacher_softcap=caps[1],
        label_smoothing=0.1,
        reduction=reduction,
        backend=backend,
        **formula,
    )
    weight = torch.tensor(1.6).double()  # as the operator is given it
    for mine, true in zip(found, (0.7 * task + weight * soft, task, soft), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=0)
    inputs = list(student.values())
    for mine, true in (
        (found.total, 0.7 * task + weight * soft),
        (3 * found.task, 3 * task),
        (found.soft - 2 * found.task, soft - 2 * task),
    ):
        gradients = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (mine, true))
        for own, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("index", [False, True])
def test_blocks_slices_and_panels(index, monkeypatch):
    """Blocks of 7 tokens, slices of 3 and panels of 64 entries give the same as one of each; so does a head alone."""
    student, teacher, labels = draws()
    labels = labels if index else labels.clamp(min=0)
    places = (labels != -100).flatten().nonzero()[:, 0] if index else None
    task, soft = apart(student, teacher, labels, "mean", temperature=2.0)
    for name in ("MIN_TOKENS", "MAX_TOKENS"):
        monkeypatch.setattr(head_module, name, 7)
    monkeypatch.setattr(head_module, "SLICE_ELEMENTS", 3 * VOCABULARY)
    monkeypatch.setattr(head_module, "PANEL_ELEMENTS", 1)
    options = {"common": COMMON, "label_smoothing": 0.1, "temperature": 2.0, "backend": "chunked"}
    total = vocabulary_losses(**student, **teacher, labels=labels, index=places, **options).total
    inputs = list(student.values())
    torch.testing.assert_close(total, task + soft)
    for mine, true in zip(
        torch.autograd.grad(total, inputs), torch.autograd.grad(task + soft, inputs), strict=True
    ):
        torch.testing.assert_close(mine, true)


def against_float64(student, teacher, labels, backend, **options):
    """Return (error, error that is allowed) of the losses and gradients, largest over all; truth is float64.

    Allowed is what `verify.require` allows: twice the error of plain PyTorch in the same type, and a few units.
    """
    results = []
    for kind, dtype in ((backend, None), ("reference", None), ("reference", torch.float64)):
        own = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in student.items()}
        other = {name: x.to(dtype or x.dtype) for name, x in teacher.items()}
        found = vocabulary_losses(**own, **other, labels=labels, backend=kind, **options)
        results.append([*found, *torch.autograd.grad(found.total, list(own.values()))])
    for place, (mine, same, truth) in enumerate(zip(*results, strict=True)):
        size = max(verify.rms(truth), truth.abs().max().item() / 8)
        verify.require(f"result {place}", mine.detach(), truth.detach(), same.detach(), size)


@needs_triton
@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - set(FUSED)))
def test_the_kernel_refuses_what_it_lacks(divergence):
    """It refuses in one line; `auto` takes another backend."""
    student, teacher, labels = draws(torch.float32)
    given = {**student, **teacher, "labels": labels, "common": COMMON, "divergence": divergence}
    with pytest.raises(
        ValueError, match=f"the kernel has no divergence {divergence}; can run: reference, chunked"
    ):
        vocabulary_losses(**given, backend="triton")
    assert vocabulary_losses(**given).total.isfinite()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_kernel_by_blocks_and_panels(dtype, aligned, monkeypatch):
    """Blocks have 8 tokens, panels (bfloat16) two blocks; the last program has one token, the last tile few entries."""
    student, teacher, labels = draws(dtype)
    labels = labels.clamp(min=0).flatten()[:57][None]
    cut = {
        name: x.detach().flatten(0, 1)[None, :57]
        for name, x in (student | teacher).items()
        if "hidden" in name
    }
    student, teacher = ({k: cut.get(k, x) for k, x in each.items()} for each in (student, teacher))
    if aligned:  # like most padded vocabularies
        for each in (student, teacher):
            each.update({k: x.detach()[:192] for k, x in each.items() if "hidden" not in k})
        labels = labels.clamp(max=191)
    monkeypatch.setattr(head_module, "MIN_TOKENS", 8)
    monkeypatch.setattr(head_module, "GPU_BYTES", 0)
    monkeypatch.setattr(head_module, "PANEL_BYTES", 16 * 2 * VOCABULARY)
    monkeypatch.setitem(fused.TILES, "interpreter", Tile(4, 128, 4, 1))
    products, launches = [], []
    for owner, name, seen in ((fused, "launch", launches), (head_module, "product", products)):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, o=original, s=seen: (s.append(a), o(*a))[1])
    against_float64(student, teacher, labels, "triton", common=190, temperature=2.0, label_smoothing=0.1)
    assert len(launches) == 8  # blocks
    if dtype == torch.bfloat16:
        strides = {
            left.stride()
            for left, _ in products
            if left.dtype == dtype and left.shape[-1] == student["student_head"].shape[0]
        }
        assert strides == {(192 if aligned else 216, 1)}, "rows of the gradient do not begin at 16 bytes"


@needs_triton
def test_the_kernel_at_a_vocabulary_of_262144(monkeypatch):
    monkeypatch.setitem(fused.TILES, "interpreter", Tile(4, 1 << 15, 4, 1))
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {
            f"{name}_hidden": torch.randn(1, 3, 4, generator=generator).bfloat16(),
            f"{name}_head": (torch.randn(size, 4, generator=generator) * 2).bfloat16(),
        }
        for name, size in (("student", 262208), ("teacher", 262144))
    )
    labels = torch.tensor([[262207, -100, 5]])
    against_float64(student, teacher, labels, "triton", common=262144, divergence="jsd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["chunked", pytest.param("triton", marks=needs_triton)])
def test_small_probabilities_reach_the_head(backend, dtype, monkeypatch):
    """As a GPU multiplies: with 151,936 entries the gradient at the logits is below what float16 holds to three digits.

    If it were in float16, the head's gradient would be off by 1.2e-3 of its RMS here; it is off by 2e-4.
    """
    monkeypatch.setitem(fused.TILES, "interpreter", Tile(8, 1 << 14, 4, 1))
    monkeypatch.setattr(chunked, "Head", lambda *given: head_module.Head(*given[:4], fused=True))
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(1, 8, 8, generator=generator).to(dtype) for _ in range(2))
    head, other_head = (torch.randn(151936, 8, generator=generator).mul(0.3).to(dtype) for _ in range(2))
    found = []
    for kind, wide in ((backend, dtype), ("reference", torch.float64)):
        own, rest = head.to(wide).requires_grad_(), (other.to(wide), other_head.to(wide))
        loss = soft_label_alignment(hidden.to(wide), own, *rest, reduction="sum", backend=kind)
        # Times 2^10, like a loss scale: without it the gradient would have no digits in float16.
        found.append(torch.autograd.grad(loss * 1024, own)[0].double())
    error = (found[0] - found[1]).square().mean().sqrt() / found[1].square().mean().sqrt()
    print(f"{backend} {dtype}: {error:.1e} of the RMS")
    assert error < (3e-3 if dtype == torch.bfloat16 else 4e-4)


@needs_triton
def test_the_kernel_with_a_head_tied_to_the_embeddings():
    """The matrix is embedding and head at once, so that it has two gradients; losses weighed afterwards add theirs."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(61, 12, generator=generator, requires_grad=True)
    teacher, teacher_head = (
        torch.randn(2, 9, 20, generator=generator),
        torch.randn(61, 20, generator=generator),
    )
    labels = torch.randint(61, (2, 9), generator=generator)
    gradients = []
    for backend in ("triton", "reference"):
        hidden = torch.nn.functional.embedding(labels, matrix).cumsum(1)
        losses = vocabulary_losses(hidden, matrix, teacher, teacher_head, labels=labels, backend=backend)
        gradients += torch.autograd.grad(losses.total + losses.soft - 3 * losses.task, matrix)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", PLAIN)
def test_gradcheck_of_losses_weighed_afterwards(backend):
    student, teacher, labels = draws()

    def losses(hidden, head, bias):
        found = vocabulary_losses(
            hidden,
            head,
            **teacher,
            student_bias=bias,
            labels=labels,
            common=COMMON,
            temperature=2.0,
            backend=backend,
        )
        return found.total, found.task.square(), found.soft.exp()

    assert torch.autograd.gradcheck(losses, tuple(student.values()), fast_mode=True)


@pytest.mark.parametrize("counted", [COUNTED, torch.zeros_like(COUNTED)], ids=["some", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*PLAIN, pytest.param("triton", marks=needs_triton)])
def test_places_give_what_the_labels_give(backend, dtype, counted):
    """Losses and gradients are equal to the last bit, whatever labels other positions have."""
    student, teacher, labels = draws(dtype)
    labels = labels.clamp(min=0)
    options = {"common": COMMON, "backend": backend}
    found = [
        vocabulary_losses(**student, **teacher, labels=given, index=index, **options)
        for given, index in (
            (labels.masked_fill(~counted, -100), None),
            (labels.masked_fill(~counted, 5), counted.flatten().nonzero()[:, 0]),
        )
    ]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert bool(found[0].total) == bool(found[0].soft) == bool(counted.any())
    gradients = (torch.autograd.grad(losses.total, list(student.values())) for losses in found)
    for mine, other in zip(*gradients, strict=True):
        assert mine.dtype == dtype and torch.equal(mine, other)


class Asked(TorchDispatchMode):
    """Asked counts the operations that reach the dispatcher, and adds up the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.names[function.name()] += 1
        if function.name() in ("aten::mm", "aten::mm.out", "aten::addmm_"):
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        return found


def test_products_are_shared():
    """The task needs no product beyond those of soft labels; gradients of single losses need another pass."""
    student, teacher, labels = draws(torch.float32)
    index = (labels != -100).flatten().nonzero()[:, 0]
    teacher = {name: x[:COMMON] if x.shape[0] == OTHER else x for name, x in teacher.items()}
    student = {
        name: x.detach()[:COMMON].requires_grad_() if x.shape[0] == VOCABULARY else x
        for name, x in student.items()
    }
    labels, counts = labels.clamp(max=COMMON - 1), {}
    for name in ("soft", "both", "weighed afterwards"):
        with Asked() as asked:
            if name == "soft":
                soft_label_alignment(**student, **teacher, index=index, backend="chunked").backward()
            else:
                found = vocabulary_losses(**student, **teacher, labels=labels, index=index, backend="chunked")
                (found.total if name == "both" else found.task + found.soft).backward()
        counts[name] = asked.products
        assert not {"aten::nonzero", "aten::_local_scalar_dense"} & set(asked.names), "waits for the device"
    assert counts["both"] == counts["soft"] > 0
    assert counts["weighed afterwards"] == 2 * counts["both"]


def test_without_gradients_nothing_is_recorded():
    student, teacher, labels = draws(torch.float32)
    with_gradients = vocabulary_losses(**student, **teacher, labels=labels, common=COMMON)
    with torch.no_grad():
        found = vocabulary_losses(**student, **teacher, labels=labels, common=COMMON)
    assert all(loss.requires_grad for loss in with_gradients)
    assert not any(loss.requires_grad for loss in found)
    torch.testing.assert_close(tuple(found), tuple(loss.detach() for loss in with_gradients))


def test_a_weight_of_nothing_leaves_the_other_loss():
    student, teacher, labels = draws()
    task, _ = apart(student, teacher, labels, "mean", smoothing=0.0)
    found = vocabulary_losses(**student, **teacher, labels=labels, common=COMMON, weights=(2, 0))
    inputs = list(student.values())
    for mine, true in zip(
        torch.autograd.grad(found.total, inputs), torch.autograd.grad(2 * task, inputs), strict=True
    ):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common": None}, "vocabularies of 211 and 205, expected equal ones, or in `common`"),
        ({"common": 206}, "common: got 206, expected a number from 1 to 205"),
        ({"common": 0}, "common: got 0, expected"),
        ({"labels": torch.zeros(BATCH, TOKENS)}, "labels: got .* torch.float32, expected .* int64"),
        ({"index": torch.zeros(2)}, r"index: got \(2,\) torch.float32"),
        ({"teacher_bias": torch.zeros(VOCABULARY)}, "teacher_bias: got .*V=205"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"divergence": "kl"}, "'forward_kl'"),
        ({"student_softcap": 0.0}, "student_softcap: got 0.0"),
        ({"backend": "cpp"}, "backend 'cpp' cannot run vocabulary_losses"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    student, teacher, labels = draws(torch.float32)
    arguments = {**student, **teacher, "labels": labels, "common": COMMON} | changes
    with pytest.raises(ValueError, match=message):
        vocabulary_losses(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (64, 16)], ids=str)
def test_narrowed_in_its_own_memory(shape, dtype, monkeypatch):
    monkeypatch.setattr(common, "NARROWED_AT_ONCE", 16)
    x = torch.randn(shape)
    expected, place = x.to(dtype), x.data_ptr()
    found = common.narrowed(x, dtype)
    assert torch.equal(found, expected) and found.data_ptr() == place


@pytest.mark.parametrize("on_gpu", [False, True])
def test_block_sizes(on_gpu):
    """Logits of a block stay within the limit, unless a block of the fewest tokens already exceeds it."""
    for vocabulary in (50, 8192, 30522, 152064, 262144):
        tokens = head_module.block_tokens(on_gpu, vocabulary, vocabulary)
        assert tokens >= head_module.MIN_TOKENS
        if tokens > head_module.MIN_TOKENS:
            limit = head_module.GPU_BYTES if on_gpu else 2 * 4 * head_module.BLOCK_ELEMENTS
            assert 2 * 4 * tokens * vocabulary <= limit


def test_a_graph_keeps_tokens_that_do_not_count():
    """A mask cannot be read while a graph is traced, so the definition hides these tokens, whatever they hold."""
    student, teacher, labels = draws(torch.float32)
    labels = labels.clamp(min=0).masked_fill(~COUNTED, -100)
    teacher["teacher_hidden"][~COUNTED] = torch.nan

    def losses():
        return vocabulary_losses(**student, **teacher, labels=labels, common=COMMON, backend="reference")

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for mine, other in zip(compiled(), losses(), strict=True):
        torch.testing.assert_close(mine, other)
    gradients = (torch.autograd.grad(f().total, list(student.values())) for f in (compiled, losses))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)
