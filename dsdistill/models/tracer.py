"""Run models and record the traces that the alignment terms read."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsdistill.config import UserError
from dsdistill.config.schema import LANGUAGE
from dsdistill.data.batch import Batch
from dsdistill.models.build import Headless, plain_model
from dsdistill.models.capture import Capture, final_norm
from dsdistill.models.one_row import in_rows, one_row, wants_one_row
from dsdistill.models.settings import text_config
from dsdistill.models.trace import Trace


def model_inputs(model: PreTrainedModel, batch: Batch, pad: int | None = None) -> dict[str, Tensor]:
    """Return the inputs of the library's forward pass.

    Packed rows come without a mask: only then does the library look for documents, by positions that restart. It reads
    the filler of such a row as one more document. In other batches a filler row has one visible token, because
    attention over no token would be undefined. pad: the token that fills padding; None: the batch's own. Decoders that
    classify look for the last token that is not their own padding token.
    """
    if batch.position_ids is not None:
        return {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    mask = batch.mask
    first = torch.zeros_like(mask)
    first[:, 0] = ~batch.rows
    ids = batch.input_ids if pad is None else batch.input_ids.masked_fill(~mask, pad)
    inputs = {"input_ids": ids, "attention_mask": (mask | first).long()}
    if batch.token_types is not None and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_types
    return inputs


def _whole_already(_: list[nn.Parameter]) -> AbstractContextManager:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Callee:
    """Hold a model and the module or engine that is called instead of it.

    module: the model itself or, for a language model, a Headless around it. call: the module, or an engine around it.
    whole: returns a context in which the given parameters are whole on this rank. pad: the token that fills padding;
    None: batches have the model's own.
    """

    model: PreTrainedModel
    module: nn.Module
    call: Callable
    whole: Callable[[list[nn.Parameter]], AbstractContextManager] = _whole_already
    pad: int | None = None


def callee(model: Any, task: str, place: str) -> Callee:
    """Return the Callee of a model for its task; `place` names it in messages.

    model: a transformers model, perhaps compiled by torch.compile(model), whose options are kept, or model.compile().
    """
    plain = plain_model(model, place)
    module = Headless(plain, place) if task in LANGUAGE else plain
    if plain is not model:
        return Callee(plain, module, model.dynamo_ctx(module.__call__))
    if module is not plain and plain._compiled_call_impl is not None:
        module.compile()
    return Callee(plain, module, module)


class Tracer:
    """Make the trace of a batch. This is the only place where a forward pass runs under capture."""

    def __init__(
        self,
        callee: Callee,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        values: bool = True,
        unrotated: bool = False,
    ):
        """Make a tracer that keeps `hidden`, `attention`, `values` and `unrotated` tensors; see Capture."""
        self.callee = callee
        self.model = callee.model
        self.capture = Capture(callee.model, hidden, attention, values, unrotated)

    @property
    def head(self) -> list[nn.Parameter]:
        """Return weight and bias (if any) of a language model's head, which terms use; nothing for other models."""
        if not isinstance(self.callee.module, Headless):
            return []
        head = self.model.get_output_embeddings()
        return [parameter for parameter in (head.weight, head.bias) if parameter is not None]

    def __call__(self, batch: Batch) -> Trace:
        """Return the trace of one forward pass; a language model's head must be whole on this rank."""
        inputs, flat = model_inputs(self.model, batch, self.callee.pad), False
        if batch.position_ids is not None:
            flat = wants_one_row(self.model)
            inputs = {name: one_row(values) for name, values in inputs.items()} if flat else inputs
        mixed = _mixed_embeddings(self.model, batch)
        with self.capture.recording() as made, _without_cache(self.model), mixed:
            outputs = self.callee.call(**inputs)
        made = self._complete(made, outputs)
        return in_rows(made, *batch.mask.shape) if flat else made

    def _complete(self, made: Trace, outputs: Any) -> Trace:
        """Add the model's outputs and its head to the trace, and return it."""
        if not isinstance(self.callee.module, Headless):
            made.logits = outputs.get("logits")
            made.output = outputs.get("last_hidden_state")  # the output of a model without a head
            return made
        made.output, made.norm = outputs["last_hidden_state"], final_norm(self.model)
        head = self.model.get_output_embeddings()
        made.head, made.head_bias = head.weight, head.bias
        made.factor, made.softcap = self.callee.module.form
        return made

    @contextlib.contextmanager
    def frozen(self, batch: Batch, made: Trace | None = None) -> Iterator[Trace]:
        """Yield a trace without gradients. A language model's head is whole on this rank only inside the context.

        made: the trace, if it exists already.
        """
        if made is None:
            with torch.no_grad():
                made = self(batch)
        with self.callee.whole(self.head):
            yield made


def check_checkpointing(model: PreTrainedModel, place: str) -> None:
    """Raise UserError for reentrant checkpointing, which runs layers without gradients first, so traces have none."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not isinstance(function, functools.partial) or not getattr(
            module, "gradient_checkpointing", False
        ):
            continue
        if function.keywords.get("use_reentrant", True):
            raise UserError(
                place,
                "gradient checkpointing with use_reentrant=True",
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})",
            )
        return  # all layers have the same setting


@contextlib.contextmanager
def _mixed_embeddings(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Mix the embeddings of a batch's tokens with those of its partners, if it has any.

    One call of the embeddings looks up both, because under ZeRO-3 their weight is whole only inside that call.
    """
    if batch.share is None:
        yield
        return
    assert batch.partner_ids is not None  # a batch with shares has it
    partner, own = batch.partner_ids, batch.share[:, None, None]

    def both(_, arguments):
        return (torch.cat([arguments[0], partner]), *arguments[1:])

    def mix(_, arguments, found):
        mine, other = found.chunk(2)
        return (own * mine + (1 - own) * other).to(found.dtype)

    embeddings = model.get_input_embeddings()
    hooks = embeddings.register_forward_pre_hook(both), embeddings.register_forward_hook(mix)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Keep the model from filling a cache of keys and values, which only generation reads."""
    config = text_config(model.config)
    cached = getattr(config, "use_cache", None)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached


def freeze(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Freeze a model and let it compute in `dtype`.

    Buffers keep their type, because rounded rotary frequencies would rotate by wrong angles.
    """
    if next(module.parameters()).device != device:  # the planner's models have no contents and cannot move
        module.to(device)
    cast_parameters(module.eval().requires_grad_(False), dtype)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter another type; tied parameters stay tied.

    `model.to(dtype)` would cast buffers, too, and it cannot replace parameters without contents, such as the planner's.
    """
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in cast:
                cast[id(parameter)] = nn.Parameter(
                    parameter.detach().to(dtype), requires_grad=parameter.requires_grad
                )
            setattr(module, name, cast[id(parameter)])


def count_parameters(model: nn.Module) -> int:
    """Return the number of values of all parameters, sharded or not; tied ones count once."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
