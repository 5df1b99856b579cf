"""Make a Batch from a collator's tensors, in any of their common forms."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsdistill.config.errors import UserError
from dsdistill.data.batch import NO_LABEL, Batch

# These inputs are refused, because they would be lost silently.
_REFUSED = ("inputs_embeds", "pixel_values", "input_features", "decoder_input_ids", "past_key_values")


def as_batch(inputs: Mapping[str, Any] | Batch, task: str) -> Batch:
    """Return a Batch of a collator's tensors: documents as rows, padded on the right.

    Rows padded on the left, or in the middle, are shifted; rows that pack several documents are split into one row per
    document. So the same documents give the same loss in every form. Batches are best left on the CPU, where collators
    make them: on a GPU this function waits for the device, unless the mask is bool and no positions are given.

    Args:
        inputs: a Batch, which is returned as it is, or
            input_ids (B, N) int64;
            attention_mask (B, N), not 0 where a token counts; numbers above 1 distinguish the documents of a row.
                Without a mask every token counts;
            position_ids (B, N) or (1, N): documents begin where they are 0, and positions count up by 1 inside one;
            seq_idx (B, N), the document of each token, or cu_seq_lens_q (documents + 1,), the bounds of the documents
                in a single row; both are read only without position_ids;
            token_type_ids (B, N);
            labels: for tasks that predict tokens (B, N), not shifted, NO_LABEL (-100) where nothing is predicted;
                causal_lm takes input_ids if there are none. For other tasks (B,) or (B, 1): classes (-100: none) or
                scores;
            spans (S, 4), as Batch.spans, for rows that are not packed;
            pair (B,), as Batch.pair, for rows that are not packed.
            Other keys are ignored.
        task: as in a config.

    Raises:
        UserError: a wrong shape, a mask of more than two dimensions, or an input that is not made of tokens.
    """
    if isinstance(inputs, Batch):
        return inputs
    if not isinstance(inputs, Mapping):
        raise UserError("batch", type(inputs).__name__, "a dict of tensors with input_ids")
    ids = _tensor(inputs, "input_ids", dimensions=2)
    if ids is None:
        raise UserError(
            "batch", f"no input_ids, but {', '.join(map(str, inputs)) or 'nothing'}", "input_ids (B, N)"
        )
    for name in _REFUSED:
        if inputs.get(name) is not None:
            raise UserError("batch", name, "only input_ids")
    shape = tuple(ids.shape)
    if not ids.numel():
        raise UserError("batch: input_ids", f"shape {shape}", "at least one token")
    ids = ids.long()
    mask = _tensor(inputs, "attention_mask", dimensions=2, shape=shape)
    positions = _positions(inputs, shape)
    labels = _labels(inputs, ids, task)
    columns = {"ids": ids}
    types = _tensor(inputs, "token_type_ids", dimensions=2, shape=shape)
    if types is not None:
        columns["types"] = types
    if labels is not None and labels.dim() == 2:
        columns["labels"] = labels
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    documents = _documents(mask, positions, valid)
    spans, pair = _spans(inputs, shape), _pair(inputs, shape)
    if documents is not None:
        if labels is not None and labels.dim() == 1:
            raise UserError("batch", "several documents in one row", f"one in each row with task {task}")
        if spans is not None:
            raise UserError("batch", "spans with packed rows", "rows of one document each")
        if pair is not None:
            raise UserError("batch", "pair with packed rows", "rows of one text each")
        columns, valid = _unpacked(columns, documents, valid)
    elif mask is not None:
        columns, valid, before = _moved(columns, valid)
        if spans is not None:
            shift = before[spans[:, 0]]
            spans = torch.stack([spans[:, 0], spans[:, 1] - shift, spans[:, 2] - shift, spans[:, 3]], dim=1)
    if "labels" in columns:
        labels = columns["labels"].masked_fill(~valid, NO_LABEL)
    return Batch(columns["ids"], valid, labels, columns.get("types"), spans=spans, pair=pair)


def _tensor(
    inputs: Mapping[str, Any], name: str, dimensions: int, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    values = inputs.get(name)
    if values is None:
        return None
    if not isinstance(values, Tensor):
        raise UserError(
            f"batch: {name}", type(values).__name__, "a tensor (a collator's return_tensors='pt')"
        )
    if values.dim() != dimensions or values.is_floating_point() or (shape and tuple(values.shape) != shape):
        wanted = " × ".join(map(str, shape)) if shape else {1: "(n,)", 2: "(B, N)"}[dimensions]
        raise UserError(
            f"batch: {name}",
            f"{tuple(values.shape)} {values.dtype}",
            f"{wanted} integers, one for each token",
        )
    return values


def _positions(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """Return (B, N), each token's position in its document: as given, or computed from where documents begin."""
    given = inputs.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2 and len(given) == 1:
        return _tensor({"position_ids": given.expand(shape[0], -1)}, "position_ids", 2, shape)
    if given is not None:
        return _tensor(inputs, "position_ids", dimensions=2, shape=shape)
    numbers = _tensor(inputs, "seq_idx", dimensions=2, shape=shape)
    if numbers is None:
        bounds = _tensor(inputs, "cu_seq_lens_q", dimensions=1)
        if bounds is None:
            return None
        if shape[0] != 1:
            raise UserError("batch: cu_seq_lens_q", f"{shape[0]} rows", "one row, which holds all documents")
        places = torch.arange(shape[1], device=bounds.device)
        numbers = torch.searchsorted(bounds[1:].contiguous(), places, right=True)[None]
    begins = numbers != torch.nn.functional.pad(numbers[:, :-1], (1, 0), value=-1)
    places = torch.arange(shape[1], device=numbers.device).expand(shape)
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def _spans(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    spans = inputs.get("spans")
    if spans is None:
        return None
    if not isinstance(spans, Tensor) or spans.dim() != 2 or spans.shape[1] != 4 or spans.is_floating_point():
        raise UserError(
            "batch: spans", _shown(spans), "(S, 4) integers: row, first token, one past the last, kind"
        )
    limits = torch.tensor([shape[0] - 1, shape[1], shape[1]], device=spans.device)
    if len(spans) and bool(((spans[:, :3] < 0) | (spans[:, :3] > limits)).any()):
        raise UserError(
            "batch: spans", "spans outside the batch", f"rows below {shape[0]} and tokens up to {shape[1]}"
        )
    return spans.long()


def _pair(inputs: Mapping[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    pair = _tensor(inputs, "pair", dimensions=1)
    if pair is None:
        return None
    own = pair[pair >= 0]
    counts = own.unique(return_counts=True)[1]
    if len(pair) != shape[0] or bool((counts != 2).any()):
        raise UserError(
            "batch: pair", f"{pair.tolist()[:12]}", f"{shape[0]} integers, each of them twice; -1 for filler"
        )
    return pair.long()


def _labels(inputs: Mapping[str, Any], ids: Tensor, task: str) -> Tensor | None:
    labels = inputs.get("labels")
    if labels is None:
        labels = inputs.get("label")
    if task in ("causal_lm", "masked_lm"):
        if labels is None:
            return ids if task == "causal_lm" else None
        if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.is_floating_point():
            raise UserError(
                "batch: labels", _shown(labels), f"{tuple(ids.shape)} integers, one for each token"
            )
        return labels.long()
    if labels is None:
        return None
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not isinstance(labels, Tensor) or labels.shape != ids.shape[:1]:
        raise UserError("batch: labels", _shown(labels), f"({ids.shape[0]},), one for each row")
    if task == "classification" and labels.is_floating_point():
        raise UserError("batch: labels", str(labels.dtype), "integers, the indices of classes")
    return labels.long() if task == "classification" else labels


def _shown(values: object) -> str:
    return f"{tuple(values.shape)} {values.dtype}" if isinstance(values, Tensor) else type(values).__name__


def _documents(mask: Tensor | None, positions: Tensor | None, valid: Tensor) -> Tensor | None:
    """Return (B, N) int64: the document of each token, counted over all rows; None: one document a row."""
    starts = None
    if mask is not None and mask.dtype != torch.bool and bool((mask > 1).any()):
        starts = mask != torch.nn.functional.pad(mask[:, :-1], (1, 0), value=0)
    elif positions is not None:
        first = torch.nn.functional.pad(valid[:, :-1], (1, 0), value=False)
        starts = valid & ((positions == 0) | ~first)
        follows = positions == torch.nn.functional.pad(positions[:, :-1], (1, 0), value=-1) + 1
        if not bool((~valid | torch.where(starts, positions == 0, follows)).all()):
            raise UserError(
                "batch: position_ids",
                "positions that do not count up by 1 from 0",
                "0, 1, 2, … in each document",
            )
    if starts is None:
        return None
    starts = starts.clone()
    starts[:, 0] = True
    documents = starts.flatten().cumsum(0).view_as(valid) - 1
    held = documents.masked_fill(~valid, -1)
    one_a_row = held.amax(1) == held.masked_fill(~valid, torch.iinfo(held.dtype).max).amin(1)
    return None if bool((one_a_row | ~valid.any(1)).all()) else documents


def _unpacked(
    columns: dict[str, Tensor], documents: Tensor, valid: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the columns with a row for each document, and the mask of those rows."""
    held = documents[valid]
    _, rows, lengths = torch.unique_consecutive(held, return_inverse=True, return_counts=True)
    width = max(2, int(lengths.max())) if len(lengths) else 2
    places = torch.arange(len(held), device=held.device) - (lengths.cumsum(0) - lengths)[rows]
    mask = torch.arange(width, device=held.device) < lengths[:, None]

    def laid(values: Tensor) -> Tensor:
        return values.new_zeros(len(lengths), width).index_put((rows, places), values[valid])

    return {name: laid(values) for name, values in columns.items()}, mask


def _moved(columns: dict[str, Tensor], valid: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the columns with valid tokens first, the mask, and (B,) how many tokens preceded the first valid one."""
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # stable: tokens keep their order
    moved = {name: values.gather(1, order) for name, values in columns.items()}
    return moved, valid.gather(1, order), valid.to(torch.uint8).argmax(1)
