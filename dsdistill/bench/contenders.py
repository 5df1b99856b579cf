"""Make the contenders of an operator's benchmark: plain PyTorch, torch.compile, other libraries, our own plans."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdistill.bench.cases import WEIGHTS
from dsdistill.bench.works import Work, device
from dsdistill.ops import available_backends, soft_label_alignment, token_cross_entropy
from dsdistill.ops.attention import triton_schedule
from dsdistill.ops.attention.pairs import Pairs
from dsdistill.ops.attention.reference import attention_total

# Contenders that ours are compared with. sdpa and flex compute something else: one model's attention.
RIVALS = ("eager", "eager-half", "compile", "apart", "liger", "sdpa", "flex")
PLANS = ("triton-row", "triton-merged", "triton-sweeps")  # single plans of attention
CONTENDERS = (*RIVALS, "chunked", "cpp", "cuda", "triton", *PLANS)
LIGER_BETA = {"jsd": 0.5, "forward_kl": 0.0, "reverse_kl": 1.0}
HEADS = ("soft-label", "cross-entropy", "vocabulary")  # operators that read heads


def present(operator: str, options: dict, dtype: str) -> set[str]:
    """Return the contenders that can run here for an operator, given its options and the name of a dtype."""
    found = {"eager", "compile", *available_backends()}
    if operator == "attention":
        found |= {"sdpa", "flex"}
        found |= {"eager-half"} if dtype != "float32" else set()
        found |= set(PLANS) if "triton" in found else set()
    if options.get("rows"):  # these contenders compare all rows
        found -= {"triton", *PLANS, "eager-half", "sdpa", "flex"}
    if operator in HEADS:
        found.discard("cpp")
        soft = operator != "cross-entropy" and options.get("divergence", "forward_kl") in LIGER_BETA
        if soft and find_spec("liger_kernel"):
            found.add("liger")
    if operator == "vocabulary":
        found.add("apart")
    if operator != "hidden":
        found.discard("cuda")
    if device() == "cuda":
        found.discard("cpp")
    return found


def unasked(found: set[str]) -> set[str]:
    """Return the contenders that are measured by default; on a CPU these lack those whose times mean nothing there."""
    return found if device() == "cuda" else found - {"flex", "triton", *PLANS}


def contender(work: Work, name: str) -> Callable[[], Tensor]:
    """Return a function that computes a contender's loss."""
    if name == "compile":
        # One graph of fixed sizes: a call that would break the graph or exceed the recompile limit raises.
        return torch.compile(lambda: work.loss("reference"), fullgraph=True, dynamic=False)
    if name in MADE:
        return MADE[name](work)
    if name in PLANS:
        return lambda: with_plan(work, name.removeprefix("triton-"))
    return lambda: work.loss("reference" if name == "eager" else name)


def with_plan(work: Work, plan: str) -> Tensor:
    """Return the loss computed by one plan of attention's Triton kernels."""
    before, triton_schedule.default_plan = triton_schedule.default_plan, plan
    try:
        return work.loss("triton")
    finally:
        triton_schedule.default_plan = before


def pairs_of(work: Work) -> Pairs:
    """Return which queries and keys of an attention work form pairs."""
    given = work.tensors
    tokens = given["student_query"].shape[2]
    return Pairs(tokens, given.get("mask"), work.options["causal"], None, given.get("segments"))


def attention_in_half(work: Work) -> Callable[[], Tensor]:
    """Return a function that computes products, softmax and loss in the inputs' half precision."""
    given = work.tensors
    tensors = [given[name] for name in ("student_query", "student_key", "teacher_query", "teacher_key")]
    batch, heads, tokens, width = tensors[0].shape
    setting = {"pairs": pairs_of(work), "divergence": work.options["divergence"], "heads": "match"}
    setting |= {"student_scale": width**-0.5, "teacher_scale": width**-0.5, "dtype": tensors[0].dtype}
    return lambda: attention_total(*tensors, **setting) / (batch * heads * tokens)


def attention_itself(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the student's query, key, some values, and the mask that scaled_dot_product_attention wants."""
    query, key = work.student
    pairs = pairs_of(work)
    if work.options["causal"] and pairs.mask is None and pairs.segments is None:
        return query, key, torch.randn_like(key), None  # is_causal says the same
    everything = slice(0, pairs.tokens)
    exists = pairs.block(everything, everything, slice(None), query.device)
    return query, key, torch.randn_like(key), exists


def sdpa(work: Work) -> Callable[[], Tensor]:
    """Return one model's attention by PyTorch: its time shows what a kernel of that shape takes."""
    query, key, value, mask = attention_itself(work)
    options = {"enable_gqa": query.shape[1] != key.shape[1]}
    options |= {"is_causal": True} if work.options["causal"] and mask is None else {"attn_mask": mask}
    return lambda: F.scaled_dot_product_attention(query, key, value, **options).sum()


def flex(work: Work) -> Callable[[], Tensor]:
    """Return one model's attention by flex_attention, which skips fully masked blocks; compiled on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key = work.student
    value, pairs = torch.randn_like(key), pairs_of(work)

    def exists(batch, head, row, column):
        found = row >= column if pairs.causal else row >= 0
        if pairs.mask is not None:
            found = found & pairs.mask[batch, row] & pairs.mask[batch, column]
        if pairs.segments is not None:
            found = found & (pairs.segments[batch, row] == pairs.segments[batch, column])
        return found

    batch, heads, tokens, _ = query.shape
    blocks = None
    if pairs.causal or pairs.mask is not None or pairs.segments is not None:
        blocks = create_block_mask(exists, batch, None, tokens, tokens, device=query.device)
    function = flex_attention
    if device() == "cuda":
        function = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    gqa = heads != key.shape[1]
    return lambda: function(query, key, value, block_mask=blocks, enable_gqa=gqa).sum()


def liger(work: Work) -> Callable[[], Tensor]:
    """Return liger-kernel's fused linear divergence: alone, or with the task's cross-entropy, in blocks of tokens."""
    hidden, head, teacher_hidden, teacher_head, *labels = (
        x.flatten(0, -2) if x.dim() > 2 else x for x in work.tensors.values()
    )
    beta = LIGER_BETA[work.options["divergence"]]
    if labels:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        both = LigerFusedLinearJSDLoss(*WEIGHTS, beta=beta, compiled=device() == "cuda")
        return lambda: both(hidden, head, teacher_hidden, teacher_head, labels[0].flatten())
    from liger_kernel.transformers import LigerFusedLinearJSD

    soft = LigerFusedLinearJSD(jsd_beta=beta)
    return lambda: soft(hidden, head, teacher_hidden, teacher_head)


def apart(work: Work) -> Callable[[], Tensor]:
    """Return task and soft labels by separate operators, in blocks, with the weights of `vocabulary_losses`."""
    hidden, head, teacher_hidden, teacher_head, labels = work.tensors.values()

    def loss() -> Tensor:
        task = token_cross_entropy(hidden, head, labels, backend="chunked")
        soft = soft_label_alignment(
            hidden, head, teacher_hidden, teacher_head, **work.options, backend="chunked"
        )
        return WEIGHTS[0] * task + WEIGHTS[1] * soft

    return loss


MADE: dict[str, Callable[[Work], Callable[[], Tensor]]] = {
    "eager-half": attention_in_half,
    "sdpa": sdpa,
    "flex": flex,
    "liger": liger,
    "apart": apart,
}
