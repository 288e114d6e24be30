"""The policy loss of GRPO and its kin over packed tokens, its statistics and its gradient in one pass.

    loss = sum_t weight[t] (kl_coefficient kl[t] - tis[t] term[t])

    r[t]    = exp(logprob - old_logprob) of the token (GRPO, DAPO, Dr.GRPO, CISPO), or of its sequence s (GSPO):
              sg[exp(mean_s(logprob - old_logprob))] exp(logprob) / sg[exp(logprob)]
    term[t] = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and not below dual_clip A where A < 0       surrogate "clip"
              sg[clip(r, 1 - clip_low, 1 + clip_high)] A logprob                                            surrogate "cispo"
    kl[t]   = k1, k2 or k3 of d = logprob - reference_logprob:  d,  d^2 / 2,  exp(-d) - 1 + d
    tis[t]  = sg[min(exp(old_logprob - rollout_logprob), tis_cap)]

sg stops the gradient; A is the advantage. Sources: GRPO arXiv 2402.03300 eq. 3 and 4; DAPO 2503.14476 eq. 8; Dr.GRPO 2503.20783
section 3.2; GSPO 2507.18071 eq. 5 to 7, in the form of eq. 13 and 14, whose gradient is the same where A is constant in a sequence
and which is exact where a sequence is shared by ranks; CISPO 2506.13585 eq. 4 and 5; dual clip 1912.09729; estimators Schulman
2020 (joschu.net/blog/kl-approx.html); truncated importance sampling Yao et al. 2025 (fengyao.notion.site/off-policy-rl).

A token counts where its weight is not 0 and it was sampled. Forced tokens, prompts and padding leave loss, ratios, KL and
statistics, whatever numbers stand there. How losses are averaged is in the weights. On any mesh of ranks they are, exactly:

    tokens = sequence_tokens(...)                              added up over ranks that hold parts of the same sequences
    denominator = loss_denominator(aggregation, tokens, ...)   added up over ranks that hold different sequences
    weight = token_weights(aggregation, ..., tokens, denominator)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import current_backend, is_abstract
from .policy_loss_kernels import launch_policy_loss, launch_sequence_log_ratio

SAMPLED, FORCED = 0, 1
AGGREGATIONS = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm")
ESTIMATORS = ("k1", "k2", "k3")
_PAPERS: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coefficient": 0.04, "aggregation": "sequence_mean_token_mean"},
    "dapo": {"clip_high": 0.28, "aggregation": "token_mean"},
    "dr_grpo": {"aggregation": "sequence_mean_token_sum_norm"},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean_token_mean"},
    # The paper bounds from above only and states no value.
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
}


@dataclass(frozen=True)
class PolicyLossOptions:
    """What a policy loss is. Raises ValueError for what makes no sense; :meth:`of` gives the losses of the papers.

    surrogate: "clip" or "cispo". ratio: "token" or "sequence". clip_low, clip_high: the ratio is held in [1 - low, 1 + high].
    dual_clip: bound of the ratio where the advantage is negative, above 1 (3 is common), or None. kl_estimator: of ESTIMATORS.
    tis_cap: largest truncated importance weight, or None. aggregation: of AGGREGATIONS, for the weights.
    """

    surrogate: str = "clip"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    tis_cap: float | None = None
    aggregation: str = "token_mean"

    @classmethod
    def of(cls, loss: str, **changes: Any) -> PolicyLossOptions:
        """The options of "grpo", "dapo", "dr_grpo", "gspo" or "cispo" as published, with changes."""
        if loss not in _PAPERS:
            raise ValueError(f"unknown policy loss {loss!r}; choose one of {', '.join(_PAPERS)}")
        return cls(**{**_PAPERS[loss], **changes})

    def __post_init__(self) -> None:
        choices = {
            "surrogate": ("clip", "cispo"),
            "ratio": ("token", "sequence"),
            "kl_estimator": ESTIMATORS,
            "aggregation": AGGREGATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"PolicyLossOptions: {name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"PolicyLossOptions: clip_low {self.clip_low} is not in [0, 1] or clip_high {self.clip_high} not >= 0")
        if self.dual_clip is not None and not (self.dual_clip > 1 and self.surrogate == "clip"):
            raise ValueError(f'PolicyLossOptions: dual_clip {self.dual_clip} must be above 1, and needs surrogate "clip"')
        if not (self.kl_coefficient >= 0 and (self.tis_cap is None or self.tis_cap > 0)):
            raise ValueError(f"PolicyLossOptions: kl_coefficient {self.kl_coefficient} must be >= 0 and tis_cap {self.tis_cap} > 0")


class PolicyMetrics(NamedTuple):
    """Statistics over the tokens that count, each a tensor without dims. All are sums that ranks add, but for the last two."""

    tokens: Tensor  # how many count
    clipped_low: Tensor  # tokens whose ratio is held at the lower bound (of "clip": and whose gradient is lost by it)
    clipped_high: Tensor  # at the upper
    dual_clipped: Tensor  # tokens held by dual_clip
    kl_old: Tensor  # KL(old, policy) by k3: r - 1 - log r, with the ratio of the token
    kl_reference: Tensor  # KL(policy, reference) by the estimator of the options
    ratio: Tensor
    tis_truncated: Tensor  # tokens whose importance weight is over tis_cap
    tis_weight: Tensor  # importance weights, truncated
    ratio_max: Tensor  # ranks take the maximum; -inf where no token counts
    ratio_min: Tensor  # ranks take the minimum; +inf where no token counts


def policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, options: PolicyLossOptions, *,
    provenance: Tensor | None = None, reference_logprob: Tensor | None = None, rollout_logprob: Tensor | None = None,
    sequence_index: Tensor | None = None, sequence_log_ratio: Tensor | None = None,
) -> tuple[Tensor, PolicyMetrics]:  # fmt: skip
    """The loss of this rank's tokens, differentiable in logprob alone, and its statistics.

    logprob: [T] in nats; old_logprob, advantage, reference_logprob, rollout_logprob: [T]; all of any float dtype. weight: float [T],
    from :func:`token_weights`; the losses of all ranks add up to that of the batch. provenance: bool or integer [T], SAMPLED or
    FORCED. With ratio "sequence" also sequence_index: int [T], in [0, S) where a token counts, and sequence_log_ratio: float [S]:
    of each sequence the mean of logprob - old_logprob over its tokens that count, from :func:`sequence_log_ratio_sums`. Returns the
    loss in fp32 (fp64 for fp64). On a GPU a token that counts and is of no sequence makes the loss and its own gradient NaN.
    Raises ValueError where a shape does not fit, or an input is missing that the options need or given that they do not use; on a
    CPU also for a token that counts and is of no sequence.
    """
    tokens = {
        "logprob": logprob, "old_logprob": old_logprob, "advantage": advantage, "weight": weight, "provenance": provenance,
        "reference_logprob": reference_logprob, "rollout_logprob": rollout_logprob, "sequence_index": sequence_index,
    }  # fmt: skip
    _check_shapes("policy_loss", tokens)
    if options.kl_coefficient and reference_logprob is None:
        raise ValueError(f"policy_loss: kl_coefficient {options.kl_coefficient} needs reference_logprob")
    if (options.tis_cap is None) != (rollout_logprob is None):
        raise ValueError(f"policy_loss: rollout_logprob and tis_cap go together; tis_cap is {options.tis_cap}")
    by_sequence = options.ratio == "sequence"
    if (sequence_index is None) is by_sequence or (sequence_log_ratio is None) is by_sequence:
        raise ValueError(f'policy_loss: sequence_index and sequence_log_ratio go with ratio "sequence"; ratio is "{options.ratio}"')
    if sequence_index is not None and sequence_log_ratio is not None:
        _check_range("policy_loss", sequence_index, sequence_log_ratio.shape[0], weight, provenance)
    optional = provenance, reference_logprob, rollout_logprob, sequence_index, sequence_log_ratio
    if current_backend(logprob) in ("torch", "reference"):
        return policy_loss_reference(logprob, old_logprob, advantage, weight, options, *optional)
    o = options
    numbers = [1 - o.clip_low, 1 + o.clip_high, o.dual_clip or 0.0, o.kl_coefficient, o.tis_cap or 0.0]
    estimator = ESTIMATORS.index(o.kl_estimator)
    loss, metrics, _ = _policy_loss(logprob, old_logprob, advantage, weight, *optional, o.surrogate == "cispo", estimator, numbers)
    return loss, PolicyMetrics(*metrics.unbind())


def policy_loss_reference(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, options: PolicyLossOptions, provenance: Tensor | None,
    reference_logprob: Tensor | None, rollout_logprob: Tensor | None, sequence_index: Tensor | None, sequence_log_ratio: Tensor | None,
) -> tuple[Tensor, PolicyMetrics]:  # fmt: skip
    """The definition, whose gradient is autograd's; elementwise, so that it is also what a CPU runs."""
    wide = torch.promote_types(logprob.dtype, torch.float32)
    counts = counted(weight, provenance)

    def take(x: Tensor, detach: bool = True) -> Tensor:
        return torch.where(counts, (x.detach() if detach else x).to(wide), 0)

    lp, old, A, w = take(logprob, detach=False), take(old_logprob), take(advantage), take(weight)
    log_ratio = lp - old
    if sequence_log_ratio is not None and sequence_index is not None:
        index, S = sequence_index.long(), sequence_log_ratio.shape[0]
        # The last of these is for tokens of no sequence.
        means = torch.nn.functional.pad(sequence_log_ratio.detach().to(wide), (0, 1), value=math.nan)
        log_ratio = take(means[torch.where((index >= 0) & (index < S), index, S)]) + (lp - lp.detach())
    r = log_ratio.exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    clipped = r.clamp(low, high)
    if options.surrogate == "cispo":
        term = clipped.detach() * A * lp
        at_low, at_high, held = r < low, r > high, torch.zeros_like(counts)
    else:
        over = r * A > clipped * A
        term = torch.where(over, clipped.detach() * A, r * A)
        at_low, at_high = over & (A < 0), over & (A > 0)
        floor = A * (options.dual_clip or math.inf)
        held = (A < 0) & (term < floor)
        term = torch.where(held, floor, term)
    kl = torch.zeros_like(lp)
    if reference_logprob is not None:
        d = lp - take(reference_logprob)
        kl = {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[options.kl_estimator]()
    tis, truncated = torch.ones_like(lp), torch.zeros_like(counts)
    if rollout_logprob is not None and options.tis_cap is not None:
        tis = (old - take(rollout_logprob)).exp()
        truncated, tis = tis > options.tis_cap, tis.clamp(max=options.tis_cap)
    loss = (w * (options.kl_coefficient * kl - tis * term)).sum()
    with torch.no_grad():
        kl_old = torch.expm1(lp - old) - (lp - old)
        terms = (counts, at_low, at_high, held, kl_old, kl, r, truncated, tis)
        sums = [torch.where(counts, x, 0).sum().to(wide) for x in terms]
        nothing = r.new_full((1,), math.inf)
        largest = torch.cat([torch.where(counts, r, -math.inf), -nothing]).amax()
        smallest = torch.cat([torch.where(counts, r, math.inf), nothing]).amin()
    return loss, PolicyMetrics(*sums, largest, smallest)  # type: ignore[call-arg]


def counted(weight: Tensor, provenance: Tensor | None) -> Tensor:
    """bool [T]: which tokens count."""
    return weight != 0 if provenance is None else (weight != 0) & (provenance == SAMPLED)


def sequence_tokens(mask: Tensor, provenance: Tensor | None, sequence_index: Tensor, num_sequences: int) -> Tensor:
    """int64 [S]: how many tokens of each sequence count. Arguments as in :func:`token_weights`; sequence_index never falls.

    Raises ValueError where it does, on a CPU.
    """
    _check_order("sequence_tokens", sequence_index)
    before = torch.nn.functional.pad(counted(mask, provenance).long().cumsum(0), (1, 0))
    sequences = torch.arange(num_sequences + 1, device=mask.device, dtype=sequence_index.dtype)
    return before[torch.searchsorted(sequence_index, sequences)].diff()


def loss_denominator(aggregation: str, tokens: Tensor, max_tokens: int | None = None) -> Tensor:
    """int64, without dims: this rank's share of what the loss is divided by, from the counts of its whole sequences [S].

    "token_mean": tokens that count. "sequence_mean_...": sequences in which any does; with "_norm" times max_tokens, the constant
    length by which Dr.GRPO divides. (A plain sum over tokens is "token_mean" with a denominator of 1.) Raises ValueError for an
    unknown aggregation, or without the max_tokens that it needs.
    """
    _check_aggregation(aggregation)
    if (max_tokens is None) is aggregation.endswith("_norm"):
        raise ValueError(f'loss_denominator: max_tokens goes with "sequence_mean_token_sum_norm"; {aggregation!r}, {max_tokens=}')
    return tokens.sum() if aggregation == "token_mean" else (tokens > 0).sum() * (1 if max_tokens is None else max_tokens)


def token_weights(
    aggregation: str, mask: Tensor, provenance: Tensor | None, sequence_index: Tensor, tokens: Tensor, denominator: Tensor | float
) -> Tensor:
    """The weight of each token, fp32 [T] (fp64 for an fp64 mask), such that the loss of the batch is a sum over all ranks.

    mask: bool or float [T], by which a token's share is multiplied; provenance: [T], SAMPLED or FORCED; sequence_index: int [T];
    tokens: [S], counts over all ranks; denominator: over all ranks. Tokens that do not count get 0, whatever the denominator.
    Raises ValueError for an unknown aggregation, and on a CPU where the counts are needed for a token that counts and is of no
    sequence.
    """
    _check_aggregation(aggregation)
    wide = mask.dtype if mask.dtype == torch.float64 else torch.float32
    counts = counted(mask, provenance)
    divisor = torch.as_tensor(denominator, device=mask.device).to(wide)
    if aggregation == "sequence_mean_token_mean":
        _check_range("token_weights", sequence_index, len(tokens), mask, provenance)
        divisor = divisor * tokens[torch.where(counts, sequence_index, 0).long()] if len(tokens) else divisor
    return torch.where(counts, mask.to(wide) / divisor, 0)


def sequence_log_ratio_sums(
    logprob: Tensor, old_logprob: Tensor, weight: Tensor, provenance: Tensor | None, sequence_index: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """For each sequence the sum of logprob - old_logprob over its tokens that count, and their number: fp32 [S], no gradient.

    sequence_index: int [T], never falling; what is not in [0, num_sequences) belongs to none. A sequence's sum has the same bits
    wherever it stands in the pack. Ranks that share sequences add both before they divide. Raises ValueError for unlike shapes, and
    on a CPU where sequence_index falls.
    """
    tokens = {"logprob": logprob, "old_logprob": old_logprob, "weight": weight, "provenance": provenance}
    _check_shapes("sequence_log_ratio_sums", {**tokens, "sequence_index": sequence_index})
    _check_order("sequence_log_ratio_sums", sequence_index)
    if current_backend(logprob) not in ("torch", "reference"):
        return _sequence_log_ratio(logprob.detach(), old_logprob.detach(), weight.detach(), provenance, sequence_index, num_sequences)
    wide = torch.promote_types(logprob.dtype, torch.float32)
    inside = counted(weight, provenance) & (sequence_index >= 0) & (sequence_index < num_sequences)
    index = torch.where(inside, sequence_index, num_sequences).long()
    difference = torch.where(inside, logprob.detach().to(wide) - old_logprob.detach().to(wide), 0)
    sums, counts = (x.new_zeros(num_sequences + 1).index_add(0, index, x) for x in (difference, inside.to(wide)))
    return sums[:-1], counts[:-1]


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}; choose one of {', '.join(AGGREGATIONS)}")


def _check_shapes(name: str, tokens: dict[str, Tensor | None]) -> None:
    shape = tokens["logprob"].shape  # type: ignore[union-attr]
    for key, x in tokens.items():
        if x is not None and (x.shape != shape or x.ndim != 1):
            raise ValueError(f"{name}: {key} is {tuple(x.shape)}, logprob {tuple(shape)}; expected [T]")


def _check_order(name: str, sequence_index: Tensor) -> None:
    """Raises ValueError where sequence_index falls; on a CPU only, since a GPU would have to be waited for."""
    if sequence_index.device.type != "cpu" or is_abstract(sequence_index):
        return
    falls = sequence_index[1:] < sequence_index[:-1]
    if falls.any():
        row = int(falls.nonzero()[0]) + 1
        before, after = sequence_index[row - 1 : row + 1].tolist()
        raise ValueError(f"{name}: sequence_index falls from {before} to {after} at row {row}; put the sequences in order")


def _check_range(name: str, sequence_index: Tensor, num_sequences: int, weight: Tensor, provenance: Tensor | None) -> None:
    """Raises ValueError for a token that counts and is of no sequence; on a CPU only, likewise."""
    if sequence_index.device.type != "cpu" or is_abstract(sequence_index):
        return
    outside = counted(weight, provenance) & ((sequence_index < 0) | (sequence_index >= num_sequences))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{name}: sequence_index of row {row}, which counts, is {int(sequence_index[row])}; there are {num_sequences} sequences, "
            "counted from 0"
        )


@torch.library.custom_op("smalt::policy_loss", mutates_args=())
def _policy_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor, provenance: Tensor | None,
    reference_logprob: Tensor | None, rollout_logprob: Tensor | None, sequence_index: Tensor | None,
    sequence_log_ratio: Tensor | None, cispo: bool, estimator: int, numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    optional = (provenance, reference_logprob, rollout_logprob, sequence_index, sequence_log_ratio)
    dense = [None if x is None else x.contiguous() for x in (logprob, old_logprob, advantage, weight, *optional)]
    return launch_policy_loss(*dense, cispo, estimator, numbers)  # type: ignore[arg-type, call-arg]


@_policy_loss.register_fake
def _(logprob, *_):
    return tuple(logprob.new_empty(shape, dtype=torch.float32) for shape in ((), (11,), logprob.shape))


def _setup(ctx, inputs, output):
    _, metrics, gradient = output
    ctx.mark_non_differentiable(metrics, gradient)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(gradient)


def _backward(ctx, dloss, *_):
    (gradient,) = ctx.saved_tensors
    return (dloss * gradient).to(ctx.dtype), *[None] * 11


_policy_loss.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("smalt::sequence_log_ratio", mutates_args=())
def _sequence_log_ratio(
    logprob: Tensor, old_logprob: Tensor, weight: Tensor, provenance: Tensor | None, sequence_index: Tensor, num_sequences: int
) -> tuple[Tensor, Tensor]:
    dense = [None if x is None else x.contiguous() for x in (logprob, old_logprob, weight, provenance, sequence_index)]
    return launch_sequence_log_ratio(*dense, num_sequences)  # type: ignore[arg-type, call-arg]


@_sequence_log_ratio.register_fake
def _(logprob, old_logprob, weight, provenance, sequence_index, num_sequences):
    return tuple(logprob.new_empty(num_sequences, dtype=torch.float32) for _ in range(2))
