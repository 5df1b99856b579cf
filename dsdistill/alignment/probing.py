"""Check whether two models give the traces that the terms between them need."""

import re
from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.config import UserError
from dsdistill.models.probe import probe
from dsdistill.models.settings import text_config
from dsdistill.models.trace import Geometry


def check_pair(
    task: str,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    objectives: Sequence[Objective],
    hidden: bool = False,
    implementations: Mapping[str, str] | None = None,
) -> dict[int, Geometry]:
    """Return which keys each attention layer of the student sees; an empty dict if no term reads attention.

    objectives: those of all stages. hidden: whether hidden states are read even if no term reads them.
    implementations: the attention implementations of `student` and `teacher`, as attn_implementation in a config;
    default: auto.

    Raises UserError for a model that cannot do the task, or whose traces lack what the terms read.
    """
    attention = any(objective.layers("student_attention") for objective in objectives)
    hidden = hidden or any(objective.layers("student_hidden") for objective in objectives)
    lens, final = (any(objective.needs(what) for objective in objectives) for what in ("lens", "final"))
    if attention or hidden:
        _check_all_run(student)
    models = {
        place: model for place, model in (("student", student), ("teacher", teacher)) if model is not None
    }
    seen = {
        place: probe(
            model,
            task,
            place,
            attention=attention,
            hidden=hidden,
            lens=lens,
            final=final,
            implementation=(implementations or {}).get(place, "auto"),
        )
        for place, model in models.items()
    }
    hidden_rotation = {
        place: models[place].model_type for place, found in seen.items() if found.rotation == "hidden"
    }
    for objective in objectives:
        for term in objective.terms.values():
            term.check_models([found.geometry for found in seen.values()], hidden_rotation)
    return seen["student"].geometry


def _check_all_run(student: PretrainedConfig) -> None:
    """Refuse a student that skips layers at random while it trains: terms could not read those layers."""
    for name, value in vars(text_config(student)).items():
        if re.search("layer_?drop", name) and isinstance(value, float) and value > 0:
            expected = "0: terms read layers, which would be left out at random"
            raise UserError(f"student.config.{name}", value, expected)
