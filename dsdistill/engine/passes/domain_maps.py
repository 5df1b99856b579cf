"""The student's domain fusion: its frozen maps of teacher states, fitted before training, and its weights."""

import os

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsdistill import disk
from dsdistill.data import evaluation_batches
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.passes.layer_similarity import EXAMPLES
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import MAPS, RunFolder
from dsdistill.engine.teacher import Teacher
from dsdistill.models.domain_fusion import DomainFusion, normed


def make_fusion(prepared: Prepared, maps: dict[str, Tensor] | None = None) -> DomainFusion | None:
    """As training begins with it; maps: of fit_maps. None where the config asks for none."""
    domain = prepared.config.student.domain
    if domain is None:
        return None
    fusion = DomainFusion(
        domain.width, prepared.pair.student.width, prepared.pair.teacher.width, _layers(prepared)
    )
    if maps is not None:
        fusion.maps.load_state_dict(maps)
    return fusion


def fit_maps(prepared: Prepared, folder: RunFolder, ranks: Ranks) -> dict[str, Tensor] | None:
    """The principal components of teacher states over train examples; RUN keeps them for every resume.

    Examples come evenly from the whole train set, which may begin with one of several files.
    """
    if prepared.config.student.domain is None:
        return None
    path = folder / MAPS
    if not ranks.gather(os.path.isfile(path))[0]:
        fusion = make_fusion(prepared)
        for layer, (count, total, products) in _moments(prepared, ranks).items():
            fusion.maps[str(layer)].fit(count, total, products)
        with ranks.first_alone():
            if ranks.first:
                weights = {name: value.contiguous() for name, value in fusion.maps.state_dict().items()}
                with disk.replacing(path) as made:
                    save_file(weights, made)
    return load_file(path)


def _layers(prepared: Prepared) -> tuple[int, ...]:
    terms = (objective.terms["domain"] for objective in prepared.objectives if "domain" in objective.terms)
    return tuple(sorted({layer for term in terms for layer in term.mapped}))


def _moments(prepared: Prepared, ranks: Ranks) -> dict[int, tuple[float, Tensor, Tensor]]:
    """Of each layer's normed states over all ranks: their count, sum and sum of outer products, float64."""
    config, layers, train = prepared.config, _layers(prepared), prepared.data.train
    teacher = Teacher(config, prepared.teacher, (), ranks, hidden=layers)
    width = prepared.pair.teacher.width
    sums = {layer: [0.0, torch.zeros(width).double(), torch.zeros(width, width).double()] for layer in layers}
    rows = torch.linspace(0, len(train) - 1, min(EXAMPLES, len(train))).long().tolist()
    for batch in evaluation_batches(
        train.take(rows),
        config.train.micro_batch_size,
        ranks.world_size,
        ranks.rank,
        prepared.tokenizer.pad_token_id,
    ):
        batch = batch.to(ranks.device)
        with teacher.trace(batch) as found:
            for layer, parts in sums.items():
                states = normed(found.hidden[layer][batch.mask]).double().cpu()
                parts[0] += len(states)
                parts[1] += states.sum(0)
                parts[2] += states.T @ states
    everyone = ranks.gather(sums)
    return {layer: tuple(sum(of[layer][part] for of in everyone) for part in range(3)) for layer in layers}
