"""Test how a model numbers positions, before any weight is loaded: how many it has, and where it starts to count."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.config import UserError
from dsdistill.models.capture import body, layer_list
from dsdistill.models.settings import setting, text_config
from dsdistill.models.small_copy import VOCABULARY, make_small, small_copies

_LONGEST = 16384  # most tokens that are tried: longer masks take memory, and such models use rotary positions


class _Reached(Exception):
    """Signal that the first layer is reached: embeddings and positions have worked."""

    def __init__(self, states: Tensor):
        super().__init__()
        self.states = states


def check_length(config: PretrainedConfig, task: str, length: int, padding: int | None, place: str) -> None:
    """Raise UserError if the model has fewer positions than `length`.

    Families count positions differently: RoBERTa and related models start after the padding token. So one row is tried,
    through the embeddings of a small copy only.

    padding: the padding token that the run gives the model; None: it keeps its own.
    """
    positions = setting(text_config(config), "max_position_embeddings")
    most = positions if isinstance(positions, int) and 0 < positions < length else length
    model = _embeddings(config, task, place, _padding(config, padding)) if most <= _LONGEST else None
    if model is not None and _states(model, most) is None:
        most = _most(model, most)
    if most < length:
        raise UserError("data.max_length", length, f"at most {most}, the number of the {place}'s positions")


def check_padding(config: PretrainedConfig, task: str, padding: int, place: str) -> None:
    """Raise UserError if the tokenizer's padding token would move the positions of a trained model.

    A run gives its models the tokenizer's padding token. RoBERTa and related models count positions from the padding
    token's id. If this id is not the one used in their training, every token gets a wrong position.
    """
    own = setting(text_config(config), "pad_token_id")
    if not isinstance(own, int) or own < 0 or own == padding:
        return
    entries = max(own, padding) + 2
    models = [_embeddings(config, task, place, token, entries) for token in (own, padding)]
    if models[0] is None or models[1] is None:
        return
    models[1].load_state_dict(models[0].state_dict())
    first, second = (_states(model, 4) for model in models if model is not None)
    if first is not None and second is not None and not torch.equal(first, second):
        got = f"{own}, from which this model counts positions"
        raise UserError(f"{place}.config.pad_token_id", got, f"{padding}, as in the tokenizer")


def _padding(config: PretrainedConfig, given: int | None) -> int:
    own = setting(text_config(config), "pad_token_id")
    return given if given is not None else own if isinstance(own, int) and own >= 0 else 0


def _embeddings(
    config: PretrainedConfig, task: str, place: str, padding: int, entries: int = VOCABULARY
) -> PreTrainedModel | None:
    """Return a small copy that stops before its first layer; None if no copy runs even one token."""
    for small in small_copies(config, min(2, text_config(config).num_hidden_layers)):
        text = text_config(small)
        text.pad_token_id, text.vocab_size = padding, max(VOCABULARY, entries, padding + 2)
        try:
            model = make_small(small, task, place, None)
        except Exception:  # the probe reports what is wrong with it
            continue
        layers = layer_list(model)
        if layers is not None:
            layers[0].register_forward_pre_hook(_stop, with_kwargs=True)
        if _states(model, 1) is not None:
            return model
    return None


def _stop(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


def _states(model: PreTrainedModel, length: int) -> Tensor | None:
    """Return the first layer's input for a text of `length` tokens; None if that fails."""
    token = text_config(model.config).vocab_size - 1  # not the padding token
    ids = torch.full((1, length), token)
    try:
        with torch.no_grad():
            return body(model)(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    except _Reached as reached:
        return reached.states
    except Exception:  # an index out of range, sizes that do not fit
        return None


def _most(model: PreTrainedModel, length: int) -> int:
    """Return the length of the longest text that runs, given that `length` tokens do not."""
    most, failing = 1, length
    while failing - most > 1:
        middle = (most + failing) // 2
        most, failing = (middle, failing) if _states(model, middle) is not None else (most, middle)
    return most
