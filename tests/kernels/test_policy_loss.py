import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend
from smalt.kernels.launch import INTERPRET
from smalt.kernels.policy_loss import (
    AGGREGATIONS,
    FORCED,
    SAMPLED,
    PolicyLossOptions,
    PolicyMetrics,
    _policy_loss,
    _sequence_log_ratio,
    loss_denominator,
    policy_loss,
    policy_loss_reference,
    sequence_log_ratio_sums,
    sequence_tokens,
    token_weights,
)
from smalt.kernels.policy_loss_kernels import launch_policy_loss

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
MAX_TOKENS = 32


def pack(lengths, seed, dtype=torch.float64, tail=3, poison=math.nan):
    """Sequences of the given lengths behind one another: a prompt, sampled and forced tokens, and a tail of none.

    What stands at tokens that do not count is poison. The advantage is one number a sequence.
    """
    g = torch.Generator().manual_seed(seed)
    T, S = sum(lengths) + tail, len(lengths)
    index = torch.repeat_interleave(torch.arange(S + 1), torch.tensor([*lengths, tail])).int()
    mask, forced = torch.rand(T, generator=g) < 0.8, torch.rand(T, generator=g) < 0.2
    mask &= index < S
    old = -3 * torch.rand(T, generator=g)
    logprob, reference, rollout = (old + 0.3 * torch.randn(T, generator=g) for _ in range(3))
    advantage = torch.randn(S + 1, generator=g)[index.long()]
    away = ~mask | forced
    floats = [torch.where(away, poison, x.to(dtype)) for x in (logprob, old, advantage, reference, rollout)]
    return {
        **dict(zip(("logprob", "old", "advantage", "reference", "rollout"), floats, strict=True)),
        "mask": mask, "provenance": torch.where(forced, FORCED, SAMPLED).to(torch.uint8), "index": index, "S": S,
    }  # fmt: skip


def weights(p, options):
    tokens = sequence_tokens(p["mask"], p["provenance"], p["index"], p["S"])
    longest = MAX_TOKENS if options.aggregation.endswith("_norm") else None
    denominator = loss_denominator(options.aggregation, tokens, longest)
    mask = p["mask"].double() if p["logprob"].dtype == torch.float64 else p["mask"]
    return token_weights(options.aggregation, mask, p["provenance"], p["index"], tokens, denominator)


def run(p, options, weight=None, mean=None):
    """Loss and metrics of a pack on one rank."""
    weight = weights(p, options) if weight is None else weight
    if options.ratio == "sequence" and mean is None:
        total, count = sequence_log_ratio_sums(p["logprob"], p["old"], weight, p["provenance"], p["index"], p["S"])
        mean = total / count.clamp(min=1)
    return policy_loss(
        p["logprob"], p["old"], p["advantage"], weight, options, provenance=p["provenance"],
        reference_logprob=p["reference"], rollout_logprob=p["rollout"] if options.tis_cap else None,
        sequence_index=p["index"] if mean is not None else None, sequence_log_ratio=mean,
    )  # fmt: skip


@st.composite
def options_of(draw):
    options = PolicyLossOptions.of(draw(st.sampled_from(LOSSES)))
    changes = {
        "kl_coefficient": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "kl_estimator": draw(st.sampled_from(["k1", "k2", "k3"])),
        "tis_cap": draw(st.sampled_from([None, 1.1])),
        "ratio": draw(st.sampled_from(["token", "sequence"])),
        "aggregation": draw(st.sampled_from(AGGREGATIONS)),
    }
    if options.surrogate == "cispo":
        changes |= {"clip_low": 0.2, "clip_high": 0.25}
    else:
        changes["dual_clip"] = draw(st.sampled_from([None, 1.25]))
    return replace(options, **changes)


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 5, 9, 23, 40]), min_size=0, max_size=4)


@pytest.mark.slow
@given(
    lengths=LENGTHS,
    options=options_of(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_kernel_obeys_the_rule(check_rule, device, lengths, options, seed, dtype):
    p = {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack(lengths, seed, dtype).items()}
    # Weights that are the mask, too: the provenance must keep forced tokens out by itself.
    weight = weights(p, options) if seed % 2 else p["mask"].float()
    # A loss may cancel to nothing: it is measured against what its terms add up to.
    size = (weight * p["advantage"].double().nan_to_num()).abs().sum()

    def function(logprob, old, advantage, reference, rollout, weight):
        given = {**p, "logprob": logprob, "old": old, "advantage": advantage, "reference": reference, "rollout": rollout}
        loss, metrics = run(given, options, weight)
        return torch.stack([loss, size.to(loss)]), torch.stack(metrics[:-2]), torch.stack(metrics[-2:])

    check_rule(function, [p[k] for k in ("logprob", "old", "advantage", "reference", "rollout")] + [weight])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_layout_in_memory_is_read_right(check_rule, device, ratio):
    """Slices of something wider, log-probabilities in one precision and the rest in another, weights that know nothing of forcing."""
    p = pack([9, 30], 3, torch.float32)
    options = PolicyLossOptions(ratio=ratio, kl_coefficient=0.5, tis_cap=1.1)
    p = {k: torch.stack([v, v], 1).to(device)[:, 0] if torch.is_tensor(v) else v for k, v in p.items()}
    p["provenance"], p["advantage"] = p["provenance"].bool(), p["advantage"].bfloat16()

    def function(logprob):
        loss, metrics = run({**p, "logprob": logprob, "index": p["index"].long()}, options, p["mask"].float())
        return loss, torch.stack(metrics[:-2]), torch.stack(metrics[-2:])

    check_rule(function, [p["logprob"]])


def by_hand(p, options):
    """The loss as the papers write it: an outer sum over responses o_i, an inner one over their tokens. Float64."""
    kept = p["mask"] & (p["provenance"] == SAMPLED)
    responses = [kept & (p["index"] == i) for i in range(p["S"])]
    responses = [i for i in responses if i.any()]
    G, N = len(responses), sum(int(i.sum()) for i in responses)
    low, high = 1 - options.clip_low, 1 + options.clip_high
    total = 0.0
    for i in responses:
        lp, old, A, ref, mu = (p[k][i] for k in ("logprob", "old", "advantage", "reference", "rollout"))
        n = len(lp)
        # GSPO eq. 7: the geometric mean, through which the gradient reaches every token.
        r = (lp - old).mean().exp().expand(n) if options.ratio == "sequence" else (lp - old).exp()
        if options.surrogate == "cispo":  # CISPO eq. 4 and 5
            terms = r.detach().clamp(low, high) * A * lp
        else:  # GRPO eq. 3, DAPO eq. 8, GSPO eq. 5
            terms = torch.min(r * A, r.clamp(low, high) * A)
            if options.dual_clip:  # arXiv 1912.09729
                terms = torch.where(A < 0, torch.max(terms, options.dual_clip * A), terms)
        if options.tis_cap:
            terms = terms * (old - mu).exp().clamp(max=options.tis_cap)
        x = ref - lp
        kl = {"k1": -x, "k2": x**2 / 2, "k3": x.exp() - x - 1}[options.kl_estimator]
        losses = options.kl_coefficient * kl - terms
        total = total + {
            "token_mean": lambda losses: losses.sum() / N,
            "sequence_mean_token_mean": lambda losses: losses.mean() / G,
            "sequence_mean_token_sum": lambda losses: losses.sum() / G,
            "sequence_mean_token_sum_norm": lambda losses: losses.sum() / (G * MAX_TOKENS),
        }[options.aggregation](losses)
    return total


def loss_and_gradient(function, p):
    leaf = p["logprob"].clone().requires_grad_()
    loss = function({**p, "logprob": leaf})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


CHANGES = [{}, {"kl_coefficient": 0.3, "kl_estimator": "k1"}, {"kl_coefficient": 0.3, "kl_estimator": "k2"}, {"kl_coefficient": 0.3}]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_definition_is_the_formula_of_the_paper(error, loss, aggregation):
    p = pack([7, 0, 1, 19], 5)
    for changes in [*CHANGES, {"tis_cap": 1.1}, {"dual_clip": 1.3}]:
        if (loss == "cispo" and "dual_clip" in changes) or (loss == "gspo" and "tis_cap" in changes):
            continue  # importance weights differ by token, and with them eq. 5 from eq. 13 of GSPO
        options = PolicyLossOptions.of(loss, aggregation=aggregation, **changes)
        got = loss_and_gradient(lambda p, o=options: run(p, o)[0], p)
        want = loss_and_gradient(lambda p, o=options: by_hand(p, o), p)
        for a, b in zip(got, want, strict=True):
            assert error(a, b) < 1e-12, f"{changes}"


def test_gspo_spreads_its_gradient_evenly_over_the_sequence():
    p = pack([30], 1)
    options = PolicyLossOptions.of("gspo", clip_low=1.0, clip_high=9.0)
    _, gradient = loss_and_gradient(lambda p: run(p, options)[0], p)
    counts = p["mask"] & (p["provenance"] == SAMPLED)
    assert gradient[counts].unique().numel() == 1
    assert not gradient[~counts].any()


def test_published_options():
    assert PolicyLossOptions.of("grpo").kl_coefficient == 0.04
    assert (PolicyLossOptions.of("dapo").clip_low, PolicyLossOptions.of("dapo").clip_high) == (0.2, 0.28)
    assert PolicyLossOptions.of("dr_grpo").aggregation == "sequence_mean_token_sum_norm"
    assert (PolicyLossOptions.of("gspo").clip_low, PolicyLossOptions.of("gspo").clip_high) == (3e-4, 4e-4)
    assert PolicyLossOptions.of("cispo").surrogate == "cispo"


@pytest.mark.slow
@pytest.mark.parametrize("loss", [pytest.param("grpo", marks=pytest.mark.slow), "gspo", pytest.param("cispo", marks=pytest.mark.slow)])
def test_tokens_that_do_not_count_might_as_well_not_be_there(error, device, loss):
    options = PolicyLossOptions.of(loss, kl_coefficient=0.1, tis_cap=1.2)
    results = []
    for poison in (0.0, math.nan, -math.inf):
        p = pack([11, 14, 2], 7, torch.float32, poison=poison)
        cut = p["mask"] & (p["provenance"] == SAMPLED)
        short = {k: v[cut].to(device) if torch.is_tensor(v) else v for k, v in p.items()}
        p = {k: v.to(device) if torch.is_tensor(v) else v for k, v in p.items()}
        with backend("triton"):
            loss_long, gradient = loss_and_gradient(lambda p: run(p, options)[0], p)
            loss_short, gradient_short = loss_and_gradient(lambda p: run(p, options)[0], short)
            metrics = [torch.stack(run(p, options)[1]), torch.stack(run(short, options)[1])]
        assert not gradient[~cut].any()
        assert error(loss_long, loss_short) < 1e-6
        assert error(gradient[cut], gradient_short) < 1e-6
        assert error(*metrics) < 1e-6
        results.append((loss_long, gradient, *metrics))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ranks_add_up_to_one_process(error, loss, aggregation):
    """Two data-parallel ranks, each a group of two that split its pack in the middle of a sequence."""
    options = PolicyLossOptions.of(loss, aggregation=aggregation, kl_coefficient=0.2, tis_cap=1.2)
    packs = [pack([9, 14], 1), pack([3, 0, 25], 2)]
    whole = {k: torch.cat([a[k], b[k]]) if torch.is_tensor(a[k]) else 0 for a, b in [packs] for k in a}
    whole["index"], whole["S"] = torch.cat([packs[0]["index"], packs[1]["index"] + 3]), 6
    want, want_gradient = loss_and_gradient(lambda p: run(p, options)[0], whole)
    want_metrics = run(whole, options)[1]

    shards = [
        [{k: v[cut] if torch.is_tensor(v) else v for k, v in p.items()} for cut in (slice(0, 13), slice(13, None))] for p in packs
    ]
    longest = MAX_TOKENS if aggregation.endswith("_norm") else None
    tokens = [sum(sequence_tokens(s["mask"], s["provenance"], s["index"], s["S"]) for s in group) for group in shards]
    denominator = sum(loss_denominator(aggregation, t, longest) for t in tokens)
    loss, gradients, metrics = 0.0, [], []
    for group, t in zip(shards, tokens, strict=True):
        given = [token_weights(aggregation, s["mask"].double(), s["provenance"], s["index"], t, denominator) for s in group]
        mean = None
        if options.ratio == "sequence":
            parts = [
                sequence_log_ratio_sums(s["logprob"], s["old"], w, s["provenance"], s["index"], s["S"])
                for s, w in zip(group, given, strict=True)
            ]
            mean = sum(a for a, _ in parts) / sum(b for _, b in parts).clamp(min=1)
        for s, w in zip(group, given, strict=True):
            part, gradient = loss_and_gradient(lambda p, w=w, mean=mean: run(p, options, w, mean)[0], s)
            loss, gradients = loss + part, [*gradients, gradient]
            metrics.append(run(s, options, w, mean)[1])
    assert error(loss, want) < 1e-12
    assert error(torch.cat(gradients), want_gradient) < 1e-12
    merged = [sum(m) for m in zip(*(m[:-2] for m in metrics), strict=True)]
    merged += [max(m.ratio_max for m in metrics), min(m.ratio_min for m in metrics)]
    assert error(torch.stack(merged), torch.stack(want_metrics)) < 1e-12


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_metrics_and_gradient_by_counting(device, name):
    ratio = torch.tensor([1.0, 0.5, 0.5, 1.5, 1.5, 3.0, 1.25, 9.0], device=device)
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0], device=device)
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0], device=device)
    importance = torch.tensor([1.0, 1, 1, 1, 1, 2, 1, 7], device=device)
    logprob, zero = ratio.log().requires_grad_(), torch.zeros(8, device=device)

    def metrics_and_gradient(options, **given):
        with backend(name):
            loss, m = policy_loss(logprob, zero, advantage, weight, options, **given)
            return m, torch.autograd.grad(loss, logprob)[0].tolist()

    options = PolicyLossOptions(clip_low=0.2, clip_high=0.3, dual_clip=2.0, tis_cap=1.5, kl_estimator="k2")
    given = {"reference_logprob": ratio.log() - 2, "rollout_logprob": -importance.log()}
    m, gradient = metrics_and_gradient(options, **given)
    assert gradient == pytest.approx([-1, -0.5, 0, 0, 1.5, 0, -1.25, 0])
    counts = [float(x) for x in (m.tokens, m.clipped_low, m.clipped_high, m.dual_clipped, m.tis_truncated)]
    assert counts == [7, 1, 1, 1, 1]
    assert float(m.tis_weight) == pytest.approx(6 + 1.5)
    assert float(m.ratio) == pytest.approx(9.25)
    assert (float(m.ratio_max), float(m.ratio_min)) == pytest.approx((3.0, 0.5))
    assert float(m.kl_reference) == pytest.approx(14.0)
    assert float(m.kl_old) == pytest.approx((ratio.double() - 1 - ratio.double().log())[:-1].sum().item())
    m, gradient = metrics_and_gradient(PolicyLossOptions.of("cispo", clip_low=0.2, clip_high=0.3))
    assert gradient == pytest.approx([-1, -0.8, 0.8, -1.3, 1.3, 1.3, -1.25, 0])
    assert (float(m.clipped_low), float(m.clipped_high)) == (2, 3)


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_what_stands_on_a_bound_is_not_over_it(device, name, surrogate):
    """Ratios and importance weights of exactly 1, between bounds of 1: nothing is held, and the whole gradient passes."""
    zero, weight = torch.zeros(20, device=device, requires_grad=True), torch.full((20,), 0.5, device=device)
    advantage = torch.linspace(-2.0, 1.8, 20, device=device)
    options = PolicyLossOptions(surrogate=surrogate, clip_low=0.0, clip_high=0.0, tis_cap=1.0)
    with backend(name):
        loss, m = policy_loss(zero, zero.detach(), advantage, weight, options, rollout_logprob=zero.detach())
        gradient = torch.autograd.grad(loss, zero)[0]
    assert [float(x) for x in (m.clipped_low, m.clipped_high, m.dual_clipped, m.tis_truncated)] == [0.0] * 4
    assert torch.equal(gradient, -weight * advantage)


@pytest.mark.parametrize("size", [2.0**-10, 0.498046875])  # of the series the first term and the last
def test_small_divergences_keep_their_digits(device, size):
    x = torch.full((20,), size, device=device)
    one = torch.ones(20, device=device)
    with backend("triton"):
        _, m = policy_loss(-x, 0 * x, one, one, PolicyLossOptions(kl_coefficient=0.1), reference_logprob=-2 * x)
    exact = math.expm1(-size) + size
    for divergence in (m.kl_old, m.kl_reference):
        assert float(divergence) == pytest.approx(20 * exact, rel=4e-7)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_that_counts(device, tokens):
    x = torch.full((tokens,), math.nan, device=device, requires_grad=True)
    weight = torch.zeros(tokens, device=device)
    with backend("triton"):
        loss, m = policy_loss(x, x, x, weight, PolicyLossOptions.of("cispo"))
        sums = sequence_log_ratio_sums(x, x, weight, None, weight.int(), 3)
    assert float(loss.detach()) == 0
    assert [float(v) for v in m] == [0.0] * 9 + [-math.inf, math.inf]
    assert torch.autograd.grad(loss, x)[0].tolist() == [0.0] * tokens
    assert [s.tolist() for s in sums] == [[0.0] * 3] * 2
    with backend("reference"):
        assert [float(v) for v in policy_loss(x, x, x, weight, PolicyLossOptions.of("cispo"))[1]] == [float(v) for v in m]
        assert not sequence_log_ratio_sums(x, x, weight, None, weight.int(), 3)[0].any()


def test_sums_of_a_sequence_do_not_depend_on_its_neighbours(device):
    p = pack([41], 4, torch.float32, tail=0)
    one = torch.ones(41)
    sums = []
    for before in (0, 3, 8, 13):
        index = torch.repeat_interleave(torch.arange(3), torch.tensor([before, 41, 5]))
        around = [
            torch.cat([torch.randn(before), x, torch.randn(5)]).to(device) for x in (p["logprob"].nan_to_num(), p["old"].nan_to_num())
        ]
        weight = torch.cat([torch.ones(before), one, torch.zeros(5)]).to(device)
        with backend("triton"):
            sums.append(sequence_log_ratio_sums(*around, weight, None, index.to(device), 2)[0][1])
    assert all(torch.equal(s, sums[0]) for s in sums)


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("S", [2, 0])
def test_token_of_no_sequence_is_nan_and_reads_nothing(device, name, surrogate, S):
    """Where nobody can be told without waiting for a GPU. An address outside of the means fails the test."""
    index = torch.tensor([0, 1, 1, 2, 0, -1, 10**12, 1], device=device)
    lp, old, one = (torch.full((8,), x, device=device) for x in (-1.0, -1.5, 1.0))
    provenance, means = torch.full((8,), SAMPLED, device=device), torch.full((S,), 0.1, device=device)
    outside = (index < 0) | (index >= S)
    options, cispo = PolicyLossOptions(surrogate=surrogate, ratio="sequence"), surrogate == "cispo"

    def check(weight, lost):
        optional = provenance, None, None, index, means
        if name == "triton":
            loss, metrics, gradient = launch_policy_loss(lp, old, one, weight, *optional, cispo, 2, [0.8, 1.2, 0.0, 0.0, 0.0])
            ratio = metrics[PolicyMetrics._fields.index("ratio")]
        else:
            leaf = lp.clone().requires_grad_()
            loss, metrics = policy_loss_reference(leaf, old, one, weight, options, *optional)
            (gradient,), ratio = torch.autograd.grad(loss, leaf), metrics.ratio
        assert gradient.isnan().tolist() == lost.tolist()
        assert [bool(x.isnan()) for x in (loss, ratio)] == [bool(lost.any())] * 2

    check(one, outside)
    provenance[3] = FORCED  # tokens that do not count may be of no sequence
    check(torch.where(outside & (index != 2), 0.0, one), torch.zeros_like(outside))


def test_sequences_are_checked_on_a_cpu():
    options, x, weight = PolicyLossOptions.of("gspo"), torch.zeros(6), torch.ones(6)
    unordered, far = torch.tensor([1, 1, 0, 0, 2, 2], dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 3, 3])
    for name in ("torch", "triton") if INTERPRET else ("torch",):
        with backend(name):
            with pytest.raises(ValueError, match=r"sequence_log_ratio_sums: sequence_index falls from 1 to 0 at row 2"):
                sequence_log_ratio_sums(x, x, weight, None, unordered, 3)
            for index, message in ((far, "row 4, which counts, is 3; there are 3 seq"), (far - 1, "row 0, which counts, is -1")):
                with pytest.raises(ValueError, match=f"policy_loss: sequence_index of {message}"):
                    policy_loss(x, x, x, weight, options, sequence_index=index, sequence_log_ratio=torch.zeros(3))
            without = torch.where(far == 3, 0.0, weight)
            policy_loss(x, x, x, without, options, sequence_index=far, sequence_log_ratio=torch.zeros(3))
            policy_loss(x, x, x, weight, options, sequence_index=unordered, sequence_log_ratio=torch.zeros(3))
    with pytest.raises(ValueError, match=r"sequence_tokens: sequence_index falls from 1 to 0 at row 2"):
        sequence_tokens(weight, None, unordered, 3)
    with pytest.raises(ValueError, match=r"token_weights: sequence_index of row 4, which counts, is 3"):
        token_weights("sequence_mean_token_mean", weight, None, far, torch.ones(3), 1.0)


def test_reference_by_gradcheck():
    p = pack([6, 9], 2, poison=0.5)
    for loss in ("grpo", "dapo"):
        options = PolicyLossOptions.of(loss, kl_coefficient=0.3, tis_cap=1.2)
        weight = weights(p, options)
        rest = (p["provenance"], p["reference"], p["rollout"], None, None)
        leaf = p["logprob"].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, w=weight, o=options, r=rest: policy_loss_reference(x, p["old"], p["advantage"], w, o, *r)[0], leaf
        )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device, loss):
    p = {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack([40, 33, 20], 1, torch.float32).items()}
    options = PolicyLossOptions.of(loss, kl_coefficient=0.1, tis_cap=1.1)

    def function(logprob):
        loss, metrics = run({**p, "logprob": logprob}, options)
        return loss, torch.stack(metrics)

    check_grid_order(function, [p["logprob"]])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    p = {k: v.to(device) if torch.is_tensor(v) else v for k, v in pack([9, 14], 1, torch.float32, poison=0.0).items()}
    for options in (PolicyLossOptions.of("grpo", tis_cap=1.2), PolicyLossOptions.of("gspo")):
        weight = weights(p, options)

        def function(logprob, options=options, weight=weight):
            loss, metrics = run({**p, "logprob": logprob}, options, weight)
            return loss, torch.stack(metrics)

        check_operator(function, [p["logprob"]])
    tokens = p["old"], p["advantage"], weight, p["provenance"], p["reference"], p["rollout"]
    mean = torch.zeros(2, device=device)
    numbers = [0.8, 1.2, 3.0, 0.1, 2.0]
    args = (p["logprob"].clone().requires_grad_(), *tokens, p["index"], mean, False, 2, numbers)
    torch.library.opcheck(_policy_loss, args)
    torch.library.opcheck(_sequence_log_ratio, (p["logprob"], p["old"], weight, None, p["index"], 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate": "ppo"}, "surrogate is 'ppo'"),
        ({"ratio": "batch"}, "ratio is 'batch'"),
        ({"kl_estimator": "k4"}, "choose one of k1, k2, k3"),
        ({"aggregation": "mean"}, "aggregation is 'mean'"),
        ({"clip_low": 1.5}, r"clip_low 1.5 is not in \[0, 1\]"),
        ({"clip_high": -0.1}, "clip_high -0.1"),
        ({"dual_clip": 0.9}, "dual_clip 0.9 must be above 1"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, 'needs surrogate "clip"'),
        ({"kl_coefficient": -1.0}, "kl_coefficient -1.0"),
        ({"tis_cap": 0.0}, "tis_cap 0.0"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PolicyLossOptions(**changes)


def test_bad_arguments_are_named():
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(ValueError, match="unknown policy loss 'ppo'"):
        PolicyLossOptions.of("ppo")
    with pytest.raises(ValueError, match=r"advantage is \(2,\), logprob \(1,\)"):
        policy_loss(one, one, two, one, PolicyLossOptions())
    with pytest.raises(ValueError, match=r"logprob is \(1, 1\)"):
        policy_loss(one[None], one[None], one[None], one[None], PolicyLossOptions())
    with pytest.raises(ValueError, match=r"kl_coefficient 0.1 needs reference_logprob"):
        policy_loss(one, one, one, one, PolicyLossOptions(kl_coefficient=0.1))
    with pytest.raises(ValueError, match="tis_cap is None"):
        policy_loss(one, one, one, one, PolicyLossOptions(), rollout_logprob=one)
    with pytest.raises(ValueError, match="tis_cap is 2"):
        policy_loss(one, one, one, one, PolicyLossOptions(tis_cap=2.0))
    with pytest.raises(ValueError, match='ratio is "sequence"'):
        policy_loss(one, one, one, one, PolicyLossOptions.of("gspo"), sequence_index=one.int())
    with pytest.raises(ValueError, match='ratio is "token"'):
        policy_loss(one, one, one, one, PolicyLossOptions(), sequence_index=one.int())
    with pytest.raises(ValueError, match=r"sequence_index is \(2,\)"):
        sequence_log_ratio_sums(one, one, one, None, two.int(), 1)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        loss_denominator("mean", one.long())
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        token_weights("mean", one, None, one.int(), one.long(), 1.0)
    for arguments in (("token_mean", one.long(), 8), ("sequence_mean_token_sum_norm", one.long())):
        with pytest.raises(ValueError, match="max_tokens goes with"):
            loss_denominator(*arguments)
