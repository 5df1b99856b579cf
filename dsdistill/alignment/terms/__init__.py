"""List the terms of the loss by the names that they have in a config."""

import inspect

from dsdistill.alignment.terms.attention import AttentionTerm
from dsdistill.alignment.terms.base import AlignmentTerm, Pair, Shape
from dsdistill.alignment.terms.contextual import ContextualTerm
from dsdistill.alignment.terms.domain import DomainTerm
from dsdistill.alignment.terms.dynamics import FeatureDynamicsTerm
from dsdistill.alignment.terms.embedding import EmbeddingTerm
from dsdistill.alignment.terms.feature_map import FeatureMapTerm
from dsdistill.alignment.terms.hidden import FeatureTerm, HiddenTerm
from dsdistill.alignment.terms.pairwise import PairwiseTerm
from dsdistill.alignment.terms.related import (
    ContrastiveTerm,
    KernelAlignmentTerm,
    ProbabilisticTransferTerm,
    RelationalTerm,
    SimilarityTerm,
)
from dsdistill.alignment.terms.smooth import SmoothTerm
from dsdistill.alignment.terms.soft_label import SoftLabelTerm
from dsdistill.alignment.terms.task import TaskTerm
from dsdistill.alignment.terms.trajectory import TrajectoryTerm
from dsdistill.config import UserError
from dsdistill.config.added_terms import add_term
from dsdistill.config.terms import Term

TERMS: dict[str, type[AlignmentTerm]] = {
    "task": TaskTerm,
    "soft_label": SoftLabelTerm,
    "embedding": EmbeddingTerm,
    "hidden": HiddenTerm,
    "feature": FeatureTerm,
    "feature_map": FeatureMapTerm,
    "attention": AttentionTerm,
    "pairwise": PairwiseTerm,
    "ckd": ContextualTerm,
    "contrastive": ContrastiveTerm,
    "sp": SimilarityTerm,
    "rkd": RelationalTerm,
    "cka": KernelAlignmentTerm,
    "pkt": ProbabilisticTransferTerm,
    "trajectory": TrajectoryTerm,
    "fdd": FeatureDynamicsTerm,
    "domain": DomainTerm,
    "smooth": SmoothTerm,
}


def register_term(name: str, settings: type[Term], term: type[AlignmentTerm]) -> None:
    """Add a term from outside: configs and Distiller then know it by `name`.

    In YAML, `plugins: [module]` names the module that calls this; it is imported before the config is checked.

    Args:
        name: in a config, and in logs.
        settings: a subclass of dsdistill.terms.Term. Each field has a type, a default and a description. Its properties
            say what the term needs in a config (`needs_teacher`, `reads_spans`, ...).
        term: a subclass of AlignmentTerm, created as term(settings, pair). Its attributes say what it needs in a batch
            (`needs_teacher`, `needs_spans`, ...). They must agree with the settings' properties.

    Raises:
        UserError: a name that another class has or that is no identifier; settings or a term that is no such subclass;
            settings and a term that state different needs.
    """
    if not (isinstance(term, type) and issubclass(term, AlignmentTerm)):
        raise UserError(f"register_term: term of {name}", term, "a subclass of dsdistill.AlignmentTerm")
    if inspect.isabstract(term):
        missing = ", ".join(sorted(term.__abstractmethods__))
        raise UserError(
            f"register_term: term of {name}", f"{term.__name__} without {missing}", "both defined"
        )
    taken = TERMS.get(name, term)
    if (taken.__module__, taken.__qualname__) != (term.__module__, term.__qualname__):
        raise UserError("register_term: name", f"{name}, which is {taken.__qualname__}", "a name of its own")
    _check_needs(name, settings, term)
    add_term(name, settings)
    if getattr(term, "name", name) != name:  # the same computation under another name
        term = type(
            term.__name__, (term,), {"__module__": term.__module__, "__qualname__": term.__qualname__}
        )
    term.name = name
    TERMS[name] = term


_NEEDS = {  # property of the settings: attribute of the term
    "needs_teacher": "needs_teacher",
    "needs_head": "needs_head",
    "needs_previous": "needs_previous",
    "reads_spans": "needs_spans",
    "reads_labels": "supervised",
}


def _check_needs(name: str, settings: type[Term], term: type[AlignmentTerm]) -> None:
    """Refuse settings whose stated needs differ from the term's."""
    if not (isinstance(settings, type) and issubclass(settings, Term)):
        return  # add_term says so
    try:
        made = settings()
    except UserError:  # a field has no default, so the settings cannot be made yet
        return
    for ours, theirs in _NEEDS.items():
        if getattr(made, ours) != getattr(term, theirs):
            raise UserError(
                f"register_term: {name}",
                f"{settings.__name__}.{ours} {getattr(made, ours)} and {term.__name__}.{theirs} "
                f"{getattr(term, theirs)}",
                "the same of both",
            )


__all__ = ["TERMS", "AlignmentTerm", "Pair", "Shape", "register_term"]
