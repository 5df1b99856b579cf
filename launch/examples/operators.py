"""Call the fused operators by themselves, and compare them with the same losses written out in PyTorch.

    python launch/examples/operators.py [TOKENS]

Each is a function of tensors that returns a scalar, and no tensor of size N × N or N × vocabulary is ever held whole.
"""

import sys

import torch
import torch.nn.functional as F

from dsdistill.ops import attention_alignment, hidden_alignment, pairwise_alignment, vocabulary_losses

torch.manual_seed(0)
N, V = int(sys.argv[1]) if sys.argv[1:] else 256, 4096  # tokens of a sequence, entries of the vocabulary
device = "cuda" if torch.cuda.is_available() else "cpu"


def made(*shape: int, learns: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=device, requires_grad=learns)


def shown(name: str, fused: torch.Tensor, plain: torch.Tensor) -> None:
    fused.backward()
    print(f"{name:10} fused {fused.item():.6f}  plain {plain.item():.6f}")


# Attention: KL between the rows of softmax(QKᵀ / √D); both models have 4 heads, of unequal widths.
query, key = made(2, 4, N, 32, learns=True), made(2, 4, N, 32)
guide = made(2, 4, N, 64), made(2, 4, N, 64)
rows = [(q @ k.mT / q.shape[-1] ** 0.5).log_softmax(-1) for q, k in ((query, key), guide)]
plain = F.kl_div(*rows, log_target=True, reduction="sum") / (2 * 4 * N)
shown("attention", attention_alignment(query, key, *guide, divergence="kl"), plain)

# Hidden states of unequal widths: the student's are projected.
student, teacher, projection = made(2, N, 128, learns=True), made(2, N, 256), made(256, 128, learns=True)
plain = F.mse_loss(student @ projection.T, teacher)
shown("hidden", hidden_alignment(student, teacher, projection=projection), plain)

# Relations of tokens: the cosines between all tokens of a sequence; no projection is needed.
units = [F.normalize(x, dim=-1) for x in (student, teacher)]
plain = F.mse_loss(*(x @ x.mT for x in units))
shown("pairwise", pairwise_alignment(student, teacher, relation="cosine"), plain)

# Cross-entropy and KL to the teacher over a vocabulary, from hidden states and heads.
head, teacher_head, labels = made(V, 128, learns=True), made(V, 256), torch.randint(V, (2, N), device=device)
logits, theirs = (student @ head.T / 10).flatten(0, 1), (teacher @ teacher_head.T / 10).flatten(0, 1)
plain = F.cross_entropy(logits, labels.flatten())
plain = plain + F.kl_div(
    logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
)
shown(
    "vocabulary",
    vocabulary_losses(student / 10, head, teacher / 10, teacher_head, labels=labels).total,
    plain,
)
