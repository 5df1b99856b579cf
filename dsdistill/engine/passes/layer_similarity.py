"""Measure before training which layers of the two models are alike.

This resolves `layers: cka_offline`, once; RUN/layers.json keeps the pairs for every resume.
"""

import json
import logging
import os

import numpy as np
import torch
from torch import Tensor

from dsdistill import disk
from dsdistill.alignment.units import pooled
from dsdistill.config import Config
from dsdistill.data import Batch
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.passes import in_order, indexed, over
from dsdistill.engine.prepare import Prepared, make_objectives
from dsdistill.engine.run_folder import LAYERS, RunFolder
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.evaluation.structure import debiased_cka
from dsdistill.models.build import build_model
from dsdistill.models.tracer import Tracer, callee

log = logging.getLogger("dsdistill")

EXAMPLES = 256


def resolve_layers(
    prepared: Prepared, init: str | None, folder: RunFolder, ranks: Ranks, teacher: LazyTeacher | None
) -> None:
    """Replace `cka_offline` by layer pairs in the objectives of `prepared`.

    init: path of the student's first weights (None: random).
    """
    if not _wanted(prepared.config):
        return
    path = folder / LAYERS
    if not ranks.gather(os.path.isfile(path))[0]:
        pairs = most_similar(_similarities(prepared, init, ranks, teacher))
        with ranks.first_alone():
            if ranks.first:
                with disk.writing(path) as file:
                    json.dump(pairs, file)
    with open(path, encoding="utf-8") as file:
        pairs = tuple((student, teacher) for student, teacher in json.load(file))
    log.info("layers by CKA: %s", ", ".join(f"{student} from {teacher}" for student, teacher in pairs))
    torch.manual_seed(prepared.config.run.seed)  # for the projectors' first weights
    prepared.objectives = make_objectives(_with_pairs(prepared.config, pairs), prepared.pair)


def most_similar(similarity: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the (student, teacher) layer pairs, counted from 1, with the greatest total similarity; both increase.

    similarity: (L_S, L_T). Without this order each student layer would take its argmax, and several could take the
    same teacher layer.
    """
    students, teachers = similarity.shape
    best = np.full((students + 1, teachers + 1), -np.inf)
    best[0] = 0
    for s in range(1, students + 1):
        for t in range(s, teachers + 1):
            best[s, t] = max(best[s, t - 1], best[s - 1, t - 1] + similarity[s - 1, t - 1])
    pairs, t = [], teachers
    for s in range(students, 0, -1):
        while t > s and best[s, t] == best[s, t - 1]:
            t -= 1
        pairs.append((s, t))
        t -= 1
    return tuple(reversed(pairs))


def _wanted(config: Config) -> bool:
    return any(
        getattr(term, "layers", None) == "cka_offline"
        for stage in config.run_stages
        for term in stage.terms.named().values()
    )


def _with_pairs(config: Config, pairs: tuple[tuple[int, int], ...]) -> Config:
    def terms(section):
        changes = {
            name: term.model_copy(update={"layers": pairs})
            for name, term in section.named().items()
            if getattr(term, "layers", None) == "cka_offline"
        }
        return section.model_copy(update=changes)

    stages = tuple(stage.model_copy(update={"terms": terms(stage.terms)}) for stage in config.stages)
    return config.model_copy(update={"stages": stages, "terms": terms(config.terms)})


def _similarities(prepared: Prepared, init: str | None, ranks: Ranks, guide: LazyTeacher) -> np.ndarray:
    """Return (L_S, L_T) debiased CKA of mean-pooled states over the first train examples."""
    config = prepared.config
    teacher = guide.tracer((), range(1, prepared.pair.teacher.depth + 1))
    torch.manual_seed(config.run.seed)
    model = build_model(
        prepared.student,
        init,
        config.task,
        "student",
        needs_head=False,
        attention=config.student.attn_implementation,
    )
    student = Tracer(
        callee(model.to(ranks.device).eval(), config.task, "student"),
        range(1, prepared.pair.student.depth + 1),
    )
    train = indexed(prepared.data.train)
    examples = train.take(list(range(min(EXAMPLES, len(train)))))

    def read(batch: Batch) -> tuple[list[list[Tensor]], Tensor]:
        with teacher.frozen(batch) as theirs, student.frozen(batch) as ours:
            vectors = [
                [pooled(states, batch).cpu() for _, states in sorted(trace.hidden.items())]
                for trace in (ours, theirs)
            ]
        return vectors, batch.index.cpu()

    parts = over(prepared, ranks, examples, read)
    teacher.capture.detach()
    mine, other = (
        [
            in_order([(vectors[model][layer], index) for vectors, index in parts])
            for layer in range(len(parts[0][0][model]))
        ]
        for model in (0, 1)
    )
    return np.array([[debiased_cka(s, t) for t in other] for s in mine])
