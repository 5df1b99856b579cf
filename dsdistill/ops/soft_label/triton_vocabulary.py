"""Compute losses over a vocabulary for a block of tokens: values and gradients at the logits, by sweeps over entries.

A program owns some tokens and walks their entries in blocks. The formulas are those of `divergence.py` and of
cross-entropy. The sweeps are:
  1  online: largest logit and Σ exp(z − largest), for the task, and for student and teacher at temperature τ
  2  values; also the gradient if sweep 1 is enough for it (task, forward_kl)
  3  gradient of the other divergences, G − q Σ G; sweep 2 has found Σ G
Each sweep reads the logits once, as products of the hidden states with the heads; bias and soft cap are applied here.
The gradient is written once, and nothing else of the size of the vocabulary is written.
"""

import triton
import triton.language as tl

from dsdistill.ops.soft_label.divergence import FUSED
from dsdistill.ops.triton_common import narrow

FORWARD_KL = tl.constexpr(FUSED.index("forward_kl"))
REVERSE_KL = tl.constexpr(FUSED.index("reverse_kl"))
JSD = tl.constexpr(FUSED.index("jsd"))
TVD = tl.constexpr(FUSED.index("tvd"))
# The start of a running maximum. It is finite so that its difference to itself is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def finished(z, bias, within, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """Return the logits of products z. bias: pointers; within: a mask; both broadcast to the shape of z."""
    if BIASED:
        z += tl.load(bias, mask=within, other=0.0).to(tl.float32)
    if CAPPED:  # c tanh(z / c); the bound keeps the exponential finite and changes nothing
        z = cap * (1.0 - 2.0 / (1.0 + tl.exp(tl.minimum(z * (2.0 / cap), 80.0))))
    return z


@triton.jit
def load_logits(products, bias, columns, there, count, cap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """Load (BT, BV) logits, and which exist. products: (BT, 1) pointers to the tokens' rows of `count` entries."""
    within = (columns < count)[None, :]
    inside = there[:, None] & within
    z = tl.load(products + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return finished(z, bias + columns[None, :], within, cap, BIASED, CAPPED), inside


@triton.jit
def carry_on(largest, total, x):
    """Update each row's largest value and Σ exp(x − largest) with one more block of entries; −∞ adds nothing."""
    higher = tl.maximum(largest, tl.max(x, 1))
    total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
    return higher, total


@triton.jit
def log_probability(x, largest, log_total):
    """Return the log softmax, (BT, BV). The bound changes no existing entry and keeps other exponentials finite."""
    return tl.minimum((x - largest[:, None]) - log_total[:, None], 0.0)


@triton.jit
def divergence_entries(log_p, log_q, share, log_share, log_rest, DIVERGENCE: tl.constexpr):
    """Return the divergence's summands, and G: the gradient at log q; for forward_kl that at the logit, q − p."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == FORWARD_KL:
        value, slope = p * (log_p - log_q), q - p
    elif DIVERGENCE == REVERSE_KL:
        value = q * (log_q - log_p)
        slope = value
    elif DIVERGENCE == TVD:
        difference = q - p
        value = 0.5 * tl.abs(difference)
        slope = 0.5 * tl.where(difference > 0, q, tl.where(difference < 0, -q, 0.0))
    else:
        a, b = log_p + log_share, log_q + log_rest
        high = tl.maximum(a, b)
        log_m = high + tl.log(1.0 + tl.exp(tl.minimum(a, b) - high))
        if DIVERGENCE == JSD:
            slope = (1.0 - share) * q * (log_q - log_m)
            value = share * p * (log_p - log_m) + slope
        else:  # p q / m is the exp of a difference of logarithms: finite for any small m
            value = p * (log_p - log_m)
            slope = (share - 1.0) * tl.exp(log_p + log_q - log_m)
    return value, slope


@triton.jit
def vocabulary_kernel(
    student,  # (T, V) float32 products of the student's hidden states with its head, rows s_n apart
    teacher,  # (T, C) float32, the same of the teacher, rows t_n apart, only with SOFT
    student_bias,  # (V), only with BIASED_S
    teacher_bias,  # (C), only with BIASED_T
    labels,  # (T) int64 in [0, V), only with TASK
    weights,  # (2) float32, factors of task and soft labels in the gradient
    values,  # (T, 2) float32: task and soft labels of each token
    gradient,  # (T, V) at the products, rows g_n apart, only with WITH_GRADIENT; may be the memory of `student`
    s_n,
    t_n,
    g_n,
    T,
    V,
    C,
    inverse_temperature,
    student_cap,
    teacher_cap,
    smoothing,
    share,  # of the teacher in the mixture of jsd and skew_kl
    log_share,
    log_rest,
    BT: tl.constexpr,
    BV: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TASK: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BIASED_S: tl.constexpr,
    BIASED_T: tl.constexpr,
    CAPPED_S: tl.constexpr,
    CAPPED_T: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    there = tokens < T
    wide = tokens.to(tl.int64)[:, None]
    student += wide * s_n
    teacher += wide * t_n
    gradient += wide * g_n
    label = tl.zeros([BT], tl.int32)
    own = tl.zeros([BT], tl.float32)  # the label's logit
    if TASK:
        label = tl.load(labels + tokens, mask=there, other=0).to(tl.int32)
        place = label[:, None]
        logit = tl.load(student + place, mask=there[:, None], other=0.0).to(tl.float32)
        logit = finished(logit, student_bias + place, there[:, None], student_cap, BIASED_S, CAPPED_S)
        own = tl.sum(logit, 1)

    m = tl.full([BT], LOWEST, tl.float32)
    m_s = tl.full([BT], LOWEST, tl.float32)
    m_t = tl.full([BT], LOWEST, tl.float32)
    sum_z = tl.zeros([BT], tl.float32)
    sum_s = tl.zeros([BT], tl.float32)
    sum_t = tl.zeros([BT], tl.float32)
    for start in range(0, V, BV):
        columns = start + tl.arange(0, BV)
        z, inside = load_logits(student, student_bias, columns, there, V, student_cap, BIASED_S, CAPPED_S)
        if TASK:
            m, sum_z = carry_on(m, sum_z, tl.where(inside, z, float("-inf")))
        if SOFT:
            y, common = load_logits(teacher, teacher_bias, columns, there, C, teacher_cap, BIASED_T, CAPPED_T)
            m_s, sum_s = carry_on(m_s, sum_s, tl.where(common, z * inverse_temperature, float("-inf")))
            m_t, sum_t = carry_on(m_t, sum_t, tl.where(common, y * inverse_temperature, float("-inf")))
    log_z = tl.log(tl.where(sum_z > 0, sum_z, 1.0))
    log_s = tl.log(tl.where(sum_s > 0, sum_s, 1.0))
    log_t = tl.log(tl.where(sum_t > 0, sum_t, 1.0))

    w_task = tl.load(weights)
    w_soft = tl.load(weights + 1) * inverse_temperature
    soft = tl.zeros([BT], tl.float32)
    slopes = tl.zeros([BT], tl.float32)  # Σ G
    missed = tl.zeros([BT], tl.float32)  # Σ (m − z)
    AT_ONCE: tl.constexpr = WITH_GRADIENT and ((not SOFT) or (DIVERGENCE == FORWARD_KL))
    if SOFT or SMOOTHED or WITH_GRADIENT:
        for start in range(0, V, BV):
            columns = start + tl.arange(0, BV)
            z, inside = load_logits(student, student_bias, columns, there, V, student_cap, BIASED_S, CAPPED_S)
            if SMOOTHED:
                missed += tl.sum(tl.where(inside, m[:, None] - z, 0.0), 1)
            at_logits = tl.zeros([BT, BV], tl.float32)
            if SOFT:
                y, common = load_logits(
                    teacher, teacher_bias, columns, there, C, teacher_cap, BIASED_T, CAPPED_T
                )
                log_q = log_probability(z * inverse_temperature, m_s, log_s)
                log_p = log_probability(y * inverse_temperature, m_t, log_t)
                value, slope = divergence_entries(log_p, log_q, share, log_share, log_rest, DIVERGENCE)
                soft += tl.sum(tl.where(common, value, 0.0), 1)
                slope = tl.where(common, slope, 0.0)
                slopes += tl.sum(slope, 1)
                at_logits = w_soft * slope
            if AT_ONCE:
                if TASK:
                    at_logits += w_task * task_slope(z, m, log_z, columns, label, smoothing, V)
                if CAPPED_S:
                    at_logits *= 1.0 - (z / student_cap) * (z / student_cap)
                out = narrow(at_logits, gradient.dtype.element_ty, UPCAST)
                tl.store(gradient + columns[None, :], out, mask=inside)
    if WITH_GRADIENT and not AT_ONCE:
        for start in range(0, V, BV):
            columns = start + tl.arange(0, BV)
            z, inside = load_logits(student, student_bias, columns, there, V, student_cap, BIASED_S, CAPPED_S)
            y, common = load_logits(teacher, teacher_bias, columns, there, C, teacher_cap, BIASED_T, CAPPED_T)
            log_q = log_probability(z * inverse_temperature, m_s, log_s)
            log_p = log_probability(y * inverse_temperature, m_t, log_t)
            value, slope = divergence_entries(log_p, log_q, share, log_share, log_rest, DIVERGENCE)
            at_logits = w_soft * tl.where(common, slope - tl.exp(log_q) * slopes[:, None], 0.0)
            if TASK:
                at_logits += w_task * task_slope(z, m, log_z, columns, label, smoothing, V)
            if CAPPED_S:
                at_logits *= 1.0 - (z / student_cap) * (z / student_cap)
            out = narrow(at_logits, gradient.dtype.element_ty, UPCAST)
            tl.store(gradient + columns[None, :], out, mask=inside)

    task = tl.zeros([BT], tl.float32)
    if TASK:  # from the log softmax, whose largest entry is 0 before log Σ is subtracted
        task = log_z + (1.0 - smoothing) * (m - own) + smoothing * (missed / V)
    tl.store(values + tokens * 2, task, mask=there)
    tl.store(values + tokens * 2 + 1, soft, mask=there)


@triton.jit
def task_slope(z, m, log_z, columns, label, smoothing, V):
    """Return the gradient of cross-entropy at the logits, softmax − t. t is ε/V everywhere, plus 1 − ε at the label."""
    target = tl.where(columns[None, :] == label[:, None], 1.0 - smoothing, 0.0) + smoothing / V
    return tl.exp(log_probability(z, m, log_z)) - target
