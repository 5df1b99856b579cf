"""Compute losses between two sets of n vectors (units), one set per model: student (n, D_s), teacher (n, D_t), n ≥ 1.

Every function returns a mean over units: a float32 scalar (float64 if an input is) with gradients to the student. With
a single unit there is no relation: the loss is 0, connected to the graph. n is a number of examples, so n×n matrices
are built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.alignment.units import wide
from dsdistill.ops import pairwise_alignment

_EPSILON = 1e-7  # as in PKT's published code
_TWINS = 1e-12  # vectors of at most this squared distance, relative to the squared norms, count as equal


def info_nce(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean over i of −log softmax_j(cos(s_i, t_j) / τ) at j = i (van den Oord et al. 2018); D_s = D_t.

    The negatives are the teacher's vectors of the other units.
    """
    return contrast(*_rows(student, teacher), temperature)


def contrast(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `info_nce` with gradients to both arguments, because in the task "embedding" both are the student's."""
    cosines = F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(student), device=student.device))


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ‖Ĝ_S − Ĝ_T‖²_F / n², where Ĝ is X Xᵀ with each row divided by its norm (SP, Tung & Mori 2019)."""
    student, teacher = _rows(student, teacher)
    mine, other = (F.normalize(x @ x.T, dim=1) for x in (student, teacher))
    return F.mse_loss(mine, other)


def rkd_distance(student: Tensor, teacher: Tensor, backend: str = "auto") -> Tensor:
    """Return the mean over n² pairs of the smooth L1 of distances (RKD-D, Park et al. 2019).

    Distances are relative to the mean of the positive ones.
    """
    return pairwise_alignment(student[None], teacher[None], relation="distance", backend=backend)


def rkd_angle(student: Tensor, teacher: Tensor, triples: int) -> Tensor:
    """Return the mean smooth L1 of cos∠(i, k, j) over all n³ triples, k being the vertex (RKD-A, Park et al. 2019).

    triples: if n³ exceeds this number, this many triples are drawn, with replacement and a fixed seed. A triple in
    which the vertex equals an end has cosine 0 in both models and counts in the mean, as in the published code.
    """
    student, teacher = _rows(student, teacher)
    n = len(student)
    if n**3 <= triples:
        units = torch.arange(n, device=student.device)
        i, j, k = torch.cartesian_prod(units, units, units).unbind(1)
    else:
        seeded = torch.Generator().manual_seed(0)
        i, j, k = torch.randint(n, (3, triples), generator=seeded).to(student.device)
    mine, other = (_cosines_at(x, i, j, k) for x in (student, teacher))
    return F.smooth_l1_loss(mine, other).to(student.dtype)


def _cosines_at(x: Tensor, i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """Return the (triples,) float64 cosine of x_i − x_k and x_j − x_k, by inner products; 0 where either is 0."""
    x = x.double()  # where vectors are close, inner products lose precision by cancellation
    x = x - x.mean(0)
    gram = x @ x.T
    squares = gram.diagonal()
    size = squares[:, None] + squares
    squared = size - 2 * gram
    apart = squared > _TWINS * size
    inverse = torch.where(apart, torch.where(apart, squared, 1).rsqrt(), 0)
    products = gram[i, j] - gram[i, k] - gram[j, k] + squares[k]
    return products * inverse[i, k] * inverse[j, k]


def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 − ‖X_TᵀX_S‖²_F / (‖X_SᵀX_S‖_F ‖X_TᵀX_T‖_F), columns centred (linear CKA, Kornblith et al. 2019).

    With fewer units than features it is small for unrelated vectors too, and with two it is always 0. It is 1 for a
    student whose units are all equal.
    """
    student, teacher = _rows(student, teacher)
    grams = []
    for x in (student, teacher):
        x = x - x.mean(0)
        gram = x @ x.T
        norm = torch.linalg.matrix_norm(gram)
        grams.append(gram / torch.where(norm > 0, norm, 1))
    similarity = (grams[0] * grams[1]).sum()
    return 1 - similarity if len(student) > 1 else 0 * similarity


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over n² of K_T log(K_T / K_S), K = (1 + cos) / 2 with rows that sum to 1, diagonal included.

    This is probabilistic knowledge transfer (Passalis & Tefas 2018), with the ε of its code.
    """
    student, teacher = _rows(student, teacher)
    kernels = []
    for x in (student, teacher):
        unit = F.normalize(x, dim=-1)
        kernel = (1 + unit @ unit.T) / 2
        kernels.append(kernel / kernel.sum(1, keepdim=True) + _EPSILON)
    mine, other = kernels
    return ((other - _EPSILON) * (other / mine).log()).mean()


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return wide(student), wide(teacher.detach())
