"""Run attention alignment by Triton kernels: choose which of them run, in which order, with which tiles.

  row     N ≤ 512: whole rows stay on chip; dK is added atomically, or found by a column sweep if the result must be
          deterministic. If N ≤ 128 and each query head has its own key head, a program owns a head and needs neither
  merged  statistics sweep, then one sweep for dQ (atomic) and dK
  sweeps  statistics sweep, row sweep for dQ, column sweep for dK: no atomics
Raw scores need no statistics. kl needs none if the caller hands over both models' LSEs (log Σ exp of each row's scores,
which their own flash attention has): merged is then one sweep of 4 products, the fewest possible. mse always needs a
sweep for r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsdistill.ops.attention import tuning
from dsdistill.ops.attention.native import DIVERGENCE_CODES, KL, MSE, SCORE_MSE
from dsdistill.ops.attention.triton_tiles import (
    ROW_TOKENS,
    alone_tile,
    fits,
    loss_tile,
    row_merges,
    row_tile,
    tile_of,
)
from dsdistill.ops.backends import register_gradients
from dsdistill.ops.common import storage_dtype
from dsdistill.ops.gpu import block_width, interpreting, launch, rows_contiguous, triton_lack

PLANS = ("auto", "row", "merged", "sweeps")
LOG2E = math.log2(math.e)
# The statistics of each row; triton_sweeps describes them.
STATISTICS = (
    "max_s",
    "max_t",
    "log_s",
    "log_t",
    "slope_mean",
)

# The plan of public calls. Tests and the benchmark set it, to run each plan in turn.
default_plan = "auto"


def arguments(tensors, pairs, weights, divergence, student_scale, teacher_scale, heads, coefficient) -> tuple:
    """Return the operator's arguments except the last two, which ask for gradients. coefficient: scalar float32."""
    return (
        *tensors,
        pairs.mask,
        pairs.segments,
        pairs.rows,
        weights,
        None,
        None,
        coefficient,
        DIVERGENCE_CODES[divergence],
        student_scale,
        teacher_scale,
        pairs.causal,
        -1 if pairs.window is None else pairs.window,
        heads == "mean",
        default_plan,
    )


def lack(tensors: Sequence[Tensor]) -> str | None:
    """Return why these kernels cannot take a call; None if they can."""
    reason = triton_lack(*tensors)
    if reason is None and not fits(tensors):
        reason = f"its heads are at most 256 wide, got {max(x.shape[3] for x in tensors)}"
    return reason


def left_to_chunked(tensors: Sequence[Tensor]) -> str | None:
    """Return why "auto" does not take these kernels although they can run; None if it may."""
    if any(x.dtype == torch.float32 for x in tensors):
        return "float32 products have no matrix instructions"
    return None


def run(
    student_query,
    student_key,
    teacher_query,
    teacher_key,
    mask,
    segments,
    rows,
    row_weights,
    student_lse,
    teacher_lse,
    coefficient,
    divergence,
    student_scale,
    teacher_scale,
    causal,
    window,
    mean_heads,
    plan,
    query_gradient,
    key_gradient,
):
    """Return loss · coefficient, and its gradients at the student's query and key (empty if not asked for).

    Args:
        rows: (B, R) int64, the positions of the queries; −1 names none. The queries are then (B, H, R, D), and the plan
            "row" cannot run.
        row_weights: (B, R) float32, factors of the rows' sums and gradients. Give it together with `rows`.
        student_lse, teacher_lse: (B, H, N) natural logarithm of each row's Σ exp(scale · score) over the keys it
            sees. Give both or neither; only kl uses them.
        coefficient: float32 scalar.
        plan: "auto", or for measurements "row", "merged" or "sweeps". If a plan cannot run, the next in this list does.
    """
    tensors = [_near_rows(x) for x in (student_query, student_key, teacher_query, teacher_key)]
    needs = (query_gradient, key_gradient)
    if rows is None and tuning.due(tensors, (divergence, mean_heads, plan, needs)):
        everywhere = torch.ones(
            (tensors[0].shape[0], tensors[0].shape[2]), dtype=torch.bool, device=tensors[0].device
        )
        calls = []
        for where, order in (
            ((mask, segments), (causal, window)),
            ((None, None), (False, -1)),
            ((everywhere, None), (True, everywhere.shape[1] // 2 + 1)),
        ):
            given: list[Any] = [
                *tensors,
                *where,
                None,
                None,
                student_lse,
                teacher_lse,
                coefficient,
                divergence,
            ]
            given += [student_scale, teacher_scale, *order, mean_heads, plan, *needs]
            calls.append(functools.partial(run, *given))
        tuning.tune(calls, tensors)
    scales = student_scale, teacher_scale
    call = _Call(tensors, mask, segments, rows, row_weights, divergence, scales, causal, window, coefficient)
    if student_query.numel() == 0:
        loss, gradients = coefficient.new_zeros(()), (_zeros(student_query), _zeros(student_key))
    elif mean_heads:
        loss, gradients = call.mean_heads(needs)
    else:
        lse = None if student_lse is None or teacher_lse is None else (student_lse, teacher_lse)
        loss, gradients = call.match_heads(needs, plan, lse)
    empty = [x.new_empty(0, dtype=storage_dtype(x)) for x in (student_query, student_key)]
    return (
        loss * coefficient,
        *(g.to(e.dtype) if need else e for g, e, need in zip(gradients, empty, needs, strict=True)),
    )


def _near_rows(x: Tensor) -> Tensor:
    """Return `x`, or a copy whose rows lie so close to each other that offsets inside a tile fit into 32 bits."""
    x = rows_contiguous(x)
    return x if x.stride(2) < 2**23 else x.contiguous()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=storage_dtype(x), device=x.device)


torch.library.custom_op(
    "dsdistill::attention_alignment_triton",
    run,
    mutates_args=(),
    schema=(
        "(Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, Tensor? mask, "
        "Tensor? segments, Tensor? rows, Tensor? row_weights, Tensor? student_lse, Tensor? teacher_lse, "
        "Tensor coefficient, int divergence, "
        "float student_scale, float teacher_scale, bool causal, int window, bool mean_heads, str plan, "
        "bool query_gradient, bool key_gradient) -> (Tensor, Tensor, Tensor)"
    ),
)


@torch.library.register_fake("dsdistill::attention_alignment_triton")
def _fake(student_query, student_key, *rest):
    return (
        student_query.new_empty((), dtype=torch.float32),
        *(
            x.new_empty(x.shape if need else 0, dtype=storage_dtype(x))
            for x, need in zip((student_query, student_key), rest[-2:], strict=True)
        ),
    )


register_gradients("dsdistill::attention_alignment_triton", arguments=20, differentiable=(0, 1))


class _Call:
    """Hold the buffers and do the launches of one call."""

    def __init__(
        self, tensors, mask, segments, rows, weights, divergence, scales, causal, window, coefficient
    ):
        self.tensors = tensors
        query, key, teacher_query, teacher_key = tensors
        self.batch, self.heads, self.queries, self.width = query.shape
        self.tokens, self.chosen = key.shape[2], rows is not None
        self.kv_heads = key.shape[1]
        self.divergence = divergence
        self.coefficient = coefficient
        self.gradient_scale = float(scales[0])
        labels, masked = labels_of(mask, segments, self.batch, self.tokens, query.device)
        factor = 1.0 if divergence == SCORE_MSE else LOG2E
        self.scales = {"scale_s": scales[0] * factor, "scale_t": scales[1] * factor}
        self.labels, self.masked = labels, masked
        self.shared = {
            "labels": coefficient if labels is None else labels,  # any pointer; never read without labels
            "places": coefficient if rows is None else rows.where(rows >= 0, self.tokens).int().contiguous(),
            "row_weights": coefficient if weights is None else weights.contiguous(),
            "CHOSEN": self.chosen,
            "N": self.tokens,
            "R": self.queries,
            "window": max(window, 0),
            "CAUSAL": causal,
            "WINDOWED": 0 <= window < self.tokens,
            "LABELLED": labels is not None,
            "MASKED": masked,
            "UPCAST": interpreting() and query.device.type == "cpu",
            "DIVERGENCE": divergence,
        }
        self.models = {
            "DS": self.width,
            "DT": teacher_query.shape[3],
            "BDS": block_width(self.width),
            "BDT": block_width(teacher_query.shape[3]),
            "group_s": self.heads // self.kv_heads,
            "group_t": teacher_query.shape[1] // teacher_key.shape[1],
        }
        for name, x in zip(("query_s", "key_s", "query_t", "key_t"), tensors, strict=True):
            self.models[name] = x
            short = name[0] + name[-1]
            self.models |= {f"{short}_b": x.stride(0), f"{short}_h": x.stride(1), f"{short}_n": x.stride(2)}

    def buffer(self, *shape, zeroed=False, dtype=torch.float32) -> Tensor:
        make = torch.zeros if zeroed else torch.empty
        return make(shape, dtype=dtype, device=self.coefficient.device)

    def tile(self, kernel: str):
        return tile_of(kernel, self.tensors)

    def run(self, kernel, name: str, programs: int, tile, **given) -> None:
        common = self.shared | self.models | self.scales | {"BR": tile.rows, "BC": tile.columns} | given
        wanted = {argument: common[argument] for argument in kernel.arg_names}
        launch(kernel, programs, wanted, tile)

    @functools.cached_property
    def reached(self) -> dict[str, Tensor]:
        """Return the result of `reach`; without labels or with chosen rows, return pointers that no kernel reads."""
        if self.labels is None or self.chosen:
            return {"starts": self.coefficient, "ends": self.coefficient}
        return dict(zip(("starts", "ends"), reach(self.labels, self.masked), strict=True))

    def match_heads(self, needs: Sequence[bool], plan: str, lse: tuple[Tensor, Tensor] | None):
        deterministic = torch.are_deterministic_algorithms_enabled()
        if self.chosen:
            plan = "sweeps" if plan == "row" or deterministic else "merged" if plan == "auto" else plan
        if plan == "auto":
            plan = "row" if self.tokens <= ROW_TOKENS else "sweeps" if deterministic else "merged"
        if plan == "row" and any(needs) and lse is None:
            tile = alone_tile(self.tensors) if needs[1] else None
            if tile is not None:
                return self.full_row(needs, tile, merged=False, alone=True)
            tile = row_tile(self.tensors)
            if tile is not None:
                merged = needs[1] and not deterministic and row_merges(self.tensors)
                return self.full_row(needs, tile, merged)
        merged = plan != "sweeps" and all(needs) and not deterministic
        return self.sweeps(needs, merged, *self.statistics(lse))

    def statistics(self, lse: tuple[Tensor, Tensor] | None):
        """Return the loss and the statistics of the rows; the loss is None if a later sweep finds it."""
        from dsdistill.ops.attention.triton_sweeps import statistics_kernel

        if self.divergence == SCORE_MSE:
            return None, self.statistics_buffers()
        if lse is not None and self.divergence == KL:
            given = dict.fromkeys(STATISTICS, self.coefficient)
            for name, x in zip(("max_s", "max_t"), lse, strict=True):
                given[name] = (x.float() * LOG2E).contiguous()
            return None, given
        given = self.statistics_buffers()
        tile = self.tile("statistics")
        programs = self.batch * self.heads * -(-self.queries // tile.rows)
        partial = self.buffer(programs)
        self.run(
            statistics_kernel,
            "statistics",
            programs,
            tile,
            partial=partial,
            H=self.heads,
            **given,
            **self.reached,
        )
        return partial.sum(), given

    def statistics_buffers(self) -> dict[str, Tensor]:
        """Return memory for the statistics that a divergence needs; kl needs only the LSEs, instead of the maxima."""
        wanted = {SCORE_MSE: (), KL: STATISTICS[:2], MSE: STATISTICS}[self.divergence]
        shape = (self.batch, self.heads, self.queries)
        return {name: self.buffer(*shape) if name in wanted else self.coefficient for name in STATISTICS}

    def sweeps(self, needs, merged: bool, loss: Tensor | None, given: dict):
        from dsdistill.ops.attention.triton_sweeps import columns_kernel, rows_kernel

        query, key = self.tensors[:2]
        nothing = self.coefficient
        given = given | self.reached
        given |= {
            "coefficient": nothing,
            "gradient_scale": self.gradient_scale,
            "H": self.heads,
            "d_query": nothing,
            "d_key": nothing,
            "partial": nothing,
        }
        gradients = [
            torch.empty(x.shape, dtype=storage_dtype(x), device=x.device) if need else None
            for x, need in zip((query, key), needs, strict=True)
        ]
        # If the statistics sweep has not found the loss, the first sweep that runs finds it.
        by_rows = not merged and (needs[0] or (loss is None and not needs[1]))
        if by_rows:
            tile = self.tile("rows") if needs[0] else loss_tile(self.tensors)
            programs = self.batch * self.heads * -(-self.queries // tile.rows)
            extra: dict[str, Any] = {"WITH_LOSS": loss is None, "WITH_GRADIENT": bool(needs[0])}
            if needs[0]:
                extra["d_query"] = gradients[0]
            if loss is None:
                extra["partial"] = self.buffer(programs)
            self.run(rows_kernel, "rows", programs, tile, **(given | extra))
            loss = extra["partial"].sum() if loss is None else loss
        if needs[1]:
            tile = self.tile("merged" if merged else "columns")
            programs = self.batch * self.kv_heads * -(-self.tokens // tile.columns)
            extra = {"WITH_LOSS": loss is None, "MERGED": merged, "WITH_KEY": True, "d_key": gradients[1]}
            if merged:
                gradients[0] = extra["d_query"] = self.buffer(*query.shape, zeroed=True)
            if loss is None:
                extra["partial"] = self.buffer(programs)
            self.run(columns_kernel, "columns", programs, tile, **(given | extra))
            loss = extra["partial"].sum() if loss is None else loss
        return loss, gradients

    def full_row(self, needs, tile, merged: bool, alone: bool = False):
        from dsdistill.ops.attention.triton_full_row import full_row_kernel

        query, key = self.tensors[:2]
        nothing = self.coefficient
        given = dict.fromkeys(STATISTICS, nothing) if merged or alone else self.statistics_buffers()
        programs = self.batch * self.heads * -(-self.tokens // tile.rows)
        partial = self.buffer(programs)
        d_query, d_key = (
            torch.empty(x.shape, dtype=storage_dtype(x), device=x.device) if need else None
            for x, need in ((query, needs[0]), (key, alone))
        )
        if merged:
            d_key = self.buffer(*key.shape, zeroed=True)
        self.run(
            full_row_kernel,
            "row",
            programs,
            tile,
            **given,
            partial=partial,
            coefficient=nothing,
            d_query=nothing if d_query is None else d_query,
            d_key=nothing if d_key is None else d_key,
            H=self.heads,
            gradient_scale=self.gradient_scale,
            WITH_QUERY=bool(needs[0]),
            MERGED=merged,
            ALONE=alone,
            # The product with dS divides its features among the warps. 16 features are too few: each warp would compute
            # all scores, and they would spill.
            **{name: max(32, self.models[name]) for name in ("BDS", "BDT")},
        )
        loss = partial.sum()
        if needs[1] and not merged and not alone:
            _, (_, d_key) = self.sweeps((False, True), False, loss, given)
        return loss, (d_query, d_key)

    def mean_heads(self, needs):
        from dsdistill.ops.attention.triton_mean_heads import lse_kernel, mean_heads_kernel

        tile = self.tile("mean_heads")
        row_blocks, column_blocks = -(-self.tokens // tile.rows), -(-self.tokens // tile.columns)
        heads_t = self.tensors[2].shape[1]
        given: dict[str, Any] = {}
        for side, (query, heads) in (("s", (self.tensors[0], self.heads)), ("t", (self.tensors[2], heads_t))):
            given[f"lse_{side}"] = self.buffer(self.batch, heads, self.tokens)
            model = {name: self.models[f"{name}_{side}"] for name in ("query", "key", "group")}
            model |= {f"q_{axis}": self.models[f"q{side}_{axis}"] for axis in "bhn"}
            model |= {f"k_{axis}": self.models[f"k{side}_{axis}"] for axis in "bhn"}
            width = query.shape[3]
            model |= {"D": width, "BD": block_width(width), "H": heads, "scale": self.scales[f"scale_{side}"]}
            programs = self.batch * heads * row_blocks
            self.run(lse_kernel, "mean_heads", programs, tile, lse=given[f"lse_{side}"], **model)
        given |= {
            "slope_mean": self.buffer(self.batch, self.heads, self.tokens, zeroed=True),
            "partial": self.buffer(self.batch * row_blocks),
            "coefficient": self.coefficient,
            "heads_s": self.heads,
            "heads_t": heads_t,
            "gradient_scale": self.gradient_scale,
            "log_heads_s": math.log2(self.heads),
            "log_heads_t": math.log2(heads_t),
        }
        gradients = [
            self.buffer(*x.shape, zeroed=True) if need else None
            for x, need in zip(self.tensors[:2], needs, strict=True)
        ]
        stages = ((True, row_blocks, None), (needs[0], row_blocks, 0), (needs[1], column_blocks, 1))
        for stage, (wanted, blocks, index) in enumerate(stages):
            if wanted:
                out = self.coefficient if index is None else gradients[index]
                self.run(
                    mean_heads_kernel, "mean_heads", self.batch * blocks, tile, **given, out=out, STAGE=stage
                )
        return given["partial"].sum(), gradients


def reach(labels: Tensor, masked: int) -> tuple[Tensor, Tensor]:
    """Return, for each token, where the tokens with its label start and where they end.

    Args:
        labels: (B, N) integers; `masked` is the label of tokens that do not count.

    Returns:
        Two (B, N) int32: the position of the first token with the same label, and the position after the last one. If
        tokens with another label lie in between, the first is −1 − position. Masked tokens have N and 0. This does not
        wait for the device.
    """
    batch, tokens = labels.shape
    places = torch.arange(tokens, device=labels.device).expand(batch, tokens)
    ordered, order = labels.sort(dim=1, stable=True)
    changes = (ordered[:, 1:] != ordered[:, :-1]).to(torch.int64)
    run = torch.nn.functional.pad(changes.cumsum(1), (1, 0))  # number of the label, in order
    first = places.new_full((batch, tokens), tokens).scatter_reduce(1, run, order, "amin")
    end = places.new_zeros((batch, tokens)).scatter_reduce(1, run, order + 1, "amax")
    count = places.new_zeros((batch, tokens)).scatter_add(1, run, torch.ones_like(run))
    solid = end - first == count
    starts = torch.where(solid, first, -1 - first).gather(1, run)
    starts = torch.empty_like(places).scatter(1, order, starts)
    ends = torch.empty_like(places).scatter(1, order, end.gather(1, run))
    valid = labels != masked
    return torch.where(valid, starts, tokens).to(torch.int32), torch.where(valid, ends, 0).to(torch.int32)


def labels_of(mask, segments, batch: int, tokens: int, device) -> tuple[Tensor | None, int]:
    """Return (B, N) integers, equal where two valid tokens may see each other, and the integer of masked tokens."""
    if mask is None and segments is None:
        return None, 0
    if segments is None:
        return (mask.to(torch.int32) - 1).contiguous(), -1
    if segments.dtype != torch.int64:
        segments = segments.to(torch.int32)
    masked = torch.iinfo(segments.dtype).min
    if mask is None:
        return segments.contiguous(), masked
    return torch.where(mask, segments, masked).contiguous(), masked
