"""The real command on DeepSpeed: the losses of the torch runtime, and checkpoints that go on from one to the other."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smalt.engine.config import load_config
from smalt.engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (the extra deepspeed)")
CHANGES = {
    "logging.validate_every": 2, "logging.norms_every": 2, "data.packs_per_step": 4, "checkpoint.every": 2, "checkpoint.keep": 9,
    "evaluation.sources": {}, "evaluation.budget_tasks": [],
}  # fmt: skip
EVERYTHING = dict.fromkeys(("vision", "projector", "language"), 1.0)
CONTINUED = {
    **CHANGES, "stages.align.trainable": EVERYTHING, "stages.align.schedule": "cosine", "stages.sft.schedule": "continued",
    "stages.sft.learning_rate": None, "stages.sft.warmup_steps": None,
}  # fmt: skip
ZERO = ["--parallel.runtime", "deepspeed", "--parallel.deepspeed.keep_whole", "0"]
RUNS = {"one": (1, []), "two": (2, []), "zero-3": (2, ZERO), "zero-2": (2, [*ZERO, "--parallel.deepspeed.stage", "2"])}
# A run on DeepSpeed may differ from one on torch by this many times what two runs on torch differ by, on one process and on two.
FACTOR = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs, tiny_config, train):
    """run(name, kind="begins"): the folder of a whole run of RUNS, whose second stage begins with a new optimiser or, if ``kind`` is
    "continues", goes on with that of the first; the first call trains."""

    def folder(name, kind="begins"):
        path = runs / f"{name}-{kind}"
        if not path.exists():
            num_processes, options = RUNS[name]
            changes = {"begins": CHANGES, "continues": CONTINUED}[kind]
            train([tiny_config(changes), "--folder", path, *options], nproc=num_processes)
        return path

    return folder


@pytest.fixture
def resumed(run, tmp_path, train):
    """resumed(name, options, nproc): what the run NAME computes when it goes on after step 4, in its second stage, otherwise."""

    def figures_after(name, options, nproc):
        folder = tmp_path / "resumed"
        shutil.copytree(run(name), folder)
        for step in (6, 7):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
        train(["--folder", folder, "--resume", *options], nproc=nproc)
        return figures(folder)

    return figures_after


def figures(folder):
    """What a run computed, by step: everything but its speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_seconds", "cost_spread")} for line in lines]


def differences(got, want):
    """The largest relative difference of each figure over all steps; what is no float must be the same."""
    found = {}
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys(), theirs["step"]
        for key, value in theirs.items():
            if not isinstance(value, float):
                assert ours[key] == value, (theirs["step"], key)
                continue
            apart = abs(ours[key] - value) / abs(value) if value else float(ours[key] != value)
            found[key] = max(found.get(key, 0.0), apart)
    return found


@pytest.fixture
def assert_same(run):
    """assert_same(figures, kind="begins"): they are those of torch on one process, as near as on two."""

    def check(got, kind="begins"):
        want = figures(run("one", kind))
        limits = differences(figures(run("two", kind)), want)
        assert any(key.startswith("norms/state/exp_avg_sq/language.blocks.0") for key in limits)
        assert any(key.startswith("norms/gradients/vision.blocks.0") for key in limits)
        assert any(key.startswith("validation_loss") for key in limits)
        found = differences(got, want)
        # Sixteen roundings of fp32, for a figure that two processes happen to hit.
        beyond = {key: (apart, limits[key]) for key, apart in found.items() if not apart <= FACTOR * max(limits[key], 2**-20)}
        assert not beyond

    return check


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["begins", "continues"])
@pytest.mark.parametrize("name", ["zero-2", "zero-3"])
def test_figures_of_torch(name, kind, run, assert_same):
    assert_same(figures(run(name, kind)), kind)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_goes_on_on_torch(nproc, resumed, assert_same):
    assert_same(resumed("zero-3", ["--parallel.runtime", "torch"], nproc))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--parallel.deepspeed.stage", "2", "--parallel.deepspeed.offload_optimizer", "cpu"]])
def test_goes_on_from_torch(options, resumed, assert_same):
    assert_same(resumed("two", [*ZERO, *options], 2))


@needs_deepspeed
@pytest.mark.slow
def test_goes_on_to_the_same_bits(run, resumed):
    assert resumed("zero-3", [], 2) == figures(run("zero-3"))


@needs_deepspeed
@pytest.mark.slow
def test_alone_without_torchrun(tiny_config, tmp_path, train):
    # The stages train different parts, and the answers are those of the gathered model.
    for name, options in (("torch", []), ("deepspeed", ZERO)):
        train([tiny_config(), "--folder", tmp_path / name, *options])
    assert (tmp_path / "torch" / "evaluation.json").read_text() == (tmp_path / "deepspeed" / "evaluation.json").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel.tp": 2}, ["tp = 2", "fsdp alone", 'set runtime to "torch"']),
        ({"parallel.pp": 2, "parallel.cp": 4}, ["pp = 2, cp = 4"]),
        ({"parallel.dp": 2}, ["dp = 2"]),
        ({"parallel.compile": True}, ["compile", "set compile to false"]),
        ({"parallel.checkpointing": "selective"}, ['checkpointing = "selective"', "stage = 2"]),
        ({"parallel.reshard_after_forward": True}, ["reshard_after_forward", "leave it out"]),
        ({"parallel.deepspeed.stage": 2, "parallel.deepspeed.offload_optimizer": "nvme"}, ["nvme", "stage 3"]),
        ({"parallel.deepspeed.offload_optimizer": "nvme"}, ["needs nvme_path"]),
        ({"parallel.deepspeed.stage": 1}, ["parallel.deepspeed.stage", "2 or 3"]),
        ({"parallel.deepspeed.stag": 2}, ["parallel.deepspeed.stag: unknown key; did you mean parallel.deepspeed.stage?"]),
        ({"optimizer.kind": "muon"}, ["optimizer.kind = 'muon'", "'adamw'"]),
        ({"optimizer.offload": "cpu"}, ["optimizer.offload = 'cpu'", "parallel.deepspeed.offload_optimizer"]),
        ({"dtype": "float64"}, ["dtype = 'float64'", "'float32'"]),
        (
            {"stages.sft.schedule": "continued", "stages.sft.learning_rate": None, "stages.sft.warmup_steps": None},
            ["stages.sft.schedule = 'continued', where the stage before does not train the same parts"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_deepspeed_cannot_do_is_an_error_of_the_config(changes, said, tiny_config):
    path = tiny_config({"parallel.runtime": "deepspeed", **changes})
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert not [words for words in said if words not in str(caught.value)], caught.value


def test_settings_of_deepspeed_are_not_read_on_torch(tiny_config):
    config = load_config(tiny_config({"parallel.deepspeed.stage": 2, "parallel.tp": 2, "optimizer.kind": "muon"}))
    assert (config.parallel.runtime, config.parallel.tp, config.optimizer.kind) == ("torch", 2, "muon")


@pytest.mark.slow
def test_without_the_library(tiny_config, tmp_path):
    arguments = [str(tiny_config()), "--folder", str(tmp_path / "run"), "--parallel.runtime", "deepspeed"]
    code = f"import sys; sys.modules['deepspeed'] = None; from smalt.engine.train import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "DeepSpeed cannot be imported" in done.stderr
    assert 'pip install "smalt[deepspeed]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_is_not_there(tiny_config, tmp_path, train):
    options = ["--parallel.deepspeed.offload_optimizer", "nvme", "--parallel.deepspeed.nvme_path", tmp_path / "gone"]
    done = train([tiny_config(), "--folder", tmp_path / "run", *ZERO, *options], check=False)
    assert done.returncode == 1
    assert f"parallel.deepspeed.nvme_path = {tmp_path / 'gone'}: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


@needs_deepspeed
@pytest.mark.slow
def test_a_disk_without_async_io(tiny_config, tmp_path, train):
    code = "from deepspeed.ops.op_builder import AsyncIOBuilder; print('answer', AsyncIOBuilder().is_compatible(verbose=False))"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    if "answer True" in subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout:
        pytest.skip("DeepSpeed's async_io can be built here")
    options = ["--parallel.deepspeed.offload_optimizer", "nvme", "--parallel.deepspeed.nvme_path", tmp_path]
    done = train([tiny_config(), "--folder", tmp_path / "run", *ZERO, *options], check=False)
    assert done.returncode == 1
    assert "DeepSpeed cannot build its async_io" in done.stderr
    assert "libaio" in done.stderr
    assert "Traceback" not in done.stderr
