"""What `evaluate` measures beside the scores on the dev set, where the config asks for it."""

import itertools
import statistics
import time

import numpy as np
import torch
from transformers import PreTrainedModel

from dsdistill.data import evaluation_batches
from dsdistill.engine.passes import stability as representation
from dsdistill.engine.prepare import Prepared
from dsdistill.evaluation.structure import change
from dsdistill.models.forward import model_inputs

WARM, TIMED = 10, 100  # examples


def stability(scores: dict[str, float], run_dir: str, step: int) -> dict[str, float]:
    """RCS and 1 − debiased CKA between the points of a run up to `step`; nothing where fewer than two were kept.

    A model that never moved has an RCS of 0: without the KL among its other scores it has none.
    """
    kept = representation.kept(run_dir, step)
    if len(kept) < 2 or "kl" not in scores:
        return {}
    found = change(kept)
    return {"rcs": found.rcs, "cka_distance": found.cka_distance}


def latency(model: PreTrainedModel, prepared: Prepared) -> dict[str, float]:
    """Median milliseconds of a forward pass over one example of the dev set, unpadded, after a warm-up.

    Over up to TIMED examples, evenly spaced in the dev set: as long as its texts are, and the same for every model.

    model: in eval mode, where it is to be measured.
    """
    dev = prepared.data.dev
    sample = dev.take(np.linspace(0, len(dev) - 1, min(TIMED, len(dev)), dtype=int).tolist())
    batches = list(evaluation_batches(sample, 1, 1, 0, prepared.tokenizer.pad_token_id))
    seconds = []
    with torch.no_grad():
        for batch in itertools.chain(batches[:WARM], batches):
            inputs = model_inputs(model, batch.to(model.device))
            _wait(model)
            started = time.perf_counter()
            model(**inputs)
            _wait(model)
            seconds.append(time.perf_counter() - started)
    timed = seconds[-len(batches) :]
    return {"latency_ms": round(1000 * statistics.median(timed), 3)}


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
