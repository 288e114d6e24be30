"""Resampling: the rule, what it is measured by, and runs that are stopped, or on more processes, with the same weights."""

import copy
import itertools
import json
import shutil
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.config import load_config
from smalt.engine.data.mixture import Mixture
from smalt.engine.data.resampling import Streaks, source_factors
from smalt.engine.errors import UserError
from smalt.engine.resampler import LN2, Resampler
from smalt.engine.sections import ResamplingConfig
from smalt.engine.stage import Stage
from smalt.engine.train import main
from smalt.engine.trainer import open_data
from smalt.parallel import alone

EQUAL = {"falls": Fraction(1), "falls slowly": Fraction(1), "flat": Fraction(1)}


def test_weight_goes_to_the_sources_whose_lowest_loss_falls():
    lows = {"falls": [2.0, 1.5, 0.8], "falls slowly": [1.0, 0.8, 0.7], "flat": [1.1, 1.1, 1.1]}
    assert source_factors(lows, EQUAL, floor=0.1) == {"falls": 2260, "falls slowly": 640, "flat": 100}
    # A source of another weight takes its part of it.
    assert source_factors(lows, {**EQUAL, "flat": Fraction(6)}, floor=0.1)["falls"] == 5860
    assert source_factors({"falls": [1.0], "falls slowly": [0.5], "flat": []}, EQUAL, floor=0.1) == dict.fromkeys(lows, 1000)


@given(
    losses=st.lists(st.lists(st.floats(0, 20), min_size=3, max_size=3), min_size=3, max_size=3),
    weights=st.lists(st.fractions(Fraction(1, 100), 100), min_size=3, max_size=3),
    floor=st.floats(0.01, 1),
)
def test_no_source_dies_and_the_sum_of_the_weights_stays(losses, weights, floor):
    lows = dict(zip(EQUAL, (sorted(one, reverse=True) for one in losses), strict=True))
    weight = dict(zip(EQUAL, weights, strict=True))
    factors = source_factors(lows, weight, floor)
    assert all(factor >= max(1, int(1000 * floor) - 1) for factor in factors.values())
    mean = sum(weight[name] * factors[name] for name in EQUAL) / sum(weights)
    assert abs(mean - 1000) <= 1


def test_a_record_is_thinned_after_so_many_visits_of_one_kind_in_a_row():
    streaks = Streaks({"a": 5, "b": 3})
    for record, visits in enumerate(("+++", "---", "++-", "--+++", "")):
        for visit in visits:
            streaks.see("a", record, visit == "+")
    saved = json.loads(json.dumps(streaks.state()))
    again = Streaks({"a": 5, "b": 3}, saved)
    for one in (streaks, again):
        assert one.thinned(3)["a"].tolist() == [True, True, False, True, False]
        assert not one.thinned(3)["b"].any()
    assert not Streaks({"a": 6, "b": 3}, saved).thinned(3)["a"].any(), "the records of a file that has changed are others"
    for _ in range(300):
        again.see("b", 2, False)
    assert again.thinned(127)["b"].tolist() == [False, False, True]


RESAMPLING = {"every": 2, "lag": 3, "measurements": 3, "visits": 1, "kept": 0.5}
CHANGES = {
    "stages": {
        "sft": {
            "steps": 14, "sequence_length": 128, "learning_rate": 3e-3, "mixture": {"read": [0.2, 0.6], "sum": 0.4},
            "trainable": {"vision": 1.0, "projector": 1.0, "language": 1.0}, "resampling": RESAMPLING,
        },
    },
    "data.prefetch": 2, "data.window": 8, "dtype": "float64",
}  # fmt: skip


@pytest.fixture
def config_of(tiny_config, digits):
    """config_of(changes={}): a run that resamples, as a file."""
    validation = {task: digits / "held_out" / f"{task}.parquet" for task in ("read", "sum")}
    return lambda changes=(): tiny_config({**copy.deepcopy(CHANGES), "data.validation": validation, **dict(changes)})


def test_a_document_is_solved_where_every_target_token_has_more_than_half_of_the_probability(config_of):
    config = load_config(config_of())
    stage = Stage(config, "sft", alone(torch.device("cpu")), open_data(config), None, None)
    batch = next(batch for batch in stage.batches() if batch.firsts != sorted(batch.firsts))  # packs are not dealt in their order
    unsolved = stage.resampler.unsolved(batch, torch.device("cpu"))
    want, firsts = {}, iter(batch.firsts)

    def see(nll, shard):
        # A few tokens are foreseen, as an untrained model never does.
        nll = torch.where(torch.arange(len(nll)) % 3 == 0, 0.99 * LN2, nll)
        first = next(firsts)
        starts = [*(shard.positions == 0).nonzero().flatten().tolist(), len(nll)]
        for number, (low, high) in enumerate(itertools.pairwise(starts)):
            rows = [t for t in range(low, high) if shard.kv_start[t] == low and shard.labels[t] >= 0]
            if shard.kv_start[low] == low:
                want[first + number] = sum(float(nll[t]) >= LN2 for t in rows)
        unsolved.see(nll, shard)
        return nll.sum()

    stage.model.evaluate(batch.packs, see, 1)
    stage.close()
    assert dict(enumerate(unsolved.counts.tolist())) == want
    assert len(set(want.values())) > 2


def test_a_loss_that_is_not_finite_solves_nothing(config_of):
    config = load_config(config_of())
    stage = Stage(config, "sft", alone(torch.device("cpu")), open_data(config), None, None)
    batch = next(stage.batches())
    unsolved = stage.resampler.unsolved(batch, torch.device("cpu"))
    stage.model.evaluate(batch.packs, lambda nll, shard: unsolved.see(nll * float("nan"), shard) or nll.sum(), 1)
    stage.close()
    assert (unsolved.counts > 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.prefetch": 3}, "stages.sft.resampling.lag = 3 with data.prefetch = 3: make it larger than that"),
        (
            {"data.validation": {}},
            "resampling.every needs held-out records of each source; data.validation lacks read, sum",
        ),
        (
            {"data.long_documents": "split"},
            "stages.sft.resampling.visits with data.long_documents = 'split': a part of a record is no visit; set it to 0",
        ),
        ({"stages.sft.resampling": {"visits": 2}}, "stages.sft: resampling.visits without resampling.every"),
        (
            {"stages.sft.objective": "distillation", "stages.sft.teacher": "runs/teacher"},
            "stages.sft: resampling.visits with objective = 'distillation', which does not say what is solved: set it to 0",
        ),
        ({"stages.sft.mixture": {"read": [1, 0]}}, "stages.sft: mixture names no source with a weight above 0 at the last step"),
        (
            {"stages.sft.mixture": {"read": [1, -1]}},
            "stages.sft.mixture.read.1: Input should be greater than or equal to 0",
        ),
        ({"stages.sft.mixture": {"read": [1, 2, 3]}}, "stages.sft.mixture.read: Tuple should have at most 2 items"),
        ({"stages.sft.mixture": {"read": "much"}}, "stages.sft.mixture.read: Input should be a valid number"),
        ({"stages.sft.epochs": {"read": 0}}, "stages.sft.epochs.read: Input should be greater than 0"),
        ({"stages.sft.epochs": {"reed": 2}, "stages.sft.mixture": {}}, "stages.sft.epochs names reed; data.sources has read, sum"),
        (
            {"stages.sft.epochs": {"sum": 2}, "stages.sft.mixture": {"read": 1.0}},
            "stages.sft: epochs names sum, without a weight in mixture: give it one, or leave mixture out",
        ),
    ],
)
def test_a_wrong_config_is_named(config_of, changes, said):
    with pytest.raises(UserError, match=r".") as error:
        load_config(config_of(changes))
    assert said in str(error.value)


def test_of_a_source_that_is_gone_or_has_changed_no_record_is_thinned():
    config, mixture = ResamplingConfig(every=2, visits=1), Mixture(EQUAL, EQUAL, 100)
    before = Resampler(config, mixture, {"falls": 3, "flat": 3, "falls slowly": 3}, 0)
    for source in before.sizes:
        before.streaks.see(source, 1, solved=True)
    before.resample(2, dict.fromkeys(before.sizes, 1.0))
    after = Resampler(config, Mixture({"falls": Fraction(1)}, {"falls": Fraction(1)}), {"falls": 3, "flat": 4}, 2, before.state())
    assert after.weights.posts[2].thinned == {"falls": before.weights.posts[2].thinned["falls"]}
    assert after.weights.posts[2].factors == {"falls": 1000, "flat": 1000}


def test_the_last_bits_of_a_loss_change_no_weight():
    """Where nothing falls, noise would be all of the progress there is."""
    found = {}
    for noise in (0, 1e-7):
        resampler = Resampler(ResamplingConfig(every=1), Mixture(EQUAL, EQUAL, 100), dict.fromkeys(EQUAL, 3), 0)
        found[noise] = [
            resampler.resample(step, {"falls": loss, "falls slowly": 1.5 - noise * step, "flat": 1.0 + noise})[
                "resampling/factor/falls"
            ]
            for step, loss in enumerate((2.0, 2.0 - noise, 1.99 - noise), 1)
        ]
    assert found[1e-7] == found[0] == [1.0, 1.0, 2.8]


def test_held_out_records_that_fit_in_no_pack_are_named(config_of):
    config = load_config(config_of({"data.validation_documents": 1}))
    stage = Stage(config, "sft", alone(torch.device("cpu")), open_data(config), None, None)
    stage.close()
    with pytest.raises(UserError, match=r"stages.sft.resampling: no record of data.validation.sum fits in a pack of 128 tokens"):
        stage.resample({"validation_loss/read": 1.0})


def _posted(folder):
    return [json.loads(line) for line in (folder / "resampling.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_stopped_between_posts_and_one_on_two_processes_have_the_same_weights(
    config_of, tmp_path, train, figures, assert_same_run
):
    config, whole = config_of({"checkpoint.every": 1, "checkpoint.keep": 20}), tmp_path / "whole"
    assert main([str(config), "--folder", str(whole)]) == 0
    posted = _posted(whole)
    assert [line["step"] for line in posted] == [2, 4, 6, 8, 10, 12]
    assert any(line["resampling/factor/read"] != line["resampling/factor/sum"] for line in posted)
    assert posted[-1]["resampling/thinned/sum"] > 0
    # After post 6, which counts for windows that are not read yet.
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for checkpoint in (stopped / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > 7:
            shutil.rmtree(checkpoint)
    assert main(["--folder", str(stopped), "--resume"]) == 0
    assert _posted(stopped) == posted
    assert_same_run(stopped, whole)
    train([config_of(), "--folder", tmp_path / "two"], nproc=2)
    one, two = figures(whole), figures(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-9)
    assert _posted(tmp_path / "two") == posted
    for key in ("documents/read", "documents/sum", "tokens", "loss_tokens"):
        assert [line.get(key) for line in two] == [line.get(key) for line in one]
