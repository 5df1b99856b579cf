"""Run packed rows as one row, and bring the trace of the pass back to the rows.

Flash attention finds documents by their positions only in a single row. In a batch of several rows it would silently
treat each row as one document.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dsdistill.models.build import FLASH
from dsdistill.models.settings import text_config
from dsdistill.models.trace import AttentionTrace, Trace


def wants_one_row(model: PreTrainedModel) -> bool:
    """Return whether a model's attention keeps packed documents apart only in a single row."""
    return text_config(model.config)._attn_implementation == FLASH


def one_row(values: Tensor) -> Tensor:
    """Return the rows (B, N) end to end, (1, B·N)."""
    return values.reshape(1, -1)


def in_rows(trace: Trace, batch: int, tokens: int) -> Trace:
    """Return the trace of one row as that of `batch` rows of `tokens` tokens; only shapes change."""

    def states(x: Tensor | None) -> Tensor | None:  # (1, B·N, D) to (B, N, D)
        return None if x is None else x.reshape(batch, tokens, x.shape[-1])

    def heads(x: Tensor | None) -> Tensor | None:  # (1, H, B·N, D) to (B, H, N, D)
        return None if x is None else x[0].unflatten(1, (batch, tokens)).transpose(0, 1)

    def layer(of: AttentionTrace) -> AttentionTrace:
        names = ("query", "key", "value", "unrotated_query", "unrotated_key")
        laid: dict[str, Any] = {name: heads(getattr(of, name)) for name in names}
        return replace(of, **laid)

    return replace(
        trace,
        hidden={number: x.reshape(batch, tokens, x.shape[-1]) for number, x in trace.hidden.items()},
        last=states(trace.last),
        attention={number: layer(of) for number, of in trace.attention.items()},
        output=states(trace.output),
    )
