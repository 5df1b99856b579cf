"""Define the divergences between two categorical distributions, once for every soft-label loss.

p = softmax(z_T / τ) of the teacher, q = softmax(z_S / τ) of the student; sums run over the last axis; no τ² factor.
  forward_kl  KL(p ‖ q)                                     Hinton et al. 2015
  reverse_kl  KL(q ‖ p)                                     MiniLLM, Gu et al. 2024
  jsd         β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q      GKD, Agarwal et al. 2024, Eq. 1
  skew_kl     KL(p ‖ αp + (1 − α)q)                         DistiLLM, Ko et al. 2024, Eq. 3
  tvd         ½ Σ |p − q|                                   f-DISTILL, Wen et al. 2023
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share · p + (1 − share) · q), share in [0, 1]."""
    if share in (0.0, 1.0):
        return log_p if share == 1.0 else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def divergence_rows(
    log_p: Tensor, log_q: Tensor, p: Tensor, divergence: str, beta: float, alpha: float
) -> Tensor:
    """Return the divergence of each row, (...), in nats (tvd: a share).

    log_p, log_q: (..., V) log probabilities of teacher and student; p = exp(log_p).
    """
    if divergence == "forward_kl":
        terms = p * (log_p - log_q)
    elif divergence == "reverse_kl":
        terms = log_q.exp() * (log_q - log_p)
    elif divergence == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        terms = beta * p * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    elif divergence == "skew_kl":
        terms = p * (log_p - log_mixture(log_p, log_q, alpha))
    else:
        terms = 0.5 * (p - log_q.exp()).abs()
    return terms.sum(-1)


def logit_gradient(
    log_p: Tensor, log_q: Tensor, p: Tensor, divergence: str, beta: float, alpha: float
) -> Tensor:
    """Return the gradient of `divergence_rows` at z_S / τ, (..., V): G − q Σ G with G = ∂D/∂ log q.

    It is not differentiable itself.
    In jsd the derivative through m vanishes: −βp(1 − β)/m + (1 − β)(1 − q(1 − β)/m) = 0.
    """
    q = log_q.exp()
    if divergence == "forward_kl":
        return q.sub_(p)
    if divergence == "reverse_kl":
        inner = q * (log_q - log_p)
    elif divergence == "jsd":
        inner = (1 - beta) * q * (log_q - log_mixture(log_p, log_q, beta))
    elif divergence == "skew_kl":
        # p q / m as exp of a difference of logarithms, finite however small m is.
        inner = (alpha - 1) * (log_p + log_q - log_mixture(log_p, log_q, alpha)).exp()
    else:
        inner = 0.5 * q * (q - p).sign()
    return inner - q * inner.sum(-1, keepdim=True)
