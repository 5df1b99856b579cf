"""What holds for every operator's public function: precision, autocast, second backward, choice of backend."""

import ast
import logging
from pathlib import Path

import pytest
import torch
from operator_checks import BACKENDS

import dsdistill.ops
from dsdistill.bench import verify
from dsdistill.ops import attention_alignment, backends, pairwise_alignment
from dsdistill.ops.backends import _announce


def tensors(requires_grad=True):
    return [torch.randn(1, 2, 40, 8, requires_grad=requires_grad and i < 2) for i in range(4)]


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_second_backward_needs_retain_graph(backend):
    inputs = tensors()
    loss = attention_alignment(*inputs, backend=backend)
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:2])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_factor_scales_the_gradient(backend):
    inputs = tensors()
    plain = torch.autograd.grad(attention_alignment(*inputs, backend=backend), inputs[0])[0]
    scaled = torch.autograd.grad(attention_alignment(*inputs, backend=backend) * 3, inputs[0])[0]
    torch.testing.assert_close(scaled, plain * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend):
    inputs = tensors()
    expected = attention_alignment(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_alignment(*inputs, backend=backend)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    inputs = tensors()
    before = [x.detach().clone() for x in inputs]
    attention_alignment(*inputs, backend=backend, mask=torch.ones(1, 40, dtype=torch.bool)).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_a_loss_scale_reaches_float16_gradients_unharmed():
    # The gradient of the mean, about 1e-9, is below float16's smallest number, but 2^20 times it is not.
    inputs = [x.half() for x in tensors(requires_grad=False)]
    inputs[0].requires_grad_()
    options = {"divergence": "mse", "backend": "chunked"}
    (attention_alignment(*inputs, **options) * 2.0**20).backward()
    exact = [x.detach().double() for x in inputs]
    exact[0].requires_grad_()
    (attention_alignment(*exact, **options) * 2.0**20).backward()
    torch.testing.assert_close(
        inputs[0].grad.double(), exact[0].grad, rtol=1e-2, atol=1e-3 * exact[0].grad.abs().max()
    )


def test_no_gradient_is_computed_when_none_is_needed(monkeypatch):
    from dsdistill.ops.pairwise import chunked

    asked = []
    original = chunked.pairwise_total
    monkeypatch.setattr(
        chunked,
        "pairwise_total",
        lambda needs, *a, **k: (asked.append(tuple(needs)), original(needs, *a, **k))[1],
    )
    x = torch.randn(1, 9, 4, requires_grad=True)
    with torch.no_grad():
        pairwise_alignment(x, torch.randn(1, 9, 4), backend="chunked")
    pairwise_alignment(x.detach(), torch.randn(1, 9, 4), backend="chunked")
    pairwise_alignment(x, torch.randn(1, 9, 4), backend="chunked")
    assert asked == [(False,), (False,), (True,)]


def test_auto_says_once_what_it_takes(caplog):
    _announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="dsdistill"):
        attention_alignment(*tensors())
        attention_alignment(*(x[:, :, :17] for x in tensors()))
    messages = [r.message for r in caplog.records if "attention_alignment" in r.message]
    assert len(messages) == 1
    assert messages[0].startswith("attention_alignment: backend 'auto' takes '")


@pytest.mark.parametrize(
    ("kind", "tokens", "projection", "expected"),
    [
        ("avx512", 127, 384 * 768, "reference"),
        ("avx512", 2048, 768 * 1024, "cpp"),
        ("avx512", 8, 0, "cpp"),
        ("amx", 127, 384 * 768, "cpp"),
        ("amx", 127, 768 * 1024, "reference"),
        ("amx", 256, 384 * 768, "chunked"),
        ("amx", 2048, 256 * 384, "cpp"),
        ("amx", 2048, 0, "cpp"),
    ],
)
def test_auto_takes_torchs_products_of_hidden_states_by_a_table(
    kind, tokens, projection, expected, monkeypatch
):
    monkeypatch.setattr(backends, "CPU", backends.THRESHOLDS[kind])
    order = backends.hidden_order(tokens, projection)
    assert order[0] == expected and sorted(order) == ["chunked", "cpp", "reference"]


def test_unknown_and_missing_backends_are_named():
    with pytest.raises(ValueError, match="'auto' or one of"):
        attention_alignment(*tensors(), backend="magic")
    with pytest.raises(ValueError, match="'cuda' cannot run"):
        attention_alignment(*tensors(), backend="cuda")


def test_the_rule_catches_small_errors(monkeypatch):
    case = next(c for c in verify.all_cases() if c.name == "mse-causal")
    wrong = dict(verify.FUNCTIONS)
    right = wrong["attention"]
    wrong["attention"] = lambda *a, backend, **k: (
        right(*a, backend=backend, **k) * (1 if backend == "reference" else 1.0001)
    )
    monkeypatch.setattr(verify, "FUNCTIONS", wrong)
    with pytest.raises(verify.Mismatch, match="loss"):
        verify.check_parity(case, "chunked", torch.float32)


def test_operators_import_nothing_else_of_the_package():
    for path in Path(dsdistill.ops.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [n for n in names if n.startswith("dsdistill.") and not n.startswith("dsdistill.ops")]
            assert not ours, f"{path} imports {ours}"
