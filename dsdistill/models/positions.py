"""Try whether a model has positions for texts of the longest length asked for, before any weight is loaded."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.config import UserError
from dsdistill.models.capture import layer_list
from dsdistill.models.settings import text_config
from dsdistill.models.small_copy import VOCABULARY, make_small, small_copies

_LONGEST = 16384  # tokens that are tried: masks of longer texts take memory, and positions are rotary there


class _Reached(Exception):
    """The first layer is reached: embeddings and positions have done their work."""


def check_length(config: PretrainedConfig, task: str, length: int, padding: int | None, place: str) -> None:
    """Raise UserError where the model has fewer positions than `length`.

    Families count them in their own ways: RoBERTa's and its kin begin after the padding token. So one row is tried,
    on the embeddings of a small copy alone.

    padding: the padding token that the run gives the model; None: it keeps its own.
    """
    text = text_config(config)
    positions = getattr(text, "max_position_embeddings", None)
    most = positions if isinstance(positions, int) and 0 < positions < length else length
    model = _embeddings(config, task, place, padding) if most <= _LONGEST else None
    if model is not None and not _runs(model, most):
        most = _most(model, most)
    if most < length:
        raise UserError("data.max_length", length, f"at most the {place}'s {most} positions")


def _embeddings(
    config: PretrainedConfig, task: str, place: str, padding: int | None
) -> PreTrainedModel | None:
    """Return a small copy of which the first layer does not run; None where no copy runs even one token."""
    own = getattr(text_config(config), "pad_token_id", None)
    token = padding if padding is not None else own if isinstance(own, int) and own >= 0 else 0
    for small in small_copies(config, min(2, text_config(config).num_hidden_layers)):
        text = text_config(small)
        text.pad_token_id, text.vocab_size = token, max(VOCABULARY, token + 2)
        try:
            model = make_small(small, task, place, None)
            layers = layer_list(model)
            if layers is not None:
                layers[0].register_forward_pre_hook(_stop)
            if _runs(model, 1):
                return model
        except Exception:  # the probe tells what is wrong with it
            continue
    return None


def _stop(layer: nn.Module, _) -> None:
    raise _Reached


def _runs(model: PreTrainedModel, length: int) -> bool:
    token = text_config(model.config).vocab_size - 1  # not the padding token
    ids = torch.full((1, length), token)
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad():
            model.base_model(**inputs)
    except _Reached:
        return True
    except Exception:  # an index out of range, sizes that do not fit
        return False
    return True


def _most(model: PreTrainedModel, length: int) -> int:
    """Return the longest text that runs, given that `length` tokens do not."""
    most, failing = 1, length
    while failing - most > 1:
        middle = (most + failing) // 2
        most, failing = (middle, failing) if _runs(model, middle) else (most, middle)
    return most
