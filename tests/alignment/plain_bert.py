"""Read from a BERT what published losses compare, with hooks on its linear layers and the library's eager attention.

Nothing of dsdistill's capture, operators or terms is used here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Seen:
    logits: Tensor  # (B, C)
    hidden: tuple[Tensor, ...]  # embeddings' output and each layer's, (B, N, D)
    query: list[Tensor]  # of each layer, (B, H, N, D)
    key: list[Tensor]
    value: list[Tensor]

    def scores(self, layer: int) -> Tensor:
        """(B, H, N, N) before mask and softmax; layers count from 1."""
        query, key = self.query[layer - 1], self.key[layer - 1]
        return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def look(model, batch) -> Seen:
    """Run one forward pass with gradients; the model keeps its attention implementation."""
    found = {"query": [], "key": [], "value": []}
    heads = model.config.num_attention_heads
    hooks = []
    for layer in model.bert.encoder.layer:
        for name, into in found.items():

            def keep(module, args, output, into=into):
                into.append(output.unflatten(-1, (heads, -1)).transpose(1, 2))

            hooks.append(getattr(layer.attention.self, name).register_forward_hook(keep))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    outputs = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), output_hidden_states=True)
    model.set_attn_implementation(implementation)
    for hook in hooks:
        hook.remove()
    return Seen(outputs.logits, outputs.hidden_states, **found)


def row_kl(teacher_scores: Tensor, student_scores: Tensor, mask: Tensor) -> Tensor:
    """Return (valid rows of all heads,) KL(teacher ‖ student) of softmaxed scores, each sequence unpadded."""
    rows = []
    for t, s, valid in zip(teacher_scores, student_scores, mask, strict=True):
        n = int(valid.sum())
        log_p, log_q = (x[:, :n, :n].log_softmax(-1) for x in (t, s))
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
    return torch.cat(rows)


def relation(x: Tensor, heads: int | None = None) -> Tensor:
    """Return X Xᵀ / √d of (B, H, N, D), or of its heads joined and split anew."""
    if heads is not None:
        joined = x.transpose(1, 2).flatten(2)
        x = joined.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
