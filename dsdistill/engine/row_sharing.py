"""Decide whether the documents of a run share rows (packing)."""

import logging
from collections.abc import Mapping

from transformers import PretrainedConfig

from dsdistill.config import Config, UserError
from dsdistill.models.isolation import leak

log = logging.getLogger("dsdistill")


def packs(config: Config, models: Mapping[str, PretrainedConfig | None]) -> bool:
    """Return whether train rows are packed: if data.packing allows it and every model keeps documents apart.

    models: architectures by place, student and teacher.

    Raises:
        UserError: data.packing is true, and a model's documents would see each other.
    """
    wanted = config.data.packing
    if config.task != "causal_lm" or wanted is False or config.data.sampler != "uniform":
        return False
    sections = {"student": config.student, "teacher": config.teacher}
    for place, model in models.items():
        section = sections[place]
        if model is None or section is None:
            continue
        reason = leak(model, place, section.attn_implementation)
        if reason is None:
            continue
        told = f"a {place} of model type {model.model_type}, {reason}"
        if wanted is True:
            raise UserError("data.packing", f"true, with {told}", "auto, or false")
        log.info("data.packing: each document has a row, because of %s", told)
        return False
    return True
