"""Compute attention alignment by sweeps over blocks, for any N: statistics of the rows, then dQ by rows, dK by columns.

S = scale · Q Kᵀ, LSE = log Σ exp S, P = exp(S − LSE), dS: see `triton_tile`, dQ = scale · dS K_S, dK = scale · dSᵀ Q_S.
  statistics  one online sweep: both LSEs, r (mse), the loss                     2 products a tile, 2 exps
  rows        a block of queries walks its keys: dQ                              3 products, 2 exps
  columns     a block of keys walks the queries of every head it serves: dK      3 products, 2 exps
              MERGED: it also adds dQ atomically                                 4 products
There is no N×N matrix and no buffer beyond O(N). All but MERGED is deterministic. CHOSEN: R queries of each sequence.
"""

import triton
import triton.language as tl

from dsdistill.ops.attention.triton_tile import (
    KL,
    LN2,
    LOWEST,
    SCORE_MSE,
    add_tile,
    chosen_spans,
    edges,
    exists,
    gradient_product,
    load_block,
    load_labels,
    load_places,
    load_tile,
    loss_and_slope,
    spans,
    store_tile,
)


@triton.jit
def statistics_kernel(
    query_s,
    key_s,
    query_t,
    key_t,
    places,  # CHOSEN: (B, R) int32, the queries' positions, N where there is none; else any pointer
    row_weights,  # CHOSEN: (B, R) float32
    labels,
    starts,
    ends,
    max_s,  # largest score of each row, in units of log 2; this and the next four are (B, H, N) float32
    max_t,
    log_s,  # log₂ Σ exp2(score − max)
    log_t,
    slope_mean,  # r of mse
    partial,  # (B · H · row blocks) loss of each block of rows
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
    R,  # CHOSEN: queries of a sequence
    H,
    group_s,
    group_t,
    window,
    scale_s,  # · log₂e
    scale_t,
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
    CHOSEN: tl.constexpr,
):
    count = R if CHOSEN else N
    blocks = tl.cdiv(count, BR)
    program = tl.program_id(0)
    # With causal attention the longest blocks begin first.
    block = blocks - 1 - program % blocks
    head = (program // blocks).to(tl.int64)
    b, h = head // H, head % H
    at = block * BR + tl.arange(0, BR)
    rows, weights = load_places(places + b * R, row_weights + b * R, at, R, N, CHOSEN)
    labels += b * N
    starts += b * N
    ends += b * N
    row_labels, rows_inside = load_labels(labels, rows, N, MASKED, LABELLED)
    q_s = load_tile(query_s + b * qs_b + h * qs_h, at, at < count, qs_n, DS, BDS, UPCAST)
    q_t = load_tile(query_t + b * qt_b + h * qt_h, at, at < count, qt_n, DT, BDT, UPCAST)
    key_s += b * ks_b + h // group_s * ks_h
    key_t += b * kt_b + h // group_t * kt_h

    m_s = tl.full([BR], LOWEST, tl.float32)
    m_t = tl.full([BR], LOWEST, tl.float32)
    l_s = tl.zeros([BR], tl.float32)
    l_t = tl.zeros([BR], tl.float32)
    # kl: a = Σ e_T ((s_T − m_T) − (s_S − m_S)). mse: a = Σ e_S², st = Σ e_S e_T, tt = Σ e_T².
    a = tl.zeros([BR], tl.float32)
    st = tl.zeros([BR], tl.float32)
    tt = tl.zeros([BR], tl.float32)
    if CHOSEN:
        first, inner, outer, last = chosen_spans(rows, N, window, BC, CAUSAL, WINDOWED, LABELLED)
    else:
        first, inner, outer, last = spans(
            starts, ends, block * BR, N, window, BR, BC, True, CAUSAL, WINDOWED, LABELLED
        )
    for part in tl.static_range(3):
        begin, end = edges(part, first, inner, outer, last)
        for start in tl.range(begin, end, BC, num_stages=None if part == 1 else 1):
            columns = start + tl.arange(0, BC)
            inside, present = columns < N, columns < N
            if part != 1:
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
            # NaN in padding only reaches scores of pairs that do not exist, so the loads need not wait for the labels.
            k_s = load_block(key_s, start, inside, ks_n, BC, DS, BDS, UPCAST, part == 1)
            k_t = load_block(key_t, start, inside, kt_n, BC, DT, BDT, UPCAST, part == 1)
            s = tl.dot(q_s, tl.trans(k_s), input_precision="ieee") * scale_s
            t = tl.dot(q_t, tl.trans(k_t), input_precision="ieee") * scale_t
            if part != 1:
                s = tl.where(present, s, float("-inf"))
                t = tl.where(present, t, float("-inf"))
            new_m_s = tl.maximum(m_s, tl.max(s, 1))
            new_m_t = tl.maximum(m_t, tl.max(t, 1))
            s -= new_m_s[:, None]
            t -= new_m_t[:, None]
            e_s, e_t = tl.exp2(s), tl.exp2(t)
            shrink_s, shrink_t = tl.exp2(m_s - new_m_s), tl.exp2(m_t - new_m_t)
            if DIVERGENCE == KL:
                moved = (m_t - new_m_t) - (m_s - new_m_s)
                entry = e_t * (t - s)
                if part != 1:
                    entry = tl.where(present, entry, 0.0)
                a = shrink_t * (a + l_t * moved) + tl.sum(entry, 1)
            else:
                a = a * shrink_s * shrink_s + tl.sum(e_s * e_s, 1)
                st = st * shrink_s * shrink_t + tl.sum(e_s * e_t, 1)
                tt = tt * shrink_t * shrink_t + tl.sum(e_t * e_t, 1)
            l_s = l_s * shrink_s + tl.sum(e_s, 1)
            l_t = l_t * shrink_t + tl.sum(e_t, 1)
            m_s, m_t = new_m_s, new_m_t

    some = l_s > 0  # in a row without keys everything is 0
    l_s, l_t = tl.where(some, l_s, 1.0), tl.where(some, l_t, 1.0)
    row_log_s, row_log_t = tl.log2(l_s), tl.log2(l_t)
    out = head * count + at
    if DIVERGENCE == KL:
        m_s += row_log_s
        m_t += row_log_t
    tl.store(max_s + out, tl.where(some, m_s, 0.0), mask=at < count)
    tl.store(max_t + out, tl.where(some, m_t, 0.0), mask=at < count)
    if DIVERGENCE == KL:
        loss = (a / l_t - row_log_t + row_log_s) * LN2
    else:
        tl.store(log_s + out, row_log_s, mask=at < count)
        tl.store(log_t + out, row_log_t, mask=at < count)
        own, cross = a / (l_s * l_s), st / (l_s * l_t)
        loss = (own - cross) + (tt / (l_t * l_t) - cross)
        tl.store(slope_mean + out, own - cross, mask=at < count)
    tl.store(partial + head * blocks + block, tl.sum(tl.where(some, loss, 0.0) * weights, 0))


@triton.jit
def load_row(ptr, at, inside, WHOLE: tl.constexpr):
    """Load one value of each row; WHOLE: all rows are inside."""
    if WHOLE:
        return tl.load(ptr + at)
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def load_statistics(
    max_s,
    max_t,
    log_s,
    log_t,
    slope_mean,
    at,
    inside,
    DIVERGENCE: tl.constexpr,
    BR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    m_s = tl.zeros([BR], tl.float32)
    if DIVERGENCE == SCORE_MSE:
        return m_s, m_s, m_s, m_s, m_s
    r = m_s
    m_s = load_row(max_s, at, inside, WHOLE)
    m_t = load_row(max_t, at, inside, WHOLE)
    if DIVERGENCE == KL:
        return m_s, m_t, r, r, r
    row_log_s = load_row(log_s, at, inside, WHOLE)
    row_log_t = load_row(log_t, at, inside, WHOLE)
    r = load_row(slope_mean, at, inside, WHOLE)
    return m_s, m_t, row_log_s, row_log_t, r


@triton.jit
def rows_kernel(
    query_s,
    key_s,
    query_t,
    key_t,
    places,
    row_weights,
    labels,
    starts,
    ends,
    max_s,
    max_t,
    log_s,
    log_t,
    slope_mean,
    partial,  # (B · H · row blocks), only with WITH_LOSS
    coefficient,  # scalar by which the gradient is multiplied before it is rounded
    d_query,  # (B, H, N, D) contiguous, CHOSEN: (B, H, R, D)
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
    R,
    H,
    group_s,
    group_t,
    window,
    scale_s,
    scale_t,
    gradient_scale,
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
    CHOSEN: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
):
    count = R if CHOSEN else N
    blocks = tl.cdiv(count, BR)
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = (program // blocks).to(tl.int64)
    b, h = head // H, head % H
    at = block * BR + tl.arange(0, BR)
    rows, weights = load_places(places + b * R, row_weights + b * R, at, R, N, CHOSEN)
    labels += b * N
    starts += b * N
    ends += b * N
    row_labels, rows_inside = load_labels(labels, rows, N, MASKED, LABELLED)
    q_s = load_tile(query_s + b * qs_b + h * qs_h, at, at < count, qs_n, DS, BDS, UPCAST)
    q_t = load_tile(query_t + b * qt_b + h * qt_h, at, at < count, qt_n, DT, BDT, UPCAST)
    key_s += b * ks_b + h // group_s * ks_h
    key_t += b * kt_b + h // group_t * kt_h
    m_s, m_t, row_log_s, row_log_t, r = load_statistics(
        max_s, max_t, log_s, log_t, slope_mean, head * count + at, at < count, DIVERGENCE, BR, False
    )

    gradient = tl.zeros([BR, BDS], tl.float32)
    loss = tl.zeros([BR], tl.float32)
    if CHOSEN:
        first, inner, outer, last = chosen_spans(rows, N, window, BC, CAUSAL, WINDOWED, LABELLED)
    else:
        first, inner, outer, last = spans(
            starts, ends, block * BR, N, window, BR, BC, True, CAUSAL, WINDOWED, LABELLED
        )
    for part in tl.static_range(3):
        begin, end = edges(part, first, inner, outer, last)
        for start in tl.range(begin, end, BC, num_stages=None if part == 1 else 1):
            columns = start + tl.arange(0, BC)
            columns_inside, present = columns < N, columns < N
            if part != 1:
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
            # Masked keys are loaded as 0, because 0 · NaN would reach dQ.
            k_s = load_block(key_s, start, columns_inside, ks_n, BC, DS, BDS, UPCAST, part == 1)
            k_t = load_block(key_t, start, columns < N, kt_n, BC, DT, BDT, UPCAST, part == 1)
            s = tl.dot(q_s, tl.trans(k_s), input_precision="ieee") * scale_s
            t = tl.dot(q_t, tl.trans(k_t), input_precision="ieee") * scale_t
            value, slope = loss_and_slope(
                s,
                t,
                m_s[:, None],
                m_t[:, None],
                row_log_s[:, None],
                row_log_t[:, None],
                r[:, None],
                present,
                DIVERGENCE,
                part == 1,
            )
            if WITH_LOSS:
                loss += tl.sum(value, 1)
            if WITH_GRADIENT:
                gradient = gradient_product(slope, k_s, key_s.dtype.element_ty, UPCAST, gradient)
    if WITH_LOSS:
        tl.store(partial + head * blocks + block, tl.sum(loss * weights, 0))
    if WITH_GRADIENT:
        gradient *= gradient_scale * tl.load(coefficient)
        if CHOSEN:
            gradient *= weights[:, None]
        store_tile(d_query + head * count * DS, at, at < count, DS, gradient, DS, BDS, UPCAST)


@triton.jit
def columns_kernel(
    query_s,
    key_s,
    query_t,
    key_t,
    places,
    row_weights,
    labels,
    starts,
    ends,
    max_s,
    max_t,
    log_s,
    log_t,
    slope_mean,
    partial,  # (B · H_kv · column blocks), only with WITH_LOSS
    coefficient,
    d_query,  # (B, H, N, D) contiguous float32 zeros, only with MERGED
    d_key,  # (B, H_kv, N, D) contiguous
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
    R,
    H,
    group_s,
    group_t,
    window,
    scale_s,
    scale_t,
    gradient_scale,
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
    CHOSEN: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    MERGED: tl.constexpr,
    WITH_KEY: tl.constexpr,
):
    # Tiles are (columns, rows), so that dSᵀ is the left operand of dK without a transposition.
    blocks = tl.cdiv(N, BC)
    program = tl.program_id(0)
    block = program % blocks
    kv_head = (program // blocks).to(tl.int64)
    kv_heads = H // group_s
    b, kv = kv_head // kv_heads, kv_head % kv_heads
    columns = block * BC + tl.arange(0, BC)
    labels += b * N
    starts += b * N
    ends += b * N
    column_labels, columns_inside = load_labels(labels, columns, N, MASKED, LABELLED)
    k_s = load_tile(key_s + b * ks_b + kv * ks_h, columns, columns_inside, ks_n, DS, BDS, UPCAST)
    factor = gradient_scale * tl.load(coefficient)
    gradient, loss = tl.zeros([BC, BDS], tl.float32), tl.zeros([BC], tl.float32)
    count = R if CHOSEN else N
    if CHOSEN:  # all R queries are walked
        whole = 0 if CAUSAL or WINDOWED or LABELLED else R // BR * BR
        first, inner, outer, last = 0, 0, tl.where(block * BC + BC <= N, whole, 0), R
    else:
        first, inner, outer, last = spans(
            starts, ends, block * BC, N, window, BC, BR, False, CAUSAL, WINDOWED, LABELLED
        )
    for member in range(0, group_s):
        h = kv * group_s + member
        head = b * H + h
        k_t = load_tile(key_t + b * kt_b + h // group_t * kt_h, columns, columns < N, kt_n, DT, BDT, UPCAST)
        head_query_s = query_s + b * qs_b + h * qs_h
        head_query_t = query_t + b * qt_b + h * qt_h
        for part in tl.static_range(3):
            begin, end = edges(part, first, inner, outer, last)
            for start in tl.range(begin, end, BR, num_stages=None if part == 1 else 1):
                at = start + tl.arange(0, BR)
                rows, weights = load_places(places + b * R, row_weights + b * R, at, R, N, CHOSEN)
                rows_inside, present = rows < N, rows < N
                if part != 1:
                    row_labels, rows_inside = load_labels(labels, rows, N, MASKED, LABELLED)
                    present = exists(
                        rows[None, :],
                        columns[:, None],
                        row_labels[None, :],
                        column_labels[:, None],
                        rows_inside[None, :],
                        columns_inside[:, None],
                        window,
                        CAUSAL,
                        WINDOWED,
                        LABELLED,
                    )
                q_s = load_block(head_query_s, start, rows_inside, qs_n, BR, DS, BDS, UPCAST, part == 1)
                q_t = load_block(head_query_t, start, at < count, qt_n, BR, DT, BDT, UPCAST, part == 1)
                m_s, m_t, row_log_s, row_log_t, r = load_statistics(
                    max_s,
                    max_t,
                    log_s,
                    log_t,
                    slope_mean,
                    head * count + at,
                    at < count,
                    DIVERGENCE,
                    BR,
                    part == 1,
                )
                s = tl.dot(k_s, tl.trans(q_s), input_precision="ieee") * scale_s
                t = tl.dot(k_t, tl.trans(q_t), input_precision="ieee") * scale_t
                value, slope = loss_and_slope(
                    s,
                    t,
                    m_s[None, :],
                    m_t[None, :],
                    row_log_s[None, :],
                    row_log_t[None, :],
                    r[None, :],
                    present,
                    DIVERGENCE,
                    part == 1,
                )
                if CHOSEN:
                    value, slope = value * weights[None, :], slope * weights[None, :]
                if WITH_LOSS:
                    loss += tl.sum(value, 1)
                if WITH_KEY:
                    gradient = gradient_product(slope, q_s, query_s.dtype.element_ty, UPCAST, gradient)
                if MERGED:
                    zero = tl.zeros([BR, BDS], tl.float32)
                    part_q = gradient_product(tl.trans(slope), k_s, key_s.dtype.element_ty, UPCAST, zero)
                    add_tile(d_query + head * count * DS, at, at < count, DS, part_q * factor, DS, BDS)
    if WITH_LOSS:
        tl.store(partial + kv_head * blocks + block, tl.sum(loss, 0))
    if WITH_KEY:
        store_tile(d_key + kv_head * N * DS, columns, columns < N, DS, gradient * factor, DS, BDS, UPCAST)
