"""Pass over a whole set: the ranks share its examples, each is read once, and results get the set's order."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dsdistill.data import Batch, Set, Streamed, TextPairs, evaluation_batches, restore
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.prepare import Prepared

T = TypeVar("T")


def over(prepared: Prepared, ranks: Ranks, examples: Set, read: Callable[[Batch], T]) -> list[T]:
    """Apply `read` to each batch of one pass over `examples`; return the results of all ranks, on every rank.

    read: called without gradients for a batch on this rank's device; its result must be small and picklable. Every
    rank reads the same number of batches; the last may hold only filler rows. `in_order` restores the set's order.
    """
    made = []
    with torch.no_grad():
        for batch in evaluation_batches(
            examples,
            at_once(prepared, examples),
            ranks.world_size,
            ranks.rank,
            prepared.tokenizer.pad_token_id,
        ):
            made.append(read(batch.to(ranks.device)))
    return [part for of_rank in ranks.gather(made) for part in of_rank]


def at_once(prepared: Prepared, examples: Set) -> int:
    """Return the number of examples in a batch of one pass, so that it has no more rows than a batch in training.

    A pair of texts is two rows; training may read single texts while dev sets have pairs.
    """
    size = prepared.config.train.micro_batch_size
    doubled = isinstance(examples, TextPairs) and prepared.config.data.train_columns == 1
    return max(1, size // 2) if doubled else size


def indexed(train: Set) -> Set:
    """Return a train set that can be indexed: the first part of a streamed one, else the set itself."""
    return train.first() if isinstance(train, Streamed) else train


def in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (n, …) values in the order of the set, from (rows, …) values of each batch and its Batch.index."""
    return restore(
        torch.cat([values.cpu() for values, _ in parts]), torch.cat([index.cpu() for _, index in parts])
    )
