"""Predict the hidden tokens of an example from one vector, its aggregate Y (domain mapping)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LightDecoder(nn.Module):
    """Compute a state for each place n of an example, norm(GELU(A Y + B p_n)), which the student's own head reads.

    p_n is the fixed encoding of place n by sines and cosines (Vaswani et al. 2017, section 3.5). A state sees the
    example through Y alone. The published method names such a decoder without a formula; this is the project's reading.
    """

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Linear(width, width)
        self.place = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor, tokens: int) -> Tensor:
        """Return states (B, N, D) for N = `tokens` places of examples with aggregates (B, D)."""
        places = encoded_places(tokens, vectors.shape[1], vectors.device).to(vectors.dtype)
        return self.norm(F.gelu(self.vector(vectors)[:, None] + self.place(places)))


def encoded_places(tokens: int, width: int, device: torch.device) -> Tensor:
    """Return the encodings of places 0 to N − 1, (N, D) float32: sines of half the features, cosines of the rest."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    angles = torch.arange(tokens, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
