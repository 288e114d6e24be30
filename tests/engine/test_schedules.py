"""The learning rate: what each schedule gives, and that stages which share one see one curve over their tokens."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.config import parse_config
from smalt.engine.errors import UserError
from smalt.engine.schedules import SHAPES, learning_rate

STAGE = {"sequence_length": 8, "mixture": {"read": 1.0}, "trainable": {"language": 1.0}}


def config_of(*stages):
    """A run of stages s0, s1, ...; what they leave out is STAGE's."""
    data = {"tokenizer": "t", "sources": {"read": "r"}}
    return parse_config({"data": data, "stages": {f"s{i}": {**STAGE, **stage} for i, stage in enumerate(stages)}}, "here")


def rates(config, name="s0"):
    return [learning_rate(config, name, step) for step in range(config.stages[name].steps)]


def test_warms_up_linearly_to_the_peak():
    assert rates(config_of({"steps": 20, "warmup_steps": 4, "learning_rate": 2.0}))[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ({"schedule": "constant"}, {0: 2.0, 5: 2.0, 10: 2.0}),
        ({}, {0: 2.0, 5: 1.1, 10: 0.2}),
        ({"schedule": "wsd"}, {0: 2.0, 8: 2.0, 9: 1.1, 10: 0.2}),
        ({"schedule": "wsd", "decay_share": 0.4, "final_share": 0.0}, {6: 2.0, 8: 1.0, 10: 0.0}),
        ({"schedule": "wsd", "decay_share": 1.0, "decay_shape": "cosine"}, {0: 2.0, 5: 1.1, 10: 0.2}),
        ({"schedule": "wsd", "decay_share": 0.4, "decay_shape": "sqrt", "final_share": 0.0}, {6: 2.0, 7: 1.0, 10: 0.0}),
    ],
    ids=str,
)
def test_after_the_warm_up(schedule, want):
    found = rates(config_of({"steps": 11, "learning_rate": 2.0, **schedule}))
    assert {step: found[step] for step in want} == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 3), (3, 9)])
def test_short_stages_stay_above_zero_and_below_the_peak(schedule, steps, warmup):
    found = rates(config_of({"steps": steps, "warmup_steps": warmup, "schedule": schedule, "learning_rate": 2.0}))
    assert all(0 < rate <= 2.0 for rate in found)


lengths = st.tuples(st.integers(1, 12), st.sampled_from([8, 16, 64]), st.integers(1, 3))
shapes = st.one_of(
    st.just({"schedule": "constant"}),
    st.just({"schedule": "cosine"}),
    st.builds(
        lambda share, shape: {"schedule": "wsd", "decay_share": share, "decay_shape": shape},
        st.floats(0.05, 1),
        st.sampled_from(list(SHAPES)),
    ),
)


@given(st.lists(lengths, min_size=1, max_size=4), shapes, st.integers(0, 15), st.floats(0, 1), st.floats(1e-5, 1))
def test_stages_that_share_a_schedule_see_one_curve_over_their_tokens(sizes, shape, warmup, final, peak):
    own = {**shape, "warmup_steps": warmup, "final_share": final, "learning_rate": peak}
    stages = [
        {"steps": steps, "sequence_length": length, "packs_per_step": packs, **({"schedule": "continued"} if i else own)}
        for i, (steps, length, packs) in enumerate(sizes)
    ]
    # What comes before and after has schedules of its own.
    other = {"steps": 3, "learning_rate": 7.0}
    config = config_of(*stages, other)
    found = [rate for i in range(len(stages)) for rate in rates(config, f"s{i}")]
    tokens = [length * packs for steps, length, packs in sizes for _ in range(steps)]
    before = [sum(tokens[:i]) for i in range(len(tokens))]
    warm, last = warmup * tokens[0], before[-1]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in found)
    rising = [rate for rate, at in zip(found, before, strict=True) if at < warm]
    assert rising == sorted(rising)
    falling = [rate for rate, at in zip(found, before, strict=True) if at >= warm]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(falling))
    if last > warm:
        assert found[-1] == pytest.approx(peak if shape["schedule"] == "constant" else peak * final, abs=1e-12)
    # The same tokens in one stage of small steps: the curve does not know where stages end.
    fine = config_of({"steps": last // 8 + 1, **own, "warmup_steps": warm // 8})
    for at, rate in zip(before, found, strict=True):
        if at >= warm:
            assert learning_rate(fine, "s0", at // 8) == pytest.approx(rate, abs=1e-9)


def test_a_chain_ends_where_a_stage_has_its_own_schedule():
    one, more = {"steps": 4, "learning_rate": 1.0, "final_share": 0.0}, {"steps": 4, "schedule": "continued"}
    config = config_of(one, more, one, more)
    assert rates(config, "s0") == rates(config, "s2")
    assert rates(config, "s1") == rates(config, "s3")
    assert rates(config, "s0")[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert rates(config, "s1")[-1] == 0.0


def test_a_stage_that_continues_a_schedule_may_warm_up_to_it():
    one, more = {"steps": 4, "learning_rate": 1.0, "warmup_steps": 2}, {"steps": 4, "schedule": "continued"}
    without, own = config_of(one, more, one), config_of(one, {**more, "warmup_steps": 3}, one)
    assert rates(own, "s0") == rates(without, "s0")
    assert rates(own, "s1") == pytest.approx(
        [rate * share for rate, share in zip(rates(without, "s1"), (1 / 3, 2 / 3, 1, 1), strict=True)]
    )


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"steps": 1}], "stages.s0: learning_rate is missing"),
        ([{"steps": 1, "schedule": "continued"}], "stages.s0.schedule = 'continued': there is no stage before it"),
        (
            [{"steps": 1, "learning_rate": 1.0}, {"steps": 1, "schedule": "continued", "learning_rate": 1.0, "final_share": 0.5}],
            "stages.s1: final_share, learning_rate with schedule = 'continued', which goes on with those of the stage before",
        ),
        (
            [{"steps": 1, "learning_rate": 1.0, "decay_share": 0.5}],
            "stages.s0: decay_share with schedule = 'cosine'; only wsd has a decay of its own",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(stages, said):
    with pytest.raises(UserError) as caught:
        config_of(*stages)
    assert said in str(caught.value)
