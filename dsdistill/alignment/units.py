"""Make the units that relations compare: vectors of sequences, over the examples of a micro-batch on all ranks."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsdistill.data.batch import Batch


def wide(x: Tensor) -> Tensor:
    """Return x as float32, or unchanged if it is float64: sums are computed in these types."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def centred(states: Tensor) -> Tensor:
    """Return states (…, D) minus the mean of their D values, in the type of `states`."""
    return (wide(states) - wide(states).mean(-1, keepdim=True)).to(states.dtype)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each sequence's valid tokens, (B, D), 0 if there are none; float32, or float64 as the input.

    hidden: (B, N, D). mask: (B, N) bool, True = valid.
    """
    total = wide(hidden).masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def unpacked(states: Tensor, batch: Batch) -> Tensor:
    """Return (S, L, D): the states (B, N, D) laid out as the rows of `batch.unpacked`.

    Where `batch.unpacked.mask` is False, the state is arbitrary but finite. The result is a copy, or `states` itself if
    the batch is not packed.
    """
    if batch.places is None:
        return states
    # The index has a fixed size, so that nothing waits for the device.
    return states.flatten(0, 1)[batch.places.clamp(min=0)]


def pooled(states: Tensor, batch: Batch) -> Tensor:
    """Return the mean_pool of each document, (B, D) or packed (S, D), from states (B, N, D).

    Packed documents are pooled where they are: if they were laid out as rows, each would take as much memory as the
    longest.
    """
    if batch.places is None:
        return mean_pool(states, batch.mask)
    flat, count = wide(states).flatten(0, 1), len(batch.places)
    total = flat.new_zeros(count + 1, flat.shape[1]).index_add(0, batch.owners, flat)[:count]
    return total / (batch.places >= 0).sum(1, keepdim=True).clamp(min=1)


def text_vectors(states: Tensor, batch: Batch, pooling: str) -> Tensor:
    """Return each text's vector before normalisation, (B, D), float32, or float64 as the input; finite for filler rows.

    states: (B, N, D), the model's last hidden states. pooling: mean of a text's tokens, cls (first) or last token.
    """
    if pooling == "mean":
        return mean_pool(states, batch.mask)
    if pooling == "cls":
        return wide(states[:, 0])
    last = (batch.mask.sum(1) - 1).clamp(min=0)
    return wide(states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0])


def unit_vectors(states: Tensor, batch: Batch, pooling: str) -> Tensor:
    """Return the vectors of text_vectors, scaled to length 1."""
    return F.normalize(text_vectors(states, batch, pooling), dim=-1)


def pair_vectors(vectors: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the vectors of the first and of the second texts of a batch's n pairs, (n, D) each, from (B, D)."""
    assert batch.pair is not None  # data without pairs has been refused
    real = ((batch.pair >= 0) & batch.rows).nonzero()[:, 0]
    rows = real[batch.pair[real].argsort(stable=True)]
    return vectors[rows[::2]], vectors[rows[1::2]]


def gather_rows(own: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, (n, D); gradients flow only to this rank's rows (n_own, D).

    n_own may differ between ranks and may be 0. Every rank must call this equally often.

    Backward needs no communication: each rank computes the whole loss, and the sum of the ranks' gradients is the
    gradient of the loss at all rows.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    count = torch.full((1,), len(own), device=own.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    lengths = [int(count) for count in counts]
    padded = own.new_zeros(max(lengths), own.shape[1])
    padded[: len(own)] = own.detach()
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    rows = [padded_rows[:length] for padded_rows, length in zip(gathered, lengths, strict=True)]
    rows[dist.get_rank()] = own
    return torch.cat(rows)


def shared_sum(loss: Tensor, own: int, everywhere: int) -> Tensor:
    """Return this rank's share of everywhere · loss; every rank has the same loss, a mean over `everywhere` units.

    Its value is own · loss, so that the ranks' values add up to the whole. Its gradient is that of the whole, because
    each rank's gradient reaches only its own units (see gather_rows).
    """
    return everywhere * loss - (everywhere - own) * loss.detach()
