"""The order of training: pure in (seed, cursor, log of changes), exact in its epochs, the same on all layouts and after a restart."""

import json
import time
from collections import Counter
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.loader import Loader, Packing, Place
from smalt.engine.data.mixture import Mixture, Resampled, WindowWeights, fixed_mix, mixture_of, thousandths
from smalt.engine.data.packing import PackerState
from smalt.engine.data.reading import Reader
from smalt.engine.data.stream import Mix, Presentation, SampleStream, UsedUp, as_bits, counts, from_bits, pick
from smalt.engine.errors import UserError
from smalt.engine.sections import StageConfig
from smalt.model import TilingConfig
from smalt.model.cost import Cost
from smalt.model.tiling import ImageShape

from .test_loader import LENGTH, Meeting, Records, _close, _whole

# Orders of small sources are slow to draw from.
SIZES = {"a": 700, "b": 1200, "c": 500}
SHOWN = Presentation(0.5, 0.5)


def bits(records, size):
    return as_bits(np.isin(np.arange(size), records))


@st.composite
def mixes(draw):
    weights = draw(st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 20), min_size=1))
    ends = draw(st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 40), max_size=2))
    thinned = draw(st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(2, 5), max_size=2))
    return Mix(weights, ends, {name: bits(range(0, SIZES[name], each), SIZES[name]) for name, each in thinned.items()}, 0.5)


changes = st.lists(st.tuples(st.integers(0, 20), mixes()), min_size=1, max_size=4)


def _changed(changes):
    """A stream, and what it has up to 20 samples after the last change. A change comes where it has been read to, or where it ends."""
    stream, first, drawn = SampleStream(SIZES, SHOWN, 3), 0, []
    for further, mix in changes:
        drawn += [stream[i] for i in stream.available(range(first, first + further))] if stream.segments else []
        first = len(drawn)
        stream.change(first, mix)
    return stream, drawn + [stream[i] for i in stream.available(range(first, first + 20))]


@given(changes=changes, cursor=st.integers(0, 60))
def test_a_sample_follows_from_the_log_whatever_was_asked_before_and_of_its_past_only_what_is_left(changes, cursor):
    stream, want = _changed(changes)
    fresh = SampleStream(SIZES, SHOWN, 3, json.loads(json.dumps(stream.log())))
    assert [fresh[i] for i in reversed(range(len(want)))] == want[::-1]
    stream.forget(cursor)
    restored = SampleStream(SIZES, SHOWN, 3, json.loads(json.dumps(stream.log())))
    assert [restored[i] for i in range(cursor, len(want))] == want[cursor:]
    assert sum(entry["first"] <= cursor for entry in restored.log()) <= 1


@given(changes=changes)
def test_each_source_goes_on_where_it_was_until_its_end_and_loses_only_records_that_are_thinned(changes):
    stream, drawn = _changed(changes)
    for name, size in SIZES.items():
        thinned = [from_bits(mix.thinned[name], size) for _, mix in changes if name in mix.thinned]
        lightened = np.any([np.zeros(size, bool), *thinned], axis=0)
        place = 0
        for draw in (draw for draw in drawn if draw.source == name):  # in the source's own order
            while (passed := stream.orders[name][place]) != draw:
                assert lightened[passed.record], "a record was lost"
                assert place < 1000 * size
                place += 1
            place += 1
        assert place <= max(mix.ends.get(name, 10**9) for _, mix in changes)


weights = st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 20), min_size=1)


@given(weights=weights, samples=st.integers(0, 500))
def test_shares_are_exact_after_each_sum_of_the_weights_and_one_sample_is_of_one_source(weights, samples):
    total = sum(weights.values())
    before, after = counts(samples, weights), counts(samples + 1, weights)
    assert sum(before.values()) == samples
    assert sorted(after[name] - before[name] for name in weights) == [0] * (len(weights) - 1) + [1]
    assert counts(samples * total, weights) == {name: samples * weight for name, weight in weights.items()}
    assert all(abs(before[name] - samples * weight / total) < len(weights) for name, weight in weights.items())
    assert [pick(i, {"a": 1, "b": 2}) for i in range(6)] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("b", 2), ("b", 3)]


@pytest.mark.slow
def test_the_order_of_a_source_follows_from_its_seed_and_its_name_whatever_is_beside_it():
    def order(seed, name, *others):
        stream = SampleStream({**dict.fromkeys(others, 9), name: 40}, SHOWN, seed)
        return [stream.orders[name][place] for place in range(80)]

    def records(seed, name):
        return [draw.record for draw in order(seed, name)]

    assert order(0, "a") == order(0, "a", "b", "c")
    # Neither another source nor a neighbouring seed has this order, nor that of another epoch.
    runs = [records(seed, name)[first : first + 40] for seed in (0, 1, 2) for name in ("a", "b") for first in (0, 40)]
    assert all(sorted(run) == list(range(40)) for run in runs)
    assert len(set(map(tuple, runs))) == len(runs)


def _stage(**values):
    return StageConfig(steps=4, sequence_length=8, trainable={"language": 1.0}, learning_rate=1e-3, **values)


FEW = {"a": 70, "b": 120, "c": 50}


def _drawn(stage):
    """What a stage draws of its sources before all of them are used up."""
    stream = SampleStream({name: FEW[name] for name in stage.sources}, SHOWN, 3)
    stream.change(0, mixture_of(stage, stream.sizes).mix(1))
    there = stream.available(range(2000))
    with pytest.raises(UsedUp):
        stream[len(there)]
    return [stream[i] for i in there]


def test_epochs_are_exact_with_weights_or_without():
    drawn = _drawn(_stage(epochs={"a": 2, "b": 4, "c": 1.5}))
    times = Counter((draw.source, draw.record) for draw in drawn)
    assert {name: {times[name, record] for record in range(FEW[name])} for name in FEW} == {"a": {2}, "b": {4}, "c": {1, 2}}
    assert Counter(draw.source for draw in drawn) == {"a": 140, "b": 480, "c": 75}
    assert abs(Counter(draw.source for draw in drawn[: len(drawn) // 3])["b"] - 160) <= 2, "sources come in the shares of their epochs"
    weighed = _drawn(_stage(epochs={"a": 2, "b": 1, "c": 1}, mixture={"a": 1, "b": 3, "c": 4}))
    assert Counter(draw.source for draw in weighed[:8]) == {"a": 1, "b": 3, "c": 4}
    assert {draw.source for draw in weighed[-90:]} == {"a"}, "what is used up leaves its weight to the others"
    assert Counter(draw.source for draw in weighed) == {"a": 140, "b": 120, "c": 50}


def test_moving_weights_follow_the_planned_step_in_thousandths():
    mixture = mixture_of(_stage(mixture={"a": [0.2, 0.8], "b": 0.3, "c": [0, 0.3]}), SIZES)
    assert [mixture.mix(step).weights for step in (1, 2, 4, 9)] == [
        {"a": 400, "b": 600}, {"a": 500, "b": 375, "c": 125}, {"a": 571, "b": 214, "c": 214}, {"a": 571, "b": 214, "c": 214},
    ]  # fmt: skip
    assert mixture.shares() == pytest.approx({"a": 0.504, "b": 0.366, "c": 0.130}, abs=1e-3)
    assert fixed_mix({"a": 0.1, "b": 0.7, "c": 0.2}).weights == {"a": 1, "b": 7, "c": 2}
    assert thousandths({"a": Fraction(1), "b": Fraction(10**9), "c": Fraction(0)}) == {"a": 1, "b": 1000}


def test_a_source_whose_weight_is_yet_to_come_takes_over_from_one_that_is_used_up():
    mixture = mixture_of(_stage(mixture={"a": [1, 0], "b": [0, 1]}, epochs={"a": 1}), SIZES)
    assert mixture.mix(1).weights == {"a": 1000, "b": 1}


def test_weights_of_another_cadence_than_that_of_the_checkpoint_are_not_waited_for():
    mixture, old = Mixture({"a": Fraction(1), "b": Fraction(1)}, {"a": Fraction(1), "b": Fraction(1)}, 100), Resampled({"a": 500})
    resumed = WindowWeights(mixture, every=15, lag=3, posts={20: Resampled({"a": 100}), 30: old}, done=33)
    assert resumed.at(34) == Mix({"a": 333, "b": 667})
    assert WindowWeights(mixture, every=15, lag=3, done=33).at(34) == Mix({"a": 500, "b": 500})
    assert WindowWeights(mixture, every=15, lag=9, posts={30: Resampled({"a": 100})}, done=33).at(34) == Mix({"a": 91, "b": 909})
    assert WindowWeights(mixture, every=15, lag=3).at(18) == Mix({"a": 1, "b": 1})
    assert WindowWeights(mixture, every=15, lag=3).at(19) is None


@pytest.fixture(scope="module")
def encoder(digits):
    shape = ImageShape(8, 4, TilingConfig(max_rows=2, max_columns=3))
    return ChatEncoder(Tokenizer.from_file(str(digits / "tokenizer.json")), shape)


EVERY, LAG, STEPS = 2, 4, 9
MOVING = Mixture({"a": Fraction(1), "b": Fraction(3)}, {"a": Fraction(5), "b": Fraction(3)}, STEPS, {"a": 30})
COUNTS = {"a": 24, "b": 30}


class Run:
    """Ranks that train: each takes a step and then posts, at the cadence, weights and thinned records that depend on the step."""

    def __init__(self, encoder, size, prefetch, state=None, done=0, posts=(), mixture=MOVING, every=EVERY):
        meeting, self.done, self.size = Meeting(size), done, size
        records = {name: Records(count) for name, count in COUNTS.items()}
        packing = Packing(LENGTH, 4, 8, "skip", "bidirectional", 8, Cost(1.0, 0.01, 0.0, 9.0, 1))
        self.weights = [WindowWeights(mixture, every, LAG, dict(posts), done) for _ in range(size)]
        self.loaders = []
        for rank, weights in enumerate(self.weights):
            stream = SampleStream(COUNTS, SHOWN, 5, state.log if state else [])
            if state is None:
                stream.change(0, mixture.mix(1))
            place, exchange = Place(rank, size, rank, size), meeting.of(rank)
            options = {"weights": weights, "prefetch": prefetch, "done": done}
            self.loaders.append(Loader(stream, Reader(records, encoder), packing, place, exchange, state, **options))

    def step(self):
        batches = [next(loader) for loader in self.loaders]
        self.done += 1
        if self.done % EVERY == 0:
            post = Resampled({"a": 100 * self.done, "b": 1500}, {"b": bits(range(self.done, 30, 2), 30)}, 0.3)
            for weights in self.weights:
                weights.post(self.done, post)
        return batches


@pytest.mark.slow
@settings(max_examples=4)
@given(size=st.sampled_from([1, 2, 4]), prefetch=st.integers(1, 3), stopped=st.integers(1, STEPS - 1), resumed=st.sampled_from([1, 2]))
def test_posts_count_for_the_same_windows_on_any_layout_and_after_a_stop_at_any_step(encoder, size, prefetch, stopped, resumed):
    alone, together = Run(encoder, 1, 1), Run(encoder, size, prefetch)
    for _ in range(stopped):
        batches = together.step()
        assert _whole(batches) == _whole(alone.step())
    saved = json.loads(json.dumps([asdict(batches[0].state), {s: asdict(p) for s, p in together.weights[0].posts.items()}]))
    posts = {int(step): Resampled(**post) for step, post in saved[1].items()}
    _close(together.loaders)
    again = Run(encoder, resumed, prefetch, PackerState(**saved[0]), stopped, posts)
    while alone.done < STEPS:
        batches = again.step()
        assert _whole(batches) == _whole(alone.step())
    log = batches[0].state.log
    assert all(entry["first"] % 8 == 0 for entry in log), "weights changed inside a window"
    assert any(entry["mix"]["thinned"] for entry in log)
    assert log[-1]["places"]["a"] == 30, "the source that has an end was used up"
    _close(alone.loaders)
    _close(again.loaders)


@pytest.mark.slow
def test_a_loader_that_waits_for_a_post_can_be_closed(encoder):
    run = Run(encoder, 2, 1)
    for _ in range(EVERY + LAG - 1):  # after which post 2 is due for the plan of step 7, and is not there
        assert [next(loader) for loader in run.loaders]
    while not all(loader.planned == EVERY + LAG for loader in run.loaders):
        time.sleep(0.01)
    _close(run.loaders)


def _to_the_end(run):
    steps = []
    while True:
        try:
            steps.append(run.step()[0])
        except UserError as error:
            return steps, str(error)


@pytest.mark.parametrize("size", [1, 2])
def test_sources_that_are_used_up_give_every_record_and_then_an_error_on_all_ranks(encoder, size):
    run = Run(encoder, size, 3, mixture=Mixture(MOVING.start, MOVING.start, STEPS, COUNTS), every=0)
    steps, said = _to_the_end(run)
    assert said == (
        f"step {len(steps) + 1}: each source was shown as often as epochs of the stage allows, after {len(steps)} of its steps; lower "
        "its steps to that, or raise its epochs"
    )
    for other in run.loaders[1:]:
        with pytest.raises(UserError, match="each source was shown as often"):
            next(other)
    seen = Counter(one.position for step in steps for one in step.samples)
    assert set(seen.values()) == {1}
    assert len(seen) + len(steps[-1].state.carried) + sum(len(step.skipped) for step in steps) == sum(COUNTS.values())
    assert len(steps[-1].state.carried) < 4
    _close(run.loaders)
