"""The settings of each loss term, as typed objects: Distiller(..., terms={"hidden": terms.Hidden(layers="last")}).

They are those of a config, checked in the same way and with the same messages.
"""

from dsdistill.config.terms import (
    Attention,
    Contrastive,
    DomainMapping,
    Feature,
    FeatureDynamics,
    Hidden,
    KernelAlignment,
    Layered,
    Pairwise,
    ProbabilisticTransfer,
    RelationalKD,
    SimilarityPreserving,
    Smooth,
    SoftLabel,
    Task,
    Term,
    Terms,
    Trajectory,
)

__all__ = [
    "Attention",
    "Contrastive",
    "DomainMapping",
    "Feature",
    "FeatureDynamics",
    "Hidden",
    "KernelAlignment",
    "Layered",
    "Pairwise",
    "ProbabilisticTransfer",
    "RelationalKD",
    "SimilarityPreserving",
    "Smooth",
    "SoftLabel",
    "Task",
    "Term",
    "Terms",
    "Trajectory",
]
