"""Add a term of your own: it compares the norms of the states of student and teacher, layer by layer.

With a config, as a plugin (the module must be on Python's path, or in the current directory):

    export PYTHONPATH=launch/examples
    dsdistill train configs/quickstart.yaml 'plugins=[new_term]' terms.length.weight=0.1

In a loop of your own, import this module and give Distiller(..., terms={"length": {"weight": 0.1}}).
"""

from typing import Literal

import torch
from pydantic import Field

from dsdistill import AlignmentTerm, register_term
from dsdistill.alignment.layer_map import layer_map
from dsdistill.terms import Term


class Length(Term):
    """Length holds the settings of `terms.length` in a config, besides `weight`."""

    layers: Literal["uniform", "last"] = Field(default="uniform", description="which layers are compared")


class LengthTerm(AlignmentTerm):
    """Compute the mean over valid tokens of (log ‖h_S‖ − log ‖h_T‖)², one part for each mapped layer."""

    def __init__(self, config, pair):
        super().__init__(config, pair)
        self.layers = layer_map(config.layers, pair.student.depth, pair.teacher.depth, "terms.length.layers")
        self.parts, self.factor = len(self.layers), 1 / len(self.layers)
        self.weighting.values = [1.0] * self.parts
        # The traces must hold these layers.
        self.student_hidden = frozenset(student for student, _ in self.layers)
        self.teacher_hidden = frozenset(teacher for _, teacher in self.layers)

    def counts(self, batch, geometry):
        """Divide by valid tokens: counts are added up over all micro-batches and ranks of a step."""
        return batch.mask.sum().double().expand(self.parts)

    def sums(self, student, teacher, batch):
        """Return the sums that the counts divide, with gradients to the student."""
        sums = []
        for mine, other in self.layers:
            lengths = (trace.float().norm(dim=-1) for trace in (student.hidden[mine], teacher.hidden[other]))
            short, long = (length.clamp_min(1e-6).log() for length in lengths)
            sums.append((short - long).masked_fill(~batch.mask, 0).square().sum())
        return torch.stack(sums)


register_term("length", Length, LengthTerm)
