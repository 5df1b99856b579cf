"""Define the divergences between two categorical distributions, once for every soft-label loss.

p = softmax(x_T) of the teacher, q = softmax(x_S) of the student, where x = z / τ are logits divided by the temperature;
sums run over the last axis; no τ² factor.
  forward_kl       KL(p ‖ q)                                     Hinton et al. 2015
  reverse_kl       KL(q ‖ p)                                     MiniLLM, Gu et al. 2024
  jsd              β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q      GKD, Agarwal et al. 2024, Eq. 1
  skew_kl          KL(p ‖ αp + (1 − α)q)                         DistiLLM, Ko et al. 2024, Eq. 3
  skew_reverse_kl  KL(q ‖ αq + (1 − α)p)                         DistiLLM
  akl              (g_h KL(p ‖ q) + g_t KL(q ‖ p)) / (g_h + g_t)      Wu et al. 2024, adaptive KL
  tvd              ½ Σ |p − q|                                   f-DISTILL, Wen et al. 2023
  logit_mse        Σ (x_S − x_T)² / V                            Kim et al. 2021, a mean over the V entries

In akl, g_h and g_t are Σ |p − q| over the head and over the tail of the vocabulary. The gradient treats them as
constants. The head is the entry with the largest p, and the next entries, by falling p, while their p add up to at most
μ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# FUSED: the divergences of the Triton kernel, which identifies each by its index here. The kernel lacks the others.
FUSED = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd")
DIVERGENCES = (*FUSED, "skew_reverse_kl", "akl", "logit_mse")


class Formula(NamedTuple):
    """Hold the name of a divergence and the numbers in its definition."""

    divergence: str
    beta: float
    alpha: float
    mu: float


def described(x: Tensor, formula: Formula) -> Tensor:
    """Return what the divergence reads: the log softmax of x, or x for logit_mse. x: (..., V) logits divided by τ."""
    return x if formula.divergence == "logit_mse" else x.log_softmax(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return log(share · p + (1 − share) · q), share in [0, 1]."""
    if share in (0.0, 1.0):
        return log_p if share == 1.0 else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def adaptive_shares(p: Tensor, q: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Return akl's factors of KL(p ‖ q) and KL(q ‖ p), (..., 1) each, without gradient; 0 if p and q are equal."""
    p, q = p.detach(), q.detach()
    falling, order = p.sort(stable=True, dim=-1, descending=True)
    head = falling.cumsum(-1) <= mu
    head[..., 0] = True
    gaps = (falling - q.gather(-1, order)).abs_()
    whole = gaps.sum(-1, keepdim=True)
    share = gaps.masked_fill_(~head, 0).sum(-1, keepdim=True) / torch.where(whole > 0, whole, 1)
    return share, torch.where(whole > 0, 1 - share, 0)


def divergence_rows(log_p: Tensor, log_q: Tensor, p: Tensor, formula: Formula) -> Tensor:
    """Return the divergence of each row, (...), in nats (tvd: a share; logit_mse: a squared logit).

    log_p, log_q: (..., V), what `described` returns for teacher and student. p = exp(log_p), not read by logit_mse.
    """
    divergence, beta, alpha, mu = formula
    if divergence == "forward_kl":
        terms = p * (log_p - log_q)
    elif divergence == "reverse_kl":
        terms = log_q.exp() * (log_q - log_p)
    elif divergence == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        terms = beta * p * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    elif divergence == "skew_kl":
        terms = p * (log_p - log_mixture(log_p, log_q, alpha))
    elif divergence == "skew_reverse_kl":
        terms = log_q.exp() * (log_q - log_mixture(log_q, log_p, alpha))
    elif divergence == "akl":
        q = log_q.exp()
        forward, reverse = adaptive_shares(p, q, mu)
        terms = (forward * p - reverse * q) * (log_p - log_q)
    elif divergence == "logit_mse":
        return (log_q - log_p).square().mean(-1)
    else:
        terms = 0.5 * (p - log_q.exp()).abs()
    return terms.sum(-1)


def logit_gradient(log_p: Tensor, log_q: Tensor, p: Tensor, formula: Formula) -> Tensor:
    """Return the gradient of `divergence_rows` at z_S / τ, (..., V): G − q Σ G with G = ∂D/∂ log q.

    The result cannot be differentiated again.
    In jsd the derivative through m vanishes: −βp(1 − β)/m + (1 − β)(1 − q(1 − β)/m) = 0.
    """
    divergence, beta, alpha, mu = formula
    if divergence == "logit_mse":
        return (log_q - log_p).mul_(2 / log_q.shape[-1])
    q = log_q.exp()
    if divergence == "forward_kl":
        return q.sub_(p)
    if divergence == "reverse_kl":
        inner = q * (log_q - log_p)
    elif divergence == "jsd":
        inner = (1 - beta) * q * (log_q - log_mixture(log_p, log_q, beta))
    elif divergence == "skew_kl":
        # p q / m is the exp of a difference of logarithms, so that it is finite for any small m.
        inner = (alpha - 1) * (log_p + log_q - log_mixture(log_p, log_q, alpha)).exp()
    elif divergence == "skew_reverse_kl":
        # q / m is at most 1/α, because m ≥ αq. G has one more summand, q, which G − q Σ G removes.
        surplus = log_q - log_mixture(log_q, log_p, alpha)
        inner = q * (surplus - alpha * surplus.exp())
    elif divergence == "akl":
        forward, reverse = adaptive_shares(p, q, mu)
        inner = reverse * q * (log_q - log_p) - forward * p
    else:
        inner = 0.5 * q * (q - p).sign()
    return inner - q * inner.sum(-1, keepdim=True)
