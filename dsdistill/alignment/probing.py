"""Check whether two models leave the traces that the terms between them need."""

from collections.abc import Sequence

from transformers import PretrainedConfig

from dsdistill.alignment.objective import Objective
from dsdistill.models.probe import probe, rotates_queries
from dsdistill.models.trace import Geometry


def check_pair(
    task: str,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    objectives: Sequence[Objective],
    hidden: bool = False,
) -> dict[int, Geometry]:
    """Return which keys each attention layer of the student sees; nothing where no term asks for attention.

    objectives: of all stages. hidden: states are read in any case.

    Raises UserError for a model that cannot do the task or does not show what the terms read.
    """
    attention = any(objective.layers("student_attention") for objective in objectives)
    hidden = hidden or any(objective.layers("student_hidden") for objective in objectives)
    lens = any(objective.needs("lens") for objective in objectives)
    models = {
        place: model for place, model in (("student", student), ("teacher", teacher)) if model is not None
    }
    seen = [
        probe(model, task, place, attention=attention, hidden=hidden, lens=lens)
        for place, model in models.items()
    ]

    def rotating() -> dict[str, str]:
        return {place: model.model_type for place, model in models.items() if rotates_queries(model, task)}

    for objective in objectives:
        for term in objective.terms.values():
            term.check_models(seen, rotating)
    return seen[0]
