"""The Triton kernels of :mod:`smalt.kernels.policy_loss`, which has the formulas: loss, statistics and gradient, and the sums of
each sequence's log-ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import cdiv, configuration, constexpr, jit, launch, tl

_NUM_SUMS, _NUM_PARTS = constexpr(10), constexpr(12)  # the loss, the metrics; the last two are extremes


@jit
def _k3(x):
    """exp(x) - 1 - x; near 0, where that difference has no digits left, by its series."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@jit
def _load(pointer, t, inside, counts):
    # All loads are under way before it is known which tokens count.
    return tl.where(counts, tl.load(pointer + t, mask=inside, other=0.0).to(tl.float32), 0.0)


# Even a pack of 32k tokens is under 1 MB, so that the launch is what it costs.
@jit(varying=("num_tokens", "num_sequences"))
def _kernel(
    logprob, old_logprob, advantage, weight, provenance, reference_logprob, rollout_logprob, sequence_index, sequence_log_ratio,
    gradient, partial, num_tokens, num_sequences, low, high, dual, kl_coefficient, cap, BLOCK: tl.constexpr,
    PROVENANCE: tl.constexpr, ESTIMATOR: tl.constexpr, TIS: tl.constexpr, SEQUENCE: tl.constexpr, CISPO: tl.constexpr,
    DUAL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    w = tl.load(weight + t, mask=inside, other=0.0).to(tl.float32)
    counts = w != 0.0
    if PROVENANCE:
        counts = counts & (tl.load(provenance + t, mask=inside, other=0) == 0)
    w = tl.where(counts, w, 0.0)
    lp, old = _load(logprob, t, inside, counts), _load(old_logprob, t, inside, counts)
    A = _load(advantage, t, inside, counts)
    log_ratio = lp - old
    kl_old = _k3(log_ratio)
    if SEQUENCE:
        index = tl.load(sequence_index + t, mask=inside, other=0).to(tl.int64)
        known = (index >= 0) & (index < num_sequences)
        log_ratio = tl.load(sequence_log_ratio + index, mask=counts & known, other=0.0).to(tl.float32)
        # Both are NaN where a token is of no sequence, for a NaN ratio alone is clipped to a number.
        lost = counts & (known == 0)
        log_ratio, w = tl.where(lost, float("nan"), log_ratio), tl.where(lost, float("nan"), w)
    r = tl.exp(log_ratio)
    clipped = tl.minimum(tl.maximum(r, low), high)
    held = counts & False
    if CISPO:
        slope = clipped * A
        term = slope * lp
        at_low, at_high = r < low, r > high
    else:
        over = r * A > clipped * A
        term = tl.where(over, clipped * A, r * A)
        at_low, at_high = over & (A < 0.0), over & (A > 0.0)
        slope = tl.where(over, 0.0, r * A)
        if DUAL:
            held = (A < 0.0) & (term < dual * A)
            slope = tl.where(held, 0.0, slope)
            term = tl.where(held, dual * A, term)
    tis = tl.where(counts, 1.0, 0.0)
    truncated = counts & False
    if TIS:
        tis = tl.exp(old - _load(rollout_logprob, t, inside, counts))
        truncated = tis > cap
        tis = tl.minimum(tis, cap)
    kl = tl.zeros([BLOCK], tl.float32)
    kl_slope = kl
    if ESTIMATOR >= 0:
        d = lp - _load(reference_logprob, t, inside, counts)
        if ESTIMATOR == 0:
            kl, kl_slope = d, tl.where(counts, 1.0, 0.0)
        elif ESTIMATOR == 1:
            kl, kl_slope = 0.5 * d * d, d
        else:
            kl = _k3(-d)
            kl_slope = d - kl
    tl.store(gradient + t, w * (kl_coefficient * kl_slope - tis * slope), mask=inside)
    row = partial + tl.program_id(0).to(tl.int64) * _NUM_PARTS
    tl.store(row, tl.sum(w * (kl_coefficient * kl - tis * term)))
    tl.store(row + 1, tl.sum(tl.where(counts, 1.0, 0.0)))
    tl.store(row + 2, tl.sum(tl.where(counts & at_low, 1.0, 0.0)))
    tl.store(row + 3, tl.sum(tl.where(counts & at_high, 1.0, 0.0)))
    tl.store(row + 4, tl.sum(tl.where(counts & held, 1.0, 0.0)))
    tl.store(row + 5, tl.sum(kl_old))
    tl.store(row + 6, tl.sum(kl))
    tl.store(row + 7, tl.sum(tl.where(counts, r, 0.0)))
    tl.store(row + 8, tl.sum(tl.where(counts & truncated, 1.0, 0.0)))
    tl.store(row + 9, tl.sum(tl.where(counts, tis, 0.0)))
    tl.store(row + 10, tl.max(tl.where(counts, r, -float("inf"))))
    tl.store(row + 11, tl.max(tl.where(counts, -r, -float("inf"))))


@jit(varying=("num_programs",))
def _sums_kernel(partial, loss, metrics, num_programs, BLOCK_P: tl.constexpr):
    """Adds up the parts of all programs in their order, and takes the largest of the last two."""
    column = tl.arange(0, 16)
    total = tl.zeros([16], tl.float32)
    largest = tl.full([16], -float("inf"), tl.float32)
    for first in range(0, num_programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < num_programs)[:, None] & (column < _NUM_PARTS)[None, :]
        parts = tl.load(partial + p.to(tl.int64)[:, None] * _NUM_PARTS + column[None, :], mask=inside, other=0.0)
        total += tl.sum(parts, axis=0)
        largest = tl.maximum(largest, tl.max(tl.where(inside, parts, -float("inf")), axis=0))
    out = tl.where(column < _NUM_SUMS, total, tl.where(column == _NUM_SUMS, largest, -largest))
    tl.store(loss, tl.sum(tl.where(column == 0, total, 0.0)))
    tl.store(metrics + column - 1, out, mask=(column > 0) & (column < _NUM_PARTS))


# A program owns a sequence and walks through it from its first token, so that its sum does not depend on where it stands.
@jit
def _sequence_kernel(logprob, old_logprob, weight, provenance, bounds, sums, counts, BLOCK: tl.constexpr, PROVENANCE: tl.constexpr):
    begin, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
    total, number = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        inside = t < end
        counted = tl.load(weight + t, mask=inside, other=0.0) != 0.0
        if PROVENANCE:
            counted = counted & (tl.load(provenance + t, mask=inside, other=0) == 0)
        total += _load(logprob, t, inside, counted) - _load(old_logprob, t, inside, counted)
        number += tl.where(counted, 1.0, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total))
    tl.store(counts + tl.program_id(0), tl.sum(number))


def launch_policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, provenance: Tensor | None,
    reference_logprob: Tensor | None, rollout_logprob: Tensor | None, sequence_index: Tensor | None,
    sequence_log_ratio: Tensor | None, cispo: bool, estimator: int, numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, metrics [11] and d loss / d logprob [T], all fp32. numbers: low, high, dual (0: none), KL coefficient, cap."""
    T, config = logprob.shape[0], configuration("policy_loss", 1, logprob)
    programs = cdiv(T, config.tiles["BLOCK"])
    shapes: tuple[tuple[int, ...], ...] = (T,), (programs, 12), (), (11,)
    gradient, partial, loss, metrics = (logprob.new_empty(shape, dtype=torch.float32) for shape in shapes)
    optional = [
        weight if x is None else x for x in (provenance, reference_logprob, rollout_logprob, sequence_index, sequence_log_ratio)
    ]
    launch(
        "policy_loss", _kernel, (programs,), logprob, old_logprob, advantage, weight, *optional, gradient, partial, T,
        0 if sequence_log_ratio is None else sequence_log_ratio.shape[0], *numbers,
        config=config, PROVENANCE=provenance is not None, ESTIMATOR=-1 if reference_logprob is None else estimator,
        TIS=rollout_logprob is not None, SEQUENCE=sequence_index is not None, CISPO=cispo, DUAL=numbers[2] > 0,
    )  # fmt: skip
    config = configuration("policy_loss_sums", 1, partial)
    launch("policy_loss_sums", _sums_kernel, (1,), partial, loss, metrics, programs, config=config)
    return loss, metrics, gradient


def launch_sequence_log_ratio(
    logprob: Tensor, old_logprob: Tensor, weight: Tensor, provenance: Tensor | None, sequence_index: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """Sums and counts of each sequence, fp32 [S]. Inputs contiguous."""
    sequences = torch.arange(num_sequences + 1, device=logprob.device, dtype=sequence_index.dtype)
    bounds = torch.searchsorted(sequence_index, sequences)
    sums, counts = (logprob.new_empty(num_sequences, dtype=torch.float32) for _ in range(2))
    launch(
        "sequence_log_ratio", _sequence_kernel, (num_sequences,), logprob, old_logprob, weight,
        weight if provenance is None else provenance, bounds, sums, counts,
        config=configuration("sequence_log_ratio", 1, logprob), PROVENANCE=provenance is not None,
    )  # fmt: skip
    return sums, counts
