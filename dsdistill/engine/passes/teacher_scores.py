"""Make the sampler that a config names, which may need one pass of the teacher over the train set."""

import math
import os

import numpy as np
import torch
from torch import Tensor

from dsdistill import disk
from dsdistill.alignment.terms.task import predicting, targets
from dsdistill.alignment.units import pooled, unpacked
from dsdistill.data import NO_LABEL
from dsdistill.data.batch import Batch
from dsdistill.data.samplers import HardNegative, Sampler, Weighted, nearest_others
from dsdistill.distributed.ranks import Ranks
from dsdistill.engine.passes import in_order, over
from dsdistill.engine.prepare import Prepared
from dsdistill.engine.run_folder import SAMPLING, RunFolder
from dsdistill.engine.teacher import LazyTeacher
from dsdistill.models.logits import softcapped
from dsdistill.models.trace import Trace

ROWS = 256  # most tokens whose logits are in memory at once


def make_sampler(
    prepared: Prepared, folder: RunFolder, ranks: Ranks, teacher: LazyTeacher | None
) -> Sampler | None:
    """Return the sampler, None if every example comes once; RUN keeps the teacher's values for every resume."""
    data, train = prepared.config.data, prepared.data.train
    if data.sampler == "domain_aware":
        return Weighted(prepared.contrast.scores(train), data.sampler_temperature or 1.0)
    if data.sampler not in ("entropy", "hard_negative"):
        return None
    path = folder / SAMPLING
    if not ranks.gather(os.path.isfile(path))[0]:
        values = _values(prepared, ranks, teacher)
        if data.sampler == "hard_negative":
            values = nearest_others(values, train)
        with ranks.first_alone():
            if ranks.first:
                with disk.writing(path, binary=True) as file:
                    np.save(file, np.asarray(values))
    values = np.load(path)
    if data.sampler == "entropy":
        return Weighted(values, data.sampler_temperature or 0.1)
    return HardNegative(values)


def _values(prepared: Prepared, ranks: Ranks, guide: LazyTeacher) -> Tensor:
    """Return (n,) entropies or (n, D) mean-pooled last states of the teacher over the train set, in its order."""
    config, depth = prepared.config, prepared.pair.teacher.depth
    teacher = guide.tracer(prepared.objectives, [depth])

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        with teacher.frozen(batch) as trace:
            if config.data.sampler == "entropy":
                values = entropy(trace, batch, config.task)
            else:
                values = pooled(trace.hidden[depth], batch)
        return values.cpu(), batch.index.cpu()

    values = in_order(over(prepared, ranks, prepared.data.train, read))
    teacher.capture.detach()
    return values


def entropy(trace: Trace, batch: Batch, task: str) -> Tensor:
    """Return (B,), packed (S,): the mean entropy of an example's predictions, divided by the largest possible."""
    if trace.logits is not None:
        return _relative(trace.logits.float())
    rows = batch.unpacked
    places = (targets(rows, task) != NO_LABEL).nonzero()
    states = predicting(unpacked(trace.output, batch), task)[places[:, 0], places[:, 1]]
    total = torch.zeros(len(rows.mask), device=states.device)
    for some, owner in zip(states.split(ROWS), places[:, 0].split(ROWS), strict=True):
        logits = torch.nn.functional.linear(some, trace.head, trace.head_bias).float()
        total.index_add_(0, owner, _relative(softcapped(logits, trace.softcap)))
    return total / torch.bincount(places[:, 0], minlength=len(total)).clamp(min=1)


def _relative(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1) / math.log(logits.shape[-1])
