"""Test whether a model keeps the documents of a packed row apart, before any weight is loaded.

The library finds the documents of a row by positions that restart, and masks attention between them. Families whose
layers carry a state from token to token, or that count positions themselves, ignore this without a warning.
"""

import functools

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dsdistill.config import UserError
from dsdistill.data.batch import Batch
from dsdistill.data.packing import Document, packed_batch
from dsdistill.models.build import FLASH, first_line, flash_here
from dsdistill.models.probe import HALF_ROUNDING, ROUNDING, Keyed, smallest, under
from dsdistill.models.small_copy import copied_layers, layer_kinds, make_small
from dsdistill.models.tracer import Tracer, callee

# Lengths of the trial's documents, by row. They are longer than the copy's windows, and one row has filler at its end.
_LENGTHS = ((11, 12), (12, 10))
# Largest change of a document's states, relative to the largest state, when another document changes. It is not 0,
# because experts then get other numbers of tokens, which some processors round differently (6e-8 in DeepSeek V3 on an
# AMD EPYC). In families that leak the change is 5e-2 and more.
_UNSEEN = 1e-6


def leak(config: PretrainedConfig, place: str, implementation: str = "auto") -> str | None:
    """Return why a causal language model may not read packed rows; None if it keeps their documents apart.

    A small random copy reads two rows of two documents. Up to rounding, the states of a row's second document must not
    depend on the first, and each document's states must be those of the document alone. In messages the reason follows
    "model type X, ".

    config: architecture of the model; place: the config key that errors name; implementation: the attention's, as
    `attn_implementation` in a config. Flash attention is tried if it can run here, otherwise eager attention is.

    Raises:
        UserError: the model cannot do the task at all.
    """
    key = config.to_json_string(use_diff=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return _leak(Keyed(key, config), place, implementation)


@functools.lru_cache(maxsize=256)  # prepare and plan call it again
def _leak(keyed: Keyed, place: str, implementation: str) -> str | None:
    try:
        return _tried(*_copy(keyed.config, place, implementation), place)
    except UserError:
        raise
    except Exception as error:  # the model takes no positions, or needs a mask
        return f"which cannot run packed rows ({first_line(error)[:100]})"


def _copy(config: PretrainedConfig, place: str, implementation: str) -> tuple[PreTrainedModel, float]:
    """Return the small copy, with the run's attention if that can run here, and the tolerance for rounding."""
    task = "causal_lm"
    small, eager = smallest(config, task, place, copied_layers(layer_kinds(config, task, place)))
    model = under(implementation, small, task, place, eager)
    if implementation != FLASH or not flash_here():
        return model, ROUNDING
    model = make_small(small, task, place, FLASH)
    model.load_state_dict(eager.state_dict())
    model.to(torch.device("cuda"), torch.bfloat16)  # type: ignore[arg-type]  # a decorator hides the arguments
    return model, HALF_ROUNDING


def _tried(model: PreTrainedModel, tolerance: float, place: str) -> str | None:
    tracer = Tracer(callee(model, "causal_lm", place))
    batch, other = (_batch(change).to(model.device) for change in (0, 1))
    packed, changed = _documents(tracer, batch), _documents(tracer, other)
    alone = _documents(tracer, batch.unpacked)
    if not (packed - changed)[1::2].abs().max() <= _UNSEEN * alone.abs().max().clamp_min(0.1):
        return "in which a document sees those before it in its row"
    if not (packed - alone).abs().max() <= tolerance * alone.abs().max().clamp_min(0.1):
        return "which computes something else of a document in a packed row than of it alone"
    return None


def _batch(change: int) -> Batch:
    """Return two packed rows of two documents; `change` is added to the tokens of each row's first document."""
    numbers = np.arange(24)
    blocks = [
        [
            Document((numbers[:length] * 7 + 5 * row + 3 * place + change * (place == 0)) % 61 + 2)
            for place, length in enumerate(lengths)
        ]
        for row, lengths in enumerate(_LENGTHS)
    ]
    return packed_batch(blocks, pad_id=0)


def _documents(tracer: Tracer, batch: Batch) -> Tensor:
    """Return the last states, (documents, length of the longest, D), 0 beyond the end of a document."""
    output = tracer(batch).output
    assert output is not None  # a language model always has it
    rows = batch.unpacked
    if batch.places is not None:
        output = output.flatten(0, 1)[batch.places.clamp(min=0)]
    return output.float().masked_fill(~rows.mask[..., None], 0)
