"""The summands of the loss, by the name they have in a config."""

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

__all__ = ["TERMS", "AlignmentTerm", "Pair", "Shape"]
