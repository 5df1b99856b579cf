"""dsdistill: distil large transformer teachers into small students, level by level."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdistill import terms as terms
    from dsdistill.alignment.terms import AlignmentTerm as AlignmentTerm
    from dsdistill.alignment.terms import register_term as register_term
    from dsdistill.config import RunError as RunError
    from dsdistill.config import UserError as UserError
    from dsdistill.config import load as load_config  # noqa: F401
    from dsdistill.distiller import Distiller as Distiller
    from dsdistill.engine.evaluate import evaluate_run as evaluate  # noqa: F401
    from dsdistill.engine.export import export as export
    from dsdistill.engine.run import train as train
    from dsdistill.engine.teacher import shard_teacher as shard_teacher

__version__ = "0.1.0"

# Public names, and where each is defined. A name is imported only when it is used, so that the package imports fast.
_PUBLIC = {
    "AlignmentTerm": "dsdistill.alignment.terms:AlignmentTerm",
    "Distiller": "dsdistill.distiller:Distiller",
    "RunError": "dsdistill.config:RunError",
    "UserError": "dsdistill.config:UserError",
    "evaluate": "dsdistill.engine.evaluate:evaluate_run",
    "export": "dsdistill.engine.export:export",
    "load_config": "dsdistill.config:load",
    "register_term": "dsdistill.alignment.terms:register_term",
    "shard_teacher": "dsdistill.engine.teacher:shard_teacher",
    "terms": "dsdistill.terms",
    "train": "dsdistill.engine.run:train",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
