"""Provide alignment operators. Each takes tensors, returns a scalar loss and holds no whole N×N or tokens×V tensor.

Each folder holds one operator. `op.py` has the public function. `reference.py` has the definition in plain PyTorch.
`chunked.py` computes the same in plain PyTorch, in blocks of rows, and finds the gradients in the forward pass.
"""

from dsdistill.ops.attention.op import attention_alignment, relation_heads
from dsdistill.ops.backends import BackendError, available_backends, backends_taken, load_extension
from dsdistill.ops.hidden.op import hidden_alignment
from dsdistill.ops.pairwise.op import pairwise_alignment
from dsdistill.ops.soft_label.joint import VocabularyLosses, Weight, vocabulary_losses
from dsdistill.ops.soft_label.op import (
    HEAD_BACKENDS,
    logit_alignment,
    soft_label_alignment,
    token_cross_entropy,
)

__all__ = [
    "HEAD_BACKENDS",
    "BackendError",
    "VocabularyLosses",
    "Weight",
    "attention_alignment",
    "available_backends",
    "backends_taken",
    "hidden_alignment",
    "logit_alignment",
    "pairwise_alignment",
    "relation_heads",
    "soft_label_alignment",
    "token_cross_entropy",
    "vocabulary_losses",
]

load_extension()
