"""Find how a language model changes the product of hidden state and head: by a constant factor and a soft cap.

Names in the config do not tell this: `logits_scaling` divides in Granite and multiplies in HyperCLOVA X. So the
library's own forward pass runs from the base model's output to the logits, while fixed outputs replace the base model
and the head. No weight is read, so models may be sharded or without contents.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dsdistill.config import UserError
from dsdistill.models.capture import body
from dsdistill.models.settings import setting, text_config

# At _TINY a capped logit equals the product, at _HUGE it equals the cap.
_TINY, _HUGE = 2.0**-40, 1e30
_PRODUCTS = (_TINY, _HUGE, -_HUGE, 0.5, -1.0, 7.0, -40.0, 300.0)


class LogitForm(NamedTuple):
    """Describe how logits are computed: z = factor · hidden headᵀ, then softcap · tanh(z / softcap)."""

    factor: float = 1.0
    softcap: float | None = None


def logit_form(model: PreTrainedModel, place: str) -> LogitForm:
    """Return how the model's logits are computed; raise UserError if no LogitForm describes them.

    If the forward pass cannot run in this way, the default form is returned; the probe later compares the logits.
    """
    # This needs real numbers, even inside the planner, whose models have no contents.
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        return _read(model, place)


def _read(model: PreTrainedModel, place: str) -> LogitForm:
    head, name = model.get_output_embeddings(), model.config.model_type
    expected = "logits that are a linear map of the last hidden state, with a factor and a soft cap at most"
    made = _run(model, head)
    if made is None:
        return LogitForm()
    states, given, logits = made
    before = (given / states).flatten()
    values = logits[0, :, :1]
    if logits.shape[-1] != (entries := text_config(model.config).vocab_size):
        cut = f"{logits.shape[-1]} of {entries}"
        raise UserError(place, f"model type {name}, whose logits are {cut} entries of its head", expected)
    products = torch.tensor(_PRODUCTS, dtype=values.dtype)
    after, most = float(values[0]) / _TINY, abs(float(values[1]))
    softcap = most if most < 1.0 / _TINY else None
    wanted = softcapped(after * products, softcap)
    alike = torch.allclose(before, before[:1].expand_as(before), rtol=1e-5)
    if not alike or not torch.allclose(logits[0], wanted[:, None].expand_as(logits[0]), rtol=1e-5):
        got = f"model type {name}, whose logits are not such a function of the last hidden state"
        raise UserError(place, got, expected)
    if not math.isclose(after, 1, rel_tol=1e-5) and getattr(head, "bias", None) is not None:
        raise UserError(
            place,
            f"model type {name}, which scales logits and has a bias in its head",
            "a head without a bias",
        )
    factor = float(before[0]) * after
    return LogitForm(1.0 if math.isclose(factor, 1, rel_tol=1e-6) else factor, softcap)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return c · tanh(logits / c), or the logits themselves without a soft cap c."""
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _run(model: PreTrainedModel, head: nn.Module | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return states (1, n, D), the head's input, and the logits (1, n, V) made of _PRODUCTS; None if this fails."""
    names = {id(module): name for name, module in model.named_modules()}
    text = text_config(model.config)
    width, entries = (setting(text, name) for name in ("hidden_size", "vocab_size"))
    base, tokens = body(model), len(_PRODUCTS)
    if width is None or entries is None or base is model or id(head) not in names:
        return None
    states = (1 + torch.arange(tokens * width, dtype=torch.float64) % 5).view(1, tokens, width)
    products = torch.tensor(_PRODUCTS, dtype=torch.float64)[None, :, None].expand(1, tokens, entries)
    answer = _Head(products.clone())
    twin = _twin(model, {names[id(base)]: _Base(base, states), names[id(head)]: answer})
    try:
        logits = type(model).forward(twin, input_ids=torch.ones(1, tokens, dtype=torch.int64)).logits
    except Exception:  # the library may raise anything
        return None
    given = answer.given
    if len(given) != 1 or given[0].shape != states.shape or logits.shape[:2] != products.shape[:2]:
        return None
    return states, given[0].double(), logits.double()


def _twin(module: nn.Module, answers: dict[str, Any]) -> Any:
    """Return a module that shares everything with this one except the submodules at these dotted names."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    below: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = answer
        else:
            vars(twin)[first] = answer  # Python finds this before the submodule of that name
    for first, some in below.items():
        vars(twin)[first] = _twin(getattr(module, first), some)
    return twin


class _Output(BaseModelOutputWithPast):
    """Mimic a base model's output, in which every other attribute is None: caches, routers' logits."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Base:
    """Replace the base model, or the part of it that is called (OPT's decoder), and return given states."""

    def __init__(self, original: nn.Module, states: Tensor):
        self._original, self._states = original, states

    def __call__(self, *_, **__):
        return _Output(last_hidden_state=self._states)

    def __getattr__(self, name):
        value = getattr(self._original, name)
        return self if isinstance(value, nn.Module) else value


class _Head:
    """Replace the head, record its input and return given products."""

    def __init__(self, products: Tensor):
        self.products = products
        self.weight = products.new_empty(0)  # callers read its type
        self.given: list[Tensor] = []

    def __call__(self, states: Tensor) -> Tensor:
        self.given.append(states)
        return self.products
