"""One row of logits on a GPU, in Triton: see `gpu.py`.

A form gives phi and q a for a tile of tokens, where the loss is sum_i phi(p_i, q_i) and
a = dphi / dq, shifted so that equal models have exactly 0, which changes nothing else. The gradient
in the logits over T is q (a - <q, a>).
"""
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# Which names are bound is known where the kernel is compiled, once for each choice of its parts.

import triton
import triton.language as tl

from limbeck.losses import kernels

FAR = tl.constexpr(kernels.FAR)

LOWEST = tl.constexpr(-1e30)
"""Stands for -inf where a difference of two must not be NaN."""


@triton.jit
def forward_kl(logp, logq, share):
    """p log(p / q); a = 1 - p / q, and <q, a> = 0."""
    p = tl.exp(logp)
    return p * (logp - logq), tl.exp(logq) - p


@triton.jit
def reverse_kl(logp, logq, share):
    """q log(q / p); a = log(q / p)."""
    pulled = tl.exp(logq) * (logq - logp)
    return pulled, pulled


@triton.jit
def jensen_shannon(logp, logq, share):
    """share p log(p / m) + (1 - share) q log(q / m); a = (1 - share) log(q / m)."""
    log_ratio = tl.minimum(logq - logp, FAR)
    log_mixture = tl.log(1 + (1 - share) * (tl.exp(log_ratio) - 1))  # log m - log p
    pulled = (1 - share) * tl.exp(logq) * (log_ratio - log_mixture)
    return pulled - share * tl.exp(logp) * log_mixture, pulled


@triton.jit
def skew_forward_kl(logp, logq, share):
    """p log(p / m); a = (1 - share) (m - p) / m."""
    excess = (1 - share) * (tl.exp(tl.minimum(logq - logp, FAR)) - 1)  # m / p - 1
    pulled = (1 - share) * tl.exp(logq) * excess / (1 + excess)
    return -tl.exp(logp) * tl.log(1 + excess), pulled


@triton.jit
def skew_reverse_kl(logp, logq, share):
    """q log(q / m); a = log(q / m) + share (m - q) / m."""
    excess = (1 - share) * (tl.exp(tl.minimum(logp - logq, FAR)) - 1)  # m / q - 1
    q = tl.exp(logq)
    value = -q * tl.log(1 + excess)
    return value, value + share * q * excess / (1 + excess)


@triton.jit
def total_variation(logp, logq, share):
    """|p - q| / 2; a = sign(q - p) / 2."""
    q = tl.exp(logq)
    gap = q - tl.exp(logp)
    sign = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0))
    return tl.abs(gap) * 0.5, q * sign


@triton.jit
def one(place):
    """Write 1 there: the least that shows that kernels can be made."""
    tl.store(place, 1.0)


@triton.jit
def _shaped(of, row, columns, count):
    """A tile of a row's logits after scale and soft cap; -inf from `count` on.

    `of` is what `_Logits` holds. Loads end at the stride, up to which the row's memory goes: where
    that is a round number they are wide ones, whatever the number of tokens.
    """
    place = of.first + row.to(tl.int64) * of.stride + columns
    z = tl.load(place, mask=columns < of.stride, other=0.0).to(tl.float32) * of.scale
    if of.cap is not None:
        z = of.cap * (2 * tl.sigmoid(2 * z / of.cap) - 1)  # cap tanh(z / cap)
    return tl.where(columns < count, z, -float("inf"))


@triton.jit
def _log_normalizer(of, row, count, cool, TILE: tl.constexpr):
    """log sum exp(z / T) over the first `count` columns; `cool` is 1 / T."""
    top = tl.full((TILE,), LOWEST, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for first in range(0, count, TILE):
        z = _shaped(of, row, first + tl.arange(0, TILE), count) * cool
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    highest = tl.max(top)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest)))


# Rows of [losses, rows] begin anywhere: they are not worth a kernel for each way to be aligned.
@triton.jit(do_not_specialize_on_alignment=["pulls", "values", "label_pulls", "label_values"])
def row_of(
    student,
    teacher,
    known,
    labels,
    pulls,
    values,
    label_pulls,
    label_values,
    vocabulary,
    width,
    cool,
    slope,
    share,
    FORM: tl.constexpr,
    CENTRED: tl.constexpr,
    ALIKE: tl.constexpr,
    TILE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """All losses of one row; the gradient takes the place of its logits.

    ALIKE: one normalizer serves both losses, as where T = 1 and all tokens are compared.
    """
    row = tl.program_id(0)
    lanes = tl.arange(0, TILE)
    if labels is not None:
        label = tl.load(labels + row)
        labelled = label >= 0
        label_pull = tl.where(labelled, tl.load(label_pulls + row), 0.0)
        whole = _log_normalizer(student, row, vocabulary, 1.0, TILE)
        here = tl.where(labelled, label, 0) + tl.zeros((1,), tl.int64)
        chosen = tl.sum(_shaped(student, row, here, vocabulary))
        tl.store(label_values + row, tl.where(labelled, whole - chosen, 0.0))
    if FORM is not None or known is not None:
        pull = tl.load(pulls + row) * slope
        value = tl.zeros((TILE,), tl.float32)
        mine = whole if ALIKE else _log_normalizer(student, row, width, cool, TILE)
    if known is not None:
        places = tl.arange(0, PLACES)
        inside = places < known.places
        ids = tl.load(known.ids + row * known.places + places, mask=inside, other=0)
        there = (ids >= 0) & (ids < vocabulary)
        inside = inside & there
        mass = tl.load(known.mass + row * known.places + places, mask=inside, other=0.0)
        total = tl.sum(mass)
        # Before the gradient takes its place.
        z_known = _shaped(student, row, tl.where(there, ids, 0), vocabulary)
        crossed = -tl.sum(tl.where(mass > 0, mass * (z_known * cool - mine), 0.0))
        tl.store(values + row, tl.where(tl.min(there.to(tl.int32)) == 1, crossed, float("nan")))
    if FORM is not None:
        theirs = _log_normalizer(teacher, row, width, cool, TILE)
        if CENTRED:
            pulled = tl.zeros((TILE,), tl.float32)
            for first in range(0, width, TILE):
                columns = first + lanes
                logq = _shaped(student, row, columns, width) * cool - mine
                logp = _shaped(teacher, row, columns, width) * cool - theirs
                loss, pulling = FORM(logp, logq, share)
                value += tl.where(columns < width, loss, 0.0)
                pulled += tl.where(columns < width, pulling, 0.0)
            centre = tl.sum(pulled)
    for first in range(0, vocabulary, TILE):
        columns = first + lanes
        z = _shaped(student, row, columns, vocabulary)
        gradient = tl.zeros((TILE,), tl.float32)
        if FORM is not None:
            logq = z * cool - mine
            logp = _shaped(teacher, row, columns, width) * cool - theirs
            loss, pulling = FORM(logp, logq, share)
            if CENTRED:
                pulling -= tl.exp(logq) * centre
            else:
                value += tl.where(columns < width, loss, 0.0)
            gradient += tl.where(columns < width, pulling, 0.0) * pull
        if known is not None:
            gradient += total * tl.exp(z * cool - mine) * pull
        if labels is not None:
            gradient += label_pull * (tl.exp(z - whole) - tl.where(columns == label, 1.0, 0.0))
        _store(student, row, columns, z, gradient, columns < student.stride)
    if FORM is not None:
        tl.store(values + row, tl.sum(value))
    if known is not None:
        tl.debug_barrier()  # all of the row is written; now what is known of it, once more
        gradient = (total * tl.exp(z_known * cool - mine) - mass) * pull
        if labels is not None:
            gradient += label_pull * (tl.exp(z_known - whole) - tl.where(ids == label, 1.0, 0.0))
        _store(student, row, ids, z_known, gradient, mass > 0)


@triton.jit
def _store(of, row, columns, z, gradient, where):
    """The gradient to logits before scale and cap, from that to `z`, behind them."""
    if of.cap is not None:
        gradient *= 1 - (z / of.cap) * (z / of.cap)
    place = of.first + row.to(tl.int64) * of.stride + columns
    tl.store(place, gradient * of.scale, mask=where)
