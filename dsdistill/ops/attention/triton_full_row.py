"""Compute attention alignment of short sequences: whole rows of scores stay on chip, so each score is computed once.

The formulas are in `triton_tile.loss_and_slope`. A program owns queries and sees all their keys (N ≤ 512) as one tile,
so that softmax, loss and dQ need no second sweep. There are three ways to find dK:
  ALONE   a program owns all queries of a head (N ≤ 128) and writes its dK; no other head shares its keys
  MERGED  a program owns a few queries and adds dK atomically; like ALONE it takes 4 products and 2 exps a tile in all
  else    `triton_sweeps.columns_kernel` finds dK; this kernel stores the statistics that it needs
"""

import triton
import triton.language as tl

from dsdistill.ops.attention.triton_tile import (
    KL,
    LN2,
    LOWEST,
    MSE,
    SCORE_MSE,
    add_tile,
    exists,
    gradient_product,
    load_labels,
    load_tile,
    store_tile,
)


@triton.jit
def full_row_kernel(
    query_s,
    key_s,
    query_t,
    key_t,
    labels,
    max_s,  # this and the next four: (B, H, N) float32, as in `triton_sweeps`; written only for a sweep that finds dK
    max_t,
    log_s,
    log_t,
    slope_mean,
    partial,  # (B · H · row blocks)
    coefficient,
    d_query,  # (B, H, N, D) contiguous
    d_key,  # (B, H_kv, N, D) contiguous; float32 zeros with MERGED, anything with ALONE
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
    H,
    group_s,
    group_t,
    window,
    scale_s,  # multiplied by log₂e for kl and mse
    scale_t,
    gradient_scale,
    DS: tl.constexpr,
    DT: tl.constexpr,
    BDS: tl.constexpr,
    BDT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,  # at least N
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    LABELLED: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
    WITH_QUERY: tl.constexpr,
    MERGED: tl.constexpr,
    ALONE: tl.constexpr,  # BR is at least N
):
    blocks = tl.cdiv(N, BR)
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks).to(tl.int64)
    b, h = head // H, head % H
    kv = h // group_s
    rows = block * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    labels += b * N
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
    q_s = load_tile(query_s + b * qs_b + h * qs_h, rows, rows_inside, qs_n, DS, BDS, UPCAST)
    q_t = load_tile(query_t + b * qt_b + h * qt_h, rows, rows < N, qt_n, DT, BDT, UPCAST)
    key_s += b * ks_b + kv * ks_h
    k_t = load_tile(key_t + b * kt_b + h // group_t * kt_h, columns, columns < N, kt_n, DT, BDT, UPCAST)
    t = tl.dot(q_t, tl.trans(k_t), input_precision="ieee") * scale_t
    k_s = load_tile(key_s, columns, columns_inside, ks_n, DS, BDS, UPCAST)
    s = tl.dot(q_s, tl.trans(k_s), input_precision="ieee") * scale_s

    if DIVERGENCE == SCORE_MSE:
        difference = tl.where(present, s - t, 0.0)
        loss = tl.sum(difference * difference, 1)
        slope = 2.0 * difference
    else:
        # A pair that does not exist gets a score so low that its probability is 0. A row without pairs is uniform in
        # both models, so that its loss and slope are 0.
        s = tl.where(present, s, LOWEST)
        t = tl.where(present, t, LOWEST)
        m_s, m_t = tl.max(s, 1), tl.max(t, 1)
        some = m_s > LOWEST
        s -= m_s[:, None]
        t -= m_t[:, None]
        p_t = tl.exp2(t)
        if DIVERGENCE == KL:
            # This comes before the probabilities are divided, so that only two tiles of scores live at a time.
            entries = tl.sum(p_t * (t - s), 1)
        p_s = tl.exp2(s)
        l_s, l_t = tl.sum(p_s, 1), tl.sum(p_t, 1)
        row_log_s, row_log_t = tl.log2(l_s), tl.log2(l_t)
        p_s *= (1.0 / l_s)[:, None]
        p_t *= (1.0 / l_t)[:, None]
        slope = p_s - p_t
        if DIVERGENCE == KL:
            loss = (entries / l_t - row_log_t + row_log_s) * LN2
        else:
            loss = tl.sum(slope * slope, 1)
            r = tl.sum(p_s * slope, 1)
            slope = 2.0 * p_s * (slope - r[:, None])
        if not MERGED and not ALONE:
            out = head * N + rows
            if DIVERGENCE == KL:
                m_s += row_log_s
                m_t += row_log_t
            tl.store(max_s + out, tl.where(some, m_s, 0.0), mask=rows < N)
            tl.store(max_t + out, tl.where(some, m_t, 0.0), mask=rows < N)
            if DIVERGENCE == MSE:
                tl.store(log_s + out, row_log_s, mask=rows < N)
                tl.store(log_t + out, row_log_t, mask=rows < N)
                tl.store(slope_mean + out, r, mask=rows < N)
    tl.store(partial + head * blocks + block, tl.sum(loss, 0))

    factor = gradient_scale * tl.load(coefficient)
    TYPE: tl.constexpr = key_s.dtype.element_ty
    if WITH_QUERY:
        gradient = gradient_product(slope, k_s, TYPE, UPCAST, tl.zeros([BR, BDS], tl.float32))
        store_tile(d_query + head * N * DS, rows, rows < N, DS, gradient * factor, DS, BDS, UPCAST)
    if MERGED or ALONE:
        kv_head = b * (H // group_s) + kv
        QTYPE: tl.constexpr = query_s.dtype.element_ty
        part = gradient_product(tl.trans(slope), q_s, QTYPE, UPCAST, tl.zeros([BC, BDS], tl.float32))
        if ALONE:
            store_tile(d_key + kv_head * N * DS, columns, columns < N, DS, part * factor, DS, BDS, UPCAST)
        else:
            add_tile(d_key + kv_head * N * DS, columns, columns < N, DS, part * factor, DS, BDS)
