"""Measure how much of the teacher's representation space the student keeps, on the dev set.

Both models read the whole text, with no token masked. Fits use train examples: ten for each feature if there are
enough.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsdistill.alignment.units import mean_pool, unpacked
from dsdistill.data import Set
from dsdistill.data.batch import PHRASE, Batch
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import StudentModule
from dsdistill.engine.passes import indexed, over
from dsdistill.engine.prepare import Prepared
from dsdistill.evaluation.structure import (
    UNITS,
    Estimate,
    domain_capture,
    representation_compactness,
    semantic_alignment,
    structural_consistency,
)
from dsdistill.models.tracer import Tracer

PER_FEATURE = 10  # train examples for each feature
GROUPS = 64  # dev examples whose tokens and phrases are compared among themselves
PHRASES = 4  # most phrases of a train example


@dataclass
class Vectors:
    """Vectors holds both models' representations of some examples, in order; pairs are (student, teacher)."""

    sequences: tuple[Tensor, Tensor]  # (n, D) mean-pooled last layer
    phrases: tuple[list[Tensor], list[Tensor]]  # (phrases, D) of each example
    terms: list[Tensor]  # (phrases,) bool of each example: whether a phrase is a term of the domain
    tokens: tuple[list[Tensor], list[Tensor]]  # (tokens, D) of the first GROUPS examples


def measure(module: StudentModule, teacher: Tracer, prepared: Prepared, ranks: Ranks) -> dict[str, float]:
    """Return semantic alignment, compactness and structural consistency (0 to 100), with their bootstrap intervals.

    module: in eval mode, with `represents`; teacher: traces its last layer. domain_capture is added if data.domain and
    data.general are given and the dev set has terms of the domain.
    """
    pair = prepared.pair
    train, wanted = indexed(prepared.data.train), PER_FEATURE * max(pair.student.width, pair.teacher.width)
    chosen = np.random.default_rng(0).permutation(len(train))[:wanted]
    held = collect(module, teacher, prepared, prepared.data.dev, ranks)
    fit = collect(module, teacher, prepared, train.take(np.sort(chosen).tolist()), ranks, most=PHRASES)
    metrics = _named("semantic_alignment", semantic_alignment(*held.sequences, *fit.sequences))
    compact = representation_compactness(*held.sequences, *fit.sequences)
    metrics |= _named("representation_compactness", compact.score)
    metrics |= {"erank": compact.effective_rank, "participation_ratio": compact.participation_ratio}
    metrics |= {"C": compact.compactness, "R": compact.retention}
    levels = {"token": held.tokens, "phrase": tuple(of[:GROUPS] for of in held.phrases)}
    levels = {name: groups for name, groups in levels.items() if any(len(group) > 2 for group in groups[0])}
    levels["sequence"] = tuple([of[:UNITS]] for of in held.sequences)
    consistency = structural_consistency(levels)
    metrics |= _named("structural_consistency", consistency.score)
    metrics |= {f"rho_{name}": value for name, value in consistency.levels.items()}
    domain = torch.cat(held.terms)
    if domain.any():
        phrases = [torch.cat(of) for vectors in (held, fit) for of in vectors.phrases]
        metrics |= _named("domain_capture", domain_capture(*phrases[:2], domain, *phrases[2:]))
    return metrics


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def collect(
    module: StudentModule,
    teacher: Tracer,
    prepared: Prepared,
    examples: Set,
    ranks: Ranks,
    most: int | None = None,
) -> Vectors:
    """Return the vectors of both models, the same on every rank; `most` limits the phrases of an example."""
    layer = prepared.pair.teacher.depth

    def read(batch: Batch) -> list:
        with teacher.frozen(batch) as theirs:
            states = module(batch, ask="states"), theirs.hidden[layer]
            own, other = (unpacked(of, batch) for of in states)
            return _examples((own, other), batch.unpacked, prepared, most)

    parts = over(prepared, ranks, examples.unmasked(), read)
    everyone = sorted((item for part in parts for item in part), key=lambda item: item[0])
    _, sequences, phrases, terms, tokens = zip(*everyone, strict=True)
    return Vectors(
        tuple(torch.stack(of) for of in zip(*sequences, strict=True)),
        tuple(list(of) for of in zip(*phrases, strict=True)),
        list(terms),
        tuple(list(of) for of in zip(*tokens[:GROUPS], strict=True)),
    )


def _examples(states: tuple[Tensor, Tensor], batch: Batch, prepared: Prepared, most: int | None) -> list:
    """Return each example's index, sequence vectors, phrase vectors, which phrases are terms, and token vectors."""
    pooled = [mean_pool(of, batch.mask).cpu() for of in states]
    read = []
    for row, place in enumerate(batch.index.tolist()):
        if place < 0:
            continue
        valid = batch.mask[row]
        tokens = [of[row, valid].float().cpu() for of in states]
        spans = batch.spans[(batch.spans[:, 0] == row) & (batch.spans[:, 3] == PHRASE), 1:3].tolist()[:most]
        phrases = [
            torch.stack([of[first:past].mean(0) for first, past in spans]) if spans else of[:0]
            for of in tokens
        ]
        terms = torch.zeros(len(spans), dtype=torch.bool)
        if prepared.contrast is not None:
            ids = batch.input_ids[row].cpu().numpy()
            terms = torch.tensor([prepared.contrast.is_term(ids[a:b]) for a, b in spans], dtype=torch.bool)
        kept = tokens if place < GROUPS else [None, None]
        read.append((place, [of[row] for of in pooled], phrases, terms, kept))
    return read
