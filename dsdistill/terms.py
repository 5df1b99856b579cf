"""Export the settings of each loss term as typed objects, such as terms.Hidden(layers="last") for a Distiller.

They are the settings of a config, checked in the same way and with the same messages.
"""

from dsdistill.config.terms import (
    Attention,
    ContextualKD,
    Contrastive,
    DomainMapping,
    Feature,
    FeatureDynamics,
    FeatureMap,
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
    "ContextualKD",
    "Contrastive",
    "DomainMapping",
    "Feature",
    "FeatureDynamics",
    "FeatureMap",
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
