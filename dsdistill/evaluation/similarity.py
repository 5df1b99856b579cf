"""Score the vectors of texts: against human judgements, in search, and against the teacher's vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.evaluation import metrics

ELEMENTS = 2**24  # most cosines that are in memory together
TOP = 10
OF = "_of_"  # stands before the vector length in a score's name


def scores(
    vectors: Tensor, gold: Tensor | None, *, found: Tensor | None = None, teacher: Tensor | None = None
) -> dict[str, float]:
    """Return the scores of a model's vectors on one set.

    Args:
        vectors: (n, D), normalised, of the texts in the set's order; the two texts of a pair follow each other.
        gold: (n / 2,) human scores of how similar the texts of each pair are; None if there are none.
        found: (n / 2, 2) result of `search` for queries and their documents; None for other texts.
        teacher: (n, D_t) vectors of the same texts.

    Returns:
        With gold: pearson and spearman of the pairs' cosines with it. For a search: the result of `retrieval`. With a
        teacher: teacher_pearson and teacher_spearman of the student's cosines with the teacher's (cosines of pairs if
        there is gold, else of each text and the next), and, if both models have the same width, distance: the mean of
        1 − cosine of their vectors of the same text.
    """
    made: dict[str, float] = {}
    if gold is not None:
        cosines = _cosines(vectors[::2], vectors[1::2])
        made["pearson"], made["spearman"] = metrics.pearson(cosines, gold), metrics.spearman(cosines, gold)
    if found is not None:
        made |= retrieval(found[:, 0])
    if teacher is None:
        return made
    if gold is not None or len(vectors) > 1:
        mine, theirs = (
            _cosines(of[::2], of[1::2]) if gold is not None else _cosines(of[:-1], of[1:])
            for of in (vectors, teacher)
        )
        made["teacher_pearson"] = metrics.pearson(mine, theirs)
        made["teacher_spearman"] = metrics.spearman(mine, theirs)
    if vectors.shape == teacher.shape:
        made["distance"] = (1 - _cosines(vectors, teacher)).mean().item()
    return made


def by_length(
    vectors: Tensor,
    gold: Tensor | None,
    dims: Sequence[int],
    *,
    searched: bool,
    teacher: Tensor | None = None,
) -> dict[str, float]:
    """Return one score of the vectors' first N values, for each N of `dims` below their width.

    vectors, gold and teacher are as in `scores`; searched: the texts are queries and their documents. The scores are
    spearman_of_N with gold, recall_10_of_N for a search, else teacher_spearman_of_N (Kusupati et al. 2022, Matryoshka).
    """
    name = "spearman" if gold is not None else "recall_10" if searched else "teacher_spearman"
    made: dict[str, float] = {}
    for width in sorted(dims, reverse=True):
        if width < vectors.shape[1]:
            first = torch.nn.functional.normalize(vectors[:, :width], dim=-1)
            found = search(first[::2], first[1::2]) if searched else None
            of = scores(first, gold, found=found, teacher=teacher)
            made |= {f"{name}{OF}{width}": of[name]} if name in of else {}
    return made


def search(queries: Tensor, documents: Tensor) -> Tensor:
    """Return (n, 2) int64: the rank, from 1, of query i's document, i, among all n by cosine, and the first document.

    A document that is as near as the right one is ranked before it, so that a model that gives all texts one vector
    finds nothing. The first document is an index: that of the right one if its rank is 1, else of the nearest other.

    queries, documents: (n, D), normalised; blocks of queries are compared with all documents.
    """
    count, found = len(documents), []
    block = max(1, ELEMENTS // count)
    for start in range(0, count, block):
        cosines = queries[start : start + block] @ documents.T
        places = torch.arange(start, start + len(cosines))[:, None]
        ranks = (cosines >= cosines.gather(1, places)).sum(1, keepdim=True)
        nearest = cosines.scatter(1, places, -torch.inf).argmax(1, keepdim=True)
        found.append(torch.cat([ranks, torch.where(ranks > 1, nearest, places)], dim=1))
    return torch.cat(found)


def retrieval(ranks: Tensor) -> dict[str, float]:
    """Return recall_1, recall_10, mrr_10 and ndcg_10 of searches with one right document each.

    Since only one document is right, nDCG is 1 / log₂(1 + rank) (Järvelin & Kekäläinen 2002).

    ranks: (n,) of the right documents, from 1.
    """
    rank = ranks.double()
    near = rank <= TOP
    return {
        "recall_1": (rank <= 1).double().mean().item(),
        "recall_10": near.double().mean().item(),
        "mrr_10": torch.where(near, 1 / rank, 0.0).mean().item(),
        "ndcg_10": torch.where(near, math.log(2) / (1 + rank).log(), 0.0).mean().item(),
    }


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return (n,) float64 cosines of rows."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)
