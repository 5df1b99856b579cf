"""Fit the frozen maps of teacher states that a student's domain fusion and terms need, before training."""

import os

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsdistill import disk
from dsdistill.data import Batch
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.module import fused_layers, make_fusion
from dsdistill.engine.passes import over
from dsdistill.engine.passes.layer_similarity import EXAMPLES
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import MAPS, RunFolder
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.domain_fusion import normed
from dsdistill.models.tracer import Tracer


def fit_maps(
    prepared: Prepared, folder: RunFolder, ranks: Ranks, teacher: LazyTeacher | None
) -> dict[str, Tensor] | None:
    """Fit the maps of the student's fusion and of terms to teacher states over train examples.

    This returns the maps of the fusion (None without a fusion), and sets those of the terms in place. RUN keeps both
    for every resume. Examples are evenly spaced in the whole train set, since its beginning may come from only one of
    several files.
    """
    fusion, layers = None, fused_layers(prepared.objectives)
    if prepared.config.student.domain is not None:
        fusion = make_fusion(prepared.config, prepared.pair, layers)
    # Keys are prefixes of names in the file. Maps of one width and layer are the same in every term.
    maps = {} if fusion is None else {f"{layer}.": [(layer, fusion.maps[str(layer)])] for layer in layers}
    for term in (term for objective in prepared.objectives for term in objective.terms.values()):
        for layer, made in term.teacher_maps.items():
            maps.setdefault(f"terms.{len(made.components)}.{layer}.", []).append((layer, made))
    if not maps:
        return None
    path = folder / MAPS
    if not ranks.gather(os.path.isfile(path))[0]:
        wanted = tuple(sorted({layer for same in maps.values() for layer, _ in same}))
        moments, weights = _moments(prepared, wanted, ranks, teacher.tracer((), wanted)), {}
        for start, ((layer, made), *_) in maps.items():
            made.fit(*moments[layer])
            weights |= {start + name: value.contiguous() for name, value in made.state_dict().items()}
        with ranks.first_alone():
            if ranks.first:
                with disk.replacing(path) as new:
                    save_file(weights, new)
    kept = load_file(path)
    for start, same in maps.items():
        for _, made in same:
            own = {name: value for name, value in kept.items() if name.startswith(start)}
            made.load_state_dict({name.removeprefix(start): value for name, value in own.items()})
    return None if fusion is None else fusion.maps.state_dict()


def _moments(
    prepared: Prepared, layers: tuple[int, ...], ranks: Ranks, teacher: Tracer
) -> dict[int, tuple[float, Tensor, Tensor]]:
    """Return the count, sum and sum of outer products, float64, of each layer's normed states over all ranks."""
    train, width = prepared.data.train, prepared.pair.teacher.width
    sums = {layer: [0.0, torch.zeros(width).double(), torch.zeros(width, width).double()] for layer in layers}
    rows = torch.linspace(0, len(train) - 1, min(EXAMPLES, len(train))).long().tolist()

    def read(batch: Batch) -> None:  # sums on this rank: products are too large to gather for each batch
        with teacher.frozen(batch) as trace:
            for layer, parts in sums.items():
                states = normed(trace.hidden[layer][batch.mask]).double().cpu()
                parts[0] += len(states)
                parts[1] += states.sum(0)
                parts[2] += states.T @ states

    over(prepared, ranks, train.take(rows), read)
    teacher.capture.detach()
    everyone = ranks.gather(sums)
    return {layer: tuple(sum(of[layer][part] for of in everyone) for part in range(3)) for layer in layers}
