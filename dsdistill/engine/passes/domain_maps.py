"""Fit the frozen maps of teacher states that a student's domain fusion needs, before training."""

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
    """Return the principal components of teacher states over train examples; RUN keeps them for every resume.

    Examples are evenly spaced in the whole train set, whose beginning may come from one of several files.
    """
    if prepared.config.student.domain is None:
        return None
    path = folder / MAPS
    if not ranks.gather(os.path.isfile(path))[0]:
        layers = fused_layers(prepared.objectives)
        fusion = make_fusion(prepared.config, prepared.pair, layers)
        for layer, (count, total, products) in _moments(
            prepared, layers, ranks, teacher.tracer((), layers)
        ).items():
            fusion.maps[str(layer)].fit(count, total, products)
        with ranks.first_alone():
            if ranks.first:
                weights = {name: value.contiguous() for name, value in fusion.maps.state_dict().items()}
                with disk.replacing(path) as made:
                    save_file(weights, made)
    return load_file(path)


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
