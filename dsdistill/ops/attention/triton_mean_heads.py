"""Align attention probabilities averaged over heads (heads="mean"): correct and linear in memory, not tuned.

A first kernel finds the LSEs (log Σ exp of each row's scores) of all heads. Then, with P̄ = (1/H) Σ_h P_h, g = ∂L/∂P̄_S
and c_h = Σ_j P_h g of each row, dS_h = P_h (g − c_h) / H:
  kl   g = −P̄_T / P̄_S        mse  g = 2 (P̄_S − P̄_T)
A tile walks over the heads twice: once for P̄, and once for each head's share of g. Sums over many heads do not fit on
chip. They lie in memory that only one program writes, so nothing is added atomically.
"""

import triton
import triton.language as tl

from dsdistill.ops.attention.triton_tile import (
    KL,
    LN2,
    LOWEST,
    exists,
    gradient_product,
    keys_of,
    load_labels,
    load_tile,
    queries_of,
)


@triton.jit
def lse_kernel(
    query,
    key,
    labels,
    lse,  # (B, H, N) float32, in units of log 2
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    N,
    H,
    group,
    window,
    scale,  # multiplied by log₂e
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    LABELLED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(N, BR)
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    b, h = head // H, head % H
    rows = block * BR + tl.arange(0, BR)
    labels += b * N
    row_labels, rows_inside = load_labels(labels, rows, N, MASKED, LABELLED)
    q = load_tile(query + b * q_b + h * q_h, rows, rows < N, q_n, D, BD, UPCAST)
    key += b * k_b + h // group * k_h
    m = tl.full([BR], LOWEST, tl.float32)
    total = tl.zeros([BR], tl.float32)
    first, last = keys_of(block * BR, block * BR + BR, N, window, CAUSAL, WINDOWED, BC)
    for start in range(first, last, BC):
        columns = start + tl.arange(0, BC)
        column_labels, columns_inside = load_labels(labels, columns, N, MASKED, LABELLED)
        k = load_tile(key, columns, columns < N, k_n, D, BD, UPCAST)
        present = exists(
            rows[:, None],
            columns[None, :],
            row_labels[:, None],
            column_labels[None, :],
            rows_inside[:, None],
            columns_inside[None, :],
            window,
            CAUSAL,
            WINDOWED,
            LABELLED,
        )
        s = tl.where(present, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        total = total * tl.exp2(m - new_m) + tl.sum(tl.exp2(s - new_m[:, None]), 1)
        m = new_m
    some = total > 0
    tl.store(
        lse + head * N + rows, tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=rows < N
    )


@triton.jit
def log_probabilities(
    query,  # of this sequence and head
    key,
    lse,
    rows,
    columns,
    rows_inside,
    columns_inside,
    present,
    q_n,
    k_n,
    N,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return log₂ of one head's probabilities, (R, C), LOWEST where no pair exists; its query tile; its key tile."""
    q = load_tile(query, rows, rows_inside, q_n, D, BD, UPCAST)
    k = load_tile(key, columns, columns_inside, k_n, D, BD, UPCAST)
    row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(present, s - row_lse[:, None], LOWEST), q, k


@triton.jit
def log_add(x, y):
    """Return log₂(2^x + 2^y)."""
    larger = tl.maximum(x, y)
    return larger + tl.log2(tl.exp2(x - larger) + tl.exp2(y - larger))


@triton.jit
def mean_heads_kernel(
    query_s,
    key_s,
    query_t,
    key_t,
    labels,
    lse_s,  # (B, H_S, N), in units of log 2
    lse_t,  # (B, H_T, N)
    slope_mean,  # c of each row, (B, H_S, N) float32; zeros before stage 0
    partial,  # (B · row blocks), written by stage 0
    coefficient,
    out,  # stage 1: dQ (B, H_S, N, D), stage 2: dK (B, H_kv, N, D); float32 zeros
    qs_b,
    qs_h,
    qs_n,
    ks_b,
    ks_h,
    ks_n,
    qt_b,
    qt_h,
    qt_n,
    kt_b,
    kt_h,
    kt_n,
    N,
    heads_s,
    heads_t,
    group_s,
    group_t,
    window,
    scale_s,
    scale_t,
    gradient_scale,
    log_heads_s,  # log₂ of the head counts
    log_heads_t,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BDS: tl.constexpr,
    BDT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    LABELLED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    STAGE: tl.constexpr,  # 0: loss and c, 1: dQ; both own a block of queries. 2: dK, owns a block of keys
):
    blocks = tl.cdiv(N, BC if STAGE == 2 else BR)
    program = tl.program_id(0)
    block = program % blocks
    b = (program // blocks).to(tl.int64)
    labels += b * N
    query_s += b * qs_b
    key_s += b * ks_b
    query_t += b * qt_b
    key_t += b * kt_b
    lse_s += b * heads_s * N
    lse_t += b * heads_t * N
    slope_mean += b * heads_s * N
    factor = gradient_scale * tl.load(coefficient) / heads_s
    loss = tl.zeros([BR], tl.float32)
    features = tl.arange(0, BDS)
    if STAGE == 2:
        first, last = queries_of(block * BC, block * BC + BC, N, window, CAUSAL, WINDOWED, BR)
    else:
        first, last = keys_of(block * BR, block * BR + BR, N, window, CAUSAL, WINDOWED, BC)
    for start in range(first, last, BR if STAGE == 2 else BC):
        if STAGE == 2:
            rows, columns = start + tl.arange(0, BR), block * BC + tl.arange(0, BC)
        else:
            rows, columns = block * BR + tl.arange(0, BR), start + tl.arange(0, BC)
        row_labels, rows_inside = load_labels(labels, rows, N, MASKED, LABELLED)
        column_labels, columns_inside = load_labels(labels, columns, N, MASKED, LABELLED)
        present = exists(
            rows[:, None],
            columns[None, :],
            row_labels[:, None],
            column_labels[None, :],
            rows_inside[:, None],
            columns_inside[None, :],
            window,
            CAUSAL,
            WINDOWED,
            LABELLED,
        )
        # kl uses logarithms, so that no ratio is lost where probabilities are too small for float32.
        mean_s = tl.full([BR, BC], LOWEST if DIVERGENCE == KL else 0.0, tl.float32)
        mean_t = tl.full([BR, BC], LOWEST if DIVERGENCE == KL else 0.0, tl.float32)
        for head in range(0, heads_s):
            h = tl.cast(head, tl.int64)  # heads · tokens · width may pass 2³¹
            log_p, q, k = log_probabilities(
                query_s + h * qs_h,
                key_s + h // group_s * ks_h,
                lse_s + h * N,
                rows,
                columns,
                rows_inside,
                columns_inside,
                present,
                qs_n,
                ks_n,
                N,
                scale_s,
                DS,
                BDS,
                UPCAST,
            )
            mean_s = log_add(mean_s, log_p) if DIVERGENCE == KL else mean_s + tl.exp2(log_p)
        for head in range(0, heads_t):
            h = tl.cast(head, tl.int64)
            log_p, q, k = log_probabilities(
                query_t + h * qt_h,
                key_t + h // group_t * kt_h,
                lse_t + h * N,
                rows,
                columns,
                rows_inside,
                columns_inside,
                present,
                qt_n,
                kt_n,
                N,
                scale_t,
                DT,
                BDT,
                UPCAST,
            )
            mean_t = log_add(mean_t, log_p) if DIVERGENCE == KL else mean_t + tl.exp2(log_p)
        if DIVERGENCE == KL:
            log_s = mean_s - log_heads_s
            log_t = mean_t - log_heads_t
            mean_s = tl.where(present, tl.exp2(log_s), 0.0)
            mean_t = tl.where(present, tl.exp2(log_t), 0.0)
            value = tl.where(present, mean_t * (log_t - log_s) * LN2, 0.0)
        else:
            mean_s /= heads_s
            mean_t /= heads_t
            value = (mean_s - mean_t) * (mean_s - mean_t)
        if STAGE == 0:
            loss += tl.sum(value, 1)
        for head in range(0, heads_s):
            h = tl.cast(head, tl.int64)  # heads · tokens · width may pass 2³¹
            log_p, q, k = log_probabilities(
                query_s + h * qs_h,
                key_s + h // group_s * ks_h,
                lse_s + h * N,
                rows,
                columns,
                rows_inside,
                columns_inside,
                present,
                qs_n,
                ks_n,
                N,
                scale_s,
                DS,
                BDS,
                UPCAST,
            )
            p = tl.where(present, tl.exp2(log_p), 0.0)
            if DIVERGENCE == KL:
                # P_h / P̄_S lies in [0, H] even where both are tiny, whereas g alone may overflow.
                pulled = -tl.where(present, tl.exp2(log_p - log_s), 0.0) * mean_t
            else:
                pulled = 2.0 * p * (mean_s - mean_t)
            c = slope_mean + h * N + rows
            if STAGE == 0:
                sum_c = tl.load(c, mask=rows < N, other=0.0) + tl.sum(pulled, 1)
                tl.debug_barrier()
                tl.store(c, sum_c, mask=rows < N)
            else:
                slope = (pulled - p * tl.load(c, mask=rows < N, other=0.0)[:, None]) * factor
                zero = tl.zeros([BC if STAGE == 2 else BR, BDS], tl.float32)
                if STAGE == 1:
                    part = gradient_product(slope, k, key_s.dtype.element_ty, UPCAST, zero)
                    owned, target = rows, out + (b * heads_s + h) * N * DS
                else:
                    part = gradient_product(tl.trans(slope), q, query_s.dtype.element_ty, UPCAST, zero)
                    owned = columns
                    target = out + (b * (heads_s // group_s) + h // group_s) * N * DS
                address = target + owned.to(tl.int64)[:, None] * DS + features[None, :]
                inside = (owned < N)[:, None] & (features < DS)[None, :]
                part += tl.load(address, mask=inside, other=0.0)
                tl.debug_barrier()
                tl.store(address, part, mask=inside)
            # In the next round a thread may load what another thread has stored in this one.
            tl.debug_barrier()
    if STAGE == 0:
        tl.store(partial + b * blocks + block, tl.sum(loss, 0))
