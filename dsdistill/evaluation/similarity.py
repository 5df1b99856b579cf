"""Score the vectors of texts: against people's judgement, in search, and against the teacher's vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsdistill.evaluation import metrics

ELEMENTS = 2**24  # cosines that are whole at once
TOP = 10
OF = "_of_"  # before the length that a score is of


def scores(
    vectors: Tensor, gold: Tensor | None, *, found: Tensor | None = None, teacher: Tensor | None = None
) -> dict[str, float]:
    """Return the scores of a model's vectors on one set.

    Args:
        vectors: (n, D) of the texts in the set's order, normalised; of pairs two, one after the other.
        gold: (n / 2,) how alike the texts of each pair are to people; None where nobody said.
        found: (n / 2, 2) what `search` gives of queries and their documents; None of other texts.
        teacher: (n, D_t) vectors of the same texts.

    Returns:
        with gold pearson and spearman of the cosines of pairs with it; of a search what `retrieval` gives; with a
        teacher teacher_pearson and teacher_spearman of the cosines with the teacher's (of pairs with gold their two
        texts', else those of each text and the next), and distance, the mean of 1 − cosine of the two models' vectors
        of a text, where they are equally wide.
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
    """Return one score of so many first values of the vectors, for each of `dims` that is below their width.

    vectors, gold and teacher are as of `scores`; searched: the texts are queries and their documents. The scores are
    spearman_of_N with gold, recall_10_of_N of a search, else teacher_spearman_of_N (Kusupati et al. 2022, Matryoshka).
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
    """Return (n, 2) int64: the rank, from 1, of query i's document, i, among all n by the cosine, and what comes first.

    A document that is as near as the right one counts as before it: a model that gives all texts one vector finds
    nothing. What comes first is the place of the right document at rank 1, else that of the nearest other.

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

    One document alone is right, so that nDCG is 1 / log₂(1 + rank) (Järvelin & Kekäläinen 2002).

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
