"""The rule of loss spikes: what it leaves alone, what it never misses, and that a resumed run decides alike."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.engine.config import parse_config
from smalt.engine.data.loader import SampleId
from smalt.engine.errors import UserError
from smalt.engine.run_folder import RunFolder, read_config
from smalt.engine.sections import SpikesConfig
from smalt.engine.spikes import LEAST_LOG_NORM, LEAST_LOSS, SpikeRule, Verdict, write_spike
from smalt.engine.stage import stage_stream
from smalt.engine.trainer import open_data

DEFAULT = SpikesConfig(enabled=True)
SMALL = SpikesConfig(enabled=True, window=16, skips=3, raised=8, rollback_steps=10, max_rollbacks=2)
seeds = st.integers(0, 2**32 - 1)


def noisy(seed, steps, level=2.5, noise=0.05, norm_noise=0.3):
    """(loss, grad_norm) of a run whose loss is normal and whose norm is log-normal."""
    rng = np.random.default_rng(seed)
    losses = level + noise * rng.standard_normal(steps)
    return list(zip(losses.tolist(), np.exp(norm_noise * rng.standard_normal(steps)).tolist(), strict=True))


def actions(rule, run, first=1):
    return [rule.see(step, *values).action for step, values in enumerate(run, first)]


def filled(config=SMALL, seed=0, **noise):
    """A rule whose window is full, and its next step."""
    rule = SpikeRule(config)
    assert set(actions(rule, noisy(seed, config.window, **noise))) == {"ok"}
    return rule, config.window + 1


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.1, 12), st.floats(1e-4, 0.2), st.floats(0.05, 0.6))
def test_noise_never_trips_at_the_default(seed, level, noise, norm_noise):
    run = noisy(seed, 1500, level, noise * level, norm_noise)
    assert set(actions(SpikeRule(DEFAULT), run)) == {"ok"}


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(-1.0, 0.03), st.sampled_from(["line", "curve"]))
def test_a_falling_loss_and_a_slow_rise_never_trip(seed, slope, shape):
    # slope: of the loss a step, in standard deviations of its noise; the median lags 64 steps behind.
    run = noisy(seed, 1500)
    drift = [0.05 * slope * (i if shape == "line" else 1500 * math.log1p(i) / 20) for i in range(len(run))]
    rising = shape == "curve" and slope > 0
    if rising:
        drift = [0.05 * slope * i * i / 3000 for i in range(len(run))]
    assert set(actions(SpikeRule(DEFAULT), [(loss + d, norm) for (loss, norm), d in zip(run, drift, strict=True)])) == {"ok"}


@pytest.mark.slow
@settings(deadline=None)
@given(seeds, st.floats(1.0, 1e6), st.booleans(), st.floats(1e-4, 0.5), st.integers(0, 200))
def test_a_planted_spike_is_always_skipped(seed, size, in_the_loss, noise, later):
    rule = SpikeRule(DEFAULT)
    run = noisy(seed, DEFAULT.window + later, noise=noise)
    assert set(actions(rule, run)) == {"ok"}
    # Of the size at which no window of this noise can miss it: twice the limit, by the standard deviation of the noise.
    losses, norms = zip(*run, strict=True)
    scale = max(np.std(losses), LEAST_LOSS * 2.5)
    log_scale = max(np.std(np.log(norms)), LEAST_LOG_NORM)
    factor = 2 * DEFAULT.sigmas * size
    loss = np.median(losses) + (factor * scale if in_the_loss else 0)
    norm = np.median(norms) * math.exp(0 if in_the_loss else min(factor * log_scale, 600))
    assert rule.see(len(run) + 1, float(loss), float(norm)).action == "skip"
    assert set(actions(rule, noisy(seed + 1, 300, noise=noise), len(run) + 2)) == {"ok"}


def test_the_limit_is_counted_from_the_median_in_robust_deviations():
    # 1 .. 16 and its mirror image: median 8.5, median absolute deviation 4.
    config = SpikesConfig(enabled=True, window=16, sigmas=3.0)
    for above, action in ((2.99, "ok"), (3.01, "skip")):
        rule = SpikeRule(config)
        for step in range(1, 17):
            rule.see(step, float(step), 1.0)
        assert rule.see(17, 8.5 + above * 1.4826 * 4, 1.0).action == action
        # Of the norm, the logarithm: at the least deviation, for all were 1.
        rule = SpikeRule(config)
        for step in range(1, 17):
            rule.see(step, 2.0, 1.0)
        assert rule.see(17, 2.0, math.exp(above * LEAST_LOG_NORM)).action == action
        assert rule.see(18, 2.0 + above * LEAST_LOSS * 2.0, 1.0).action == action


def test_spikes_are_no_measure():
    rule, step = filled()
    before = rule.state()
    assert actions(rule, [(50.0, 1.0), (2.5, 1e9)], step) == ["skip", "skip"]
    assert rule.state() == {**before, "losses": before["losses"], "skipped": 2}


def test_spikes_in_a_row_go_back():
    rule, step = filled()
    verdicts = [rule.see(step + i, 50.0, 1.0) for i in range(3)]
    assert [v.action for v in verdicts] == ["skip", "skip", "rollback"]
    assert verdicts[-1].before == step - SMALL.rollback_steps
    assert verdicts[-1].reason.startswith("3 spikes in a row")


def test_a_good_step_between_spikes_begins_anew():
    rule, step = filled()
    assert actions(rule, [(50.0, 1.0), (50.0, 1.0), (2.5, 1.0)] * 5, step) == ["skip", "skip", "ok"] * 5


def test_a_loss_that_stays_up_goes_back():
    # Four deviations: no spike, but above half of the limit of six. The median must not follow it.
    rule, step = filled()
    window = list(rule.losses)
    up = float(np.median(window)) + 4 * 1.4826 * float(np.median(np.abs(np.array(window) - np.median(window))))
    verdicts = [rule.see(step + i, up, 1.0) for i in range(SMALL.raised)]
    assert [v.action for v in verdicts] == ["ok"] * (SMALL.raised - 1) + ["rollback"]
    assert verdicts[-1].before == step - SMALL.rollback_steps
    assert list(rule.losses) == window


def test_rollbacks_are_counted_and_end():
    rule, step = filled()
    saved = rule.state()
    found = []
    for _ in range(SMALL.max_rollbacks + 1):
        found.append(actions(rule, [(50.0, 1.0)] * SMALL.skips, step)[-1])
        rule.rolled_back(saved)
        step += SMALL.skips
    assert found == ["rollback", "rollback", "stop"]
    assert rule.state() == {**saved, "rollbacks": 3}


def test_without_a_checkpoint_the_new_level_is_learnt():
    rule, step = filled()
    assert actions(rule, [(5.0, 1.0)] * SMALL.skips, step)[-1] == "rollback"
    rule.accept()
    assert set(actions(rule, noisy(1, 200, level=5.0), step + 3)) == {"ok"}
    assert rule.see(300, 50.0, 1.0).action == "skip"


@settings(deadline=None)
@given(seeds, st.integers(0, 120), st.sets(st.integers(20, 119), max_size=30), st.integers(-10, 3))
def test_a_resumed_run_decides_alike(seed, at, spikes, near):
    # Spikes anywhere, and near the stop a loss that is four deviations up, long enough for a rollback.
    plateau = min(max(at + near, 20), 100)
    run = [(loss + 100 * (i in spikes), norm) for i, (loss, norm) in enumerate(noisy(seed, 120))]
    run[plateau : plateau + SMALL.raised] = [(2.7, 1.0)] * SMALL.raised
    whole, first = SpikeRule(SMALL), SpikeRule(SMALL)
    expected = [whole.see(i, *values) for i, values in enumerate(run)]
    before = [first.see(i, *values) for i, values in enumerate(run[:at])]
    resumed = SpikeRule(SMALL, json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + [resumed.see(i, *values) for i, values in enumerate(run[at:], at)] == expected
    assert resumed.state() == whole.state()


@settings(deadline=None)
@given(seeds, st.dictionaries(st.integers(0, 99), st.sampled_from([math.nan, math.inf, -math.inf])), st.booleans())
def test_what_is_not_finite_leaves_no_trace(seed, bad, in_the_norm):
    run = [(loss + 100 * (i == 60), norm) for i, (loss, norm) in enumerate(noisy(seed, 100))]
    clean, poisoned = SpikeRule(SMALL), SpikeRule(SMALL)
    for step, values in enumerate(run):
        if step in bad:
            before = poisoned.state()
            broken = (values[0], bad[step]) if in_the_norm else (bad[step], values[1])
            assert poisoned.see(step, *broken).action == "skip"
            assert poisoned.state() == before
        assert poisoned.see(step, *values) == clean.see(step, *values)


def test_a_norm_of_zero_is_no_spike_and_no_measure():
    rule, step = filled()
    before = list(rule.log_norms)
    assert rule.see(step, 2.5, 0.0).action == "ok"
    assert list(rule.log_norms) == before


def test_off_by_default_and_in_the_first_steps():
    off = SpikeRule(SpikesConfig())
    assert set(actions(off, [*noisy(0, 200), (1e9, 1e9)])) == {"ok"}
    assert off.state()["losses"] == []
    assert off.see(200, math.nan, 1.0).action == "skip"
    assert SpikeRule(SMALL).see(1, 1e9, 1e9).action == "ok"


def test_a_shorter_window_on_resuming_keeps_the_newest():
    rule, _ = filled(DEFAULT)
    shorter = SpikeRule(SMALL, rule.state())
    assert list(shorter.losses) == list(rule.losses)[-16:]


def test_samples_are_named(tmp_path):
    verdict = Verdict("rollback", "4 spikes in a row", 900)
    write_spike(tmp_path, 1000, verdict, 9.5, 40.0, [SampleId("read", 17, 3021), SampleId("sum", 4, 3022)])
    write_spike(tmp_path, 1001, Verdict("skip", "high"), math.nan, math.inf, [])
    first, second = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert first == {
        "step": 1000, "action": "rollback", "reason": "4 spikes in a row", "loss": 9.5, "grad_norm": 40.0,
        "samples": [{"source": "read", "record": 17, "position": 3021}, {"source": "sum", "record": 4, "position": 3022}],
    }  # fmt: skip
    assert (second["samples"], second["loss"], second["grad_norm"]) == ([], None, None)


def test_a_resumed_run_forgets_what_was_written_after_its_checkpoint(tmp_path, tiny_values):
    for step in (3, 5, 6):
        write_spike(tmp_path, step, Verdict("skip", "high"), 9.0, 30.0, [])
    folder = RunFolder(tmp_path, parse_config(tiny_values(), "config"), True)
    folder.begin(resume_step=5)
    folder.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "spikes.jsonl").read_text().splitlines()] == [3, 5]


@pytest.mark.parametrize("field", ["window", "sigmas", "skips", "raised"])
def test_wrong_values_are_refused(field):
    with pytest.raises(ValueError, match=field):
        SpikesConfig(**{field: 0})


# A rule so strict that every other step is a spike.
STRICT = {
    "spikes.enabled": True, "spikes.window": 16, "spikes.sigmas": 0.05, "spikes.skips": 2, "spikes.rollback_steps": 2,
    "checkpoint.every": 3,
    "spikes.max_rollbacks": 2, "checkpoint.keep": 30, "stages.align.steps": 2, "stages.sft.steps": 60, "evaluation.sources": {},
    "evaluation.budget_tasks": [],
}  # fmt: skip


def stream_of(folder):
    """Source and record of every position of the last stage's stream that the run has read."""
    config = read_config(folder)
    stream = stage_stream(config, "sft", open_data(config))
    return lambda position: (stream[position].source, stream[position].record)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_skips_goes_back_and_stops(nproc, tiny_config, tmp_path, train):
    folder = tmp_path / "run"
    done = train([tiny_config(STRICT), "--folder", folder], nproc=nproc, check=False)
    assert done.returncode != 0
    assert "after 2 rollbacks" in done.stderr
    assert "before --resume lower learning_rate of the stage, or raise spikes.sigmas or spikes.max_rollbacks" in done.stderr
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spikes = [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]
    assert [s["action"] for s in spikes].count("rollback") == 2
    assert spikes[-1]["action"] == "stop"
    assert metrics[-1]["rollbacks"] == 2
    assert metrics[-1]["steps skipped: spike"] == len(spikes)
    # What was saved between a checkpoint and the step that went back to it is given up, and nothing else.
    back = [int(step) for step in re.findall(r"the weights go back to those of step (\d+)", done.stdout)]
    ranges = [(low, s["step"]) for low, s in zip(back, (s for s in spikes if s["action"] == "rollback"), strict=True)]
    saved = {step for step in range(1, len(metrics) + 1) if step % 3 == 0}
    given_up = {step for step in saved if any(low < step < high for low, high in ranges)}
    assert given_up
    assert {int(path.name[5:]) for path in (folder / "checkpoints").iterdir()} == saved - given_up - {len(metrics)}
    read = stream_of(folder)
    for spike in spikes:
        assert spike["loss"] == metrics[spike["step"] - 1]["loss"]
        assert len(spike["samples"]) == sum(v for k, v in metrics[spike["step"] - 1].items() if k.startswith("documents/"))
        assert all((s["source"], s["record"]) == read(s["position"]) for s in spike["samples"])


@pytest.mark.slow
def test_a_resumed_run_goes_back_alike(tiny_config, tmp_path, train):
    # A save in every step, so that some fall on a step that went back.
    changes = {"spikes.max_rollbacks": 100, "checkpoint.every": 1, "checkpoint.keep": 80, "stages.sft.steps": 70}
    whole = tmp_path / "whole"
    train([tiny_config({**STRICT, **changes}), "--folder", whole])
    spikes = [json.loads(line) for line in (whole / "spikes.jsonl").read_text().splitlines()]
    steps = [s["step"] for s in spikes if s["action"] == "rollback"]
    assert len(steps) >= 2
    for step in (steps[0] - 1, steps[0], steps[-1]):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(whole, folder)
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        train(["--folder", folder, "--resume"])
        for name in ("metrics.jsonl", "spikes.jsonl"):
            assert without_speed(folder / name) == without_speed(whole / name), (step, name)


def without_speed(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_seconds", "cost_spread")} for line in lines]


def refused(every, keep, **spikes):
    """What is wrong with a run that keeps so many checkpoints; empty where nothing is."""
    stage = {"steps": 1, "sequence_length": 8, "mixture": {"a": 1.0}, "trainable": {"language": 1.0}, "learning_rate": 1.0}
    values = {
        "data": {"tokenizer": "a", "sources": {"a": "a"}}, "stages": {"sft": stage},
        "spikes": {"enabled": True, **spikes}, "checkpoint": {"every": every, "keep": keep},
    }  # fmt: skip
    try:
        parse_config(values, "config")
    except UserError as error:
        return str(error)
    return ""


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 60), st.integers(2, 50), st.integers(1, 60))
def test_a_run_keeps_as_many_checkpoints_as_a_rollback_can_need(every, rollback_steps, raised, skips):
    def reached(keep, step):
        """Whether a rollback that is decided in a step, before its own save, finds a checkpoint."""
        oldest = list(range(every, step, every))[-keep:][0]
        return oldest <= step - max(raised, skips) + 1 - rollback_steps

    rule = {"rollback_steps": rollback_steps, "raised": raised, "skips": skips}
    least = next(keep for keep in range(1, 200) if not refused(every, keep, **rule))
    for keep in (least - 1, least):
        if keep:
            assert all(reached(keep, step) for step in range(5000, 5000 + every)) == (keep == least)
    if least > 1:
        longest = f"raised = {raised}" if raised >= skips else f"skips = {skips}"
        assert refused(every, 1, **rule).endswith(f"before spikes.{longest} steps: keep {least}")
