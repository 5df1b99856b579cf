"""Make batches of examples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dsdistill.data.batch import NO_LABEL, Batch
from dsdistill.data.examples import Examples, Packed, TextPairs, texts_of
from dsdistill.data.mixture import Mixture
from dsdistill.data.packing import Document, packed_batch

Set = Examples | Packed | TextPairs | Mixture


def located(examples: Set, row: int) -> tuple[Examples | Packed | TextPairs, int, int]:
    """Return the source that holds an example, its row there, and the number of texts in all earlier sources."""
    if not isinstance(examples, Mixture):
        return examples, row, 0
    source = examples.source(row)
    before = examples.parts[:source]
    return (
        examples.parts[source],
        row - int(examples.bounds[source]),
        sum(len(texts_of(part)) for part in before),
    )


def one_source(examples: Set) -> Examples | Packed | TextPairs:
    """Return the first source of examples, which has the same form as all others."""
    return examples.parts[0] if isinstance(examples, Mixture) else examples


def collate(examples: Set, rows: Sequence[int], pad_id: int, epoch: int | None = None) -> Batch:
    """Return the given rows as one batch, padded on the right to the longest of them; without rows, one filler row.

    The two texts of a pair become two rows, one after the other; see `Batch.pair`.

    epoch: decides which tokens of an example are masked; None: as in evaluation.
    """
    found = [located(examples, row) for row in rows]
    form = one_source(examples)
    if isinstance(form, Packed):
        spans = form.parts.documents.spans is not None
        blocks = [_block(*place) for place in found]
        batch = packed_batch(blocks, pad_id, spans=spans)
        return _with_sources(batch, examples, np.repeat(rows, [len(block) for block in blocks]))
    pair = None
    if isinstance(form, TextPairs):
        found = [(part.texts, 2 * row + side, before) for part, row, before in found for side in (0, 1)]
        form, rows = form.texts, np.repeat(rows, 2)
        pair = torch.arange(len(found)) // 2 if found else torch.tensor([-1])
    if not found:
        return _with_sources(replace(_filler(form, pad_id), pair=pair), examples, rows)
    held = [_Row(part, row, epoch) for part, row, _ in found]
    width = max(len(row.seen) for row in held)
    input_ids = torch.full((len(held), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(held), width), dtype=torch.bool)
    token_types = None if form.documents.types is None else torch.zeros_like(input_ids)
    by_token = form.labels is None
    labels = torch.full_like(input_ids, NO_LABEL) if by_token else _labels(found)
    tables = [np.empty((0, 4), np.int64)]
    for i, row in enumerate(held):
        length = len(row.seen)
        input_ids[i, :length] = torch.from_numpy(row.seen.astype(np.int64))
        mask[i, :length] = True
        if by_token:
            labels[i, :length] = torch.from_numpy(row.labels)
        if token_types is not None:
            token_types[i, :length] = torch.from_numpy(row.types.astype(np.int64))
        if form.documents.spans is not None:
            tables.append(np.insert(row.spans, 0, i, axis=1))
    batch = Batch(
        input_ids,
        mask,
        labels,
        token_types,
        tuple(part.name(row) for part, row, _ in found),
        torch.tensor([before + row for _, row, before in found]),
        None if form.documents.spans is None else torch.from_numpy(np.concatenate(tables)),
        counted=_counted(form, labels, mask),
        pair=pair,
    )
    return _with_sources(batch, examples, rows)


def mixed(batch: Batch, other: Batch, share: Tensor, pad_id: int) -> Batch:
    """Return the rows of `batch`, each mixed with the same row of `other`, which has as many rows.

    share: (B,) float32, the share of the row of `batch`; see `Batch.share`.
    """
    width = max(of.mask.shape[1] for of in (batch, other))

    def widen(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    reads_other = (share < 1)[:, None] & widen(other.mask, False)
    return replace(
        batch,
        input_ids=widen(batch.input_ids, pad_id),
        mask=widen(batch.mask, False) | reads_other,
        token_types=None if batch.token_types is None else widen(batch.token_types, 0),
        partner_ids=widen(other.input_ids, pad_id),
        partner_labels=other.labels,
        share=share,
    )


def _with_sources(batch: Batch, examples: Set, rows: Sequence[int]) -> Batch:
    """Return the batch with the source of each example, if there are several sources."""
    if not isinstance(examples, Mixture):
        return batch
    sources = [examples.source(row) for row in rows] or [-1]
    return replace(batch, source=torch.tensor(sources))


class _Row:
    """Hold an example as the models see it."""

    def __init__(self, examples: Examples, row: int, epoch: int | None):
        self.seen, self.types = examples.tokens(row), examples.types(row)
        self.labels = examples.token_labels(row) if examples.labels is None else None
        if examples.masking is not None:
            self.seen, chosen = examples.masking.draw(self.seen, row, epoch)
            if examples.masking.predicted:
                self.labels = chosen
        self.spans = examples.spans(row) if examples.documents.spans is not None else None


def _labels(found: list[tuple[Examples, int, int]]) -> Tensor:
    return torch.stack([part.labels[row] for part, row, _ in found])


def _block(packed: Packed, block: int, before: int) -> list[Document]:
    parts, documents = packed.parts, []
    for row in packed.of(block):
        documents.append(
            Document(
                parts.tokens(row),
                parts.token_labels(row) if parts.prompted else None,
                parts.spans(row) if parts.documents.spans is not None else None,
                parts.name(row),
                before + row,
            )
        )
    return documents


def _counted(examples: Examples, labels: Tensor, mask: Tensor) -> Tensor | None:
    """Return (K,) int64, the flat places of tokens to predict; None if labels belong to whole examples."""
    if examples.labels is not None:
        return None
    chosen = (labels != NO_LABEL) & mask
    if examples.masking is None or not examples.masking.predicted:
        # A causal model predicts each token from those before it, so it cannot predict the first.
        chosen[:, 0] = False
    return chosen.flatten().nonzero()[:, 0]


def _filler(examples: Examples, pad_id: int) -> Batch:
    # Two tokens wide, so that logits shifted against next-token labels are not an empty tensor.
    input_ids = torch.full((1, 2), pad_id, dtype=torch.int64)
    if examples.labels is None:
        labels = torch.full_like(input_ids, NO_LABEL)
    else:
        labels = torch.full((1,), NO_LABEL, dtype=examples.labels.dtype)
    token_types = None if examples.documents.types is None else torch.zeros_like(input_ids)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    spans = None if examples.documents.spans is None else torch.empty((0, 4), dtype=torch.int64)
    counted = _counted(examples, labels, mask)
    return Batch(input_ids, mask, labels, token_types, ("",), torch.tensor([-1]), spans, counted=counted)
