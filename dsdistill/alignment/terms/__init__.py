"""List the terms of the loss by the names that they have in a config."""

from dsdistill.alignment.terms.attention import AttentionTerm
from dsdistill.alignment.terms.base import AlignmentTerm, Pair, Shape
from dsdistill.alignment.terms.domain import DomainTerm
from dsdistill.alignment.terms.dynamics import FeatureDynamicsTerm
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
from dsdistill.config.terms import Term, add_term

TERMS: dict[str, type[AlignmentTerm]] = {
    "task": TaskTerm,
    "soft_label": SoftLabelTerm,
    "hidden": HiddenTerm,
    "feature": FeatureTerm,
    "attention": AttentionTerm,
    "pairwise": PairwiseTerm,
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
    """Add a term from outside: configs and Distiller know it by `name` from here on.

    In YAML, `plugins: [module]` names the module that calls this; it is imported before the config is checked.

    Args:
        name: in a config, and in logs.
        settings: a subclass of dsdistill.terms.Term, each field with a type, a default and a description.
        term: a subclass of AlignmentTerm; it is made as term(settings, pair).

    Raises:
        UserError: a name that another class has, or that is no identifier; settings or a term of another kind.
    """
    if not (isinstance(term, type) and issubclass(term, AlignmentTerm)):
        raise UserError(f"register_term: term of {name}", term, "a subclass of dsdistill.AlignmentTerm")
    add_term(name, settings)
    term.name = name
    TERMS[name] = term


__all__ = ["TERMS", "AlignmentTerm", "Pair", "Shape", "register_term"]
