"""The real command on any layout gives the losses of one process, and goes on from a checkpoint of any other layout."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from smalt.engine.export import export_run

CHANGES = {
    "dtype": "float64", "logging.validate_every": 2, "data.packs_per_step": 4, "model.language.num_layers": 4,
    "model.language.num_kv_heads": 2, "stages.align.steps": 2, "stages.sft.steps": 5, "checkpoint.every": 4, "checkpoint.keep": 9,
    "evaluation.sources": {}, "evaluation.budget_tasks": [], "logging.norms_every": 3,
}  # fmt: skip
# What each run is started on, and what goes on from its checkpoint after step 4.
LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp2-kept": (2, {"reshard_after_forward": False}),
    "cp2": (2, {"cp": 2}),
    "pp2-zero_bubble": (2, {"pp": 2, "schedule": "zero_bubble"}),
    "fsdp2xtp2": (4, {"tp": 2}),
    "pp2xfsdp2": (4, {"pp": 2}),
    "dp2xcp2-scatter": (4, {"dp": 2, "cp": 2, "context": "scatter"}),
}
NEXT = [("fsdp2", "pp2xfsdp2"), ("pp2xfsdp2", "cp2"), ("fsdp2xtp2", "fsdp2"), ("dp2xcp2-scatter", "fsdp2xtp2")]


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_seconds", "cost_spread")} for line in lines]


def options(layout):
    return [word for key, value in LAYOUTS[layout][1].items() for word in (f"--parallel.{key}", str(value))]


def assert_same(got, want):
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys(), theirs["step"]
        for key, value in theirs.items():
            expected = pytest.approx(value, rel=1e-10, abs=1e-12) if isinstance(value, float) else value
            assert ours[key] == expected, (theirs["step"], key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def config(tiny_config):
    return tiny_config(CHANGES)


@pytest.fixture
def run(runs, config, train):
    """run(layout): the folder of a whole run on it; the first call trains."""

    def folder(layout):
        path = runs / (layout or "one")
        if not path.exists():
            size = LAYOUTS[layout][0] if layout else 1
            train([config, "--folder", path, *(options(layout) if layout else [])], nproc=size)
        return path

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_one_process(layout, run):
    want = figures(run(None))
    assert any(key.startswith("norms/state/exp_avg/language.blocks.3") for key in want[4])
    assert any(key.startswith("validation_loss") for key in want[3])
    assert_same(figures(run(layout)), want)
    # The same order, packing and cursor: what a loader goes on from.
    states = [json.loads((run(name) / "checkpoints" / "step-00000007" / "state.json").read_text()) for name in (layout, None)]
    assert states[0]["loader"] == states[1]["loader"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_weights_are_those_of_one_process(layout, run, tmp_path):
    got, want = ({}, {})
    for folder, found in ((run(layout), got), (run(None), want)):
        out = tmp_path / folder.name
        for name in export_run(folder, out).files:
            found.update(load_file(out / name))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        # AdamW divides gradients that are zero but for rounding by an epsilon of 1e-8.
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), NEXT, ids="-then-".join)
def test_goes_on_from_the_checkpoint_of_another_layout(first, then, run, tmp_path, train):
    whole = run(first)
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000007")
    # The axes of the first run are in the folder's config: those that the second does not name go back to 1.
    back = {"pp": 1, "dp": 1, "cp": 1, "tp": 1, "schedule": "1f1b", "context": "gather", **LAYOUTS[then][1]}
    words = [word for key, value in back.items() for word in (f"--parallel.{key}", str(value))]
    train(["--folder", folder, "--resume", *words], nproc=LAYOUTS[then][0])
    assert_same(figures(folder), figures(run(None)))


@pytest.mark.slow
def test_axes_that_do_not_fit_are_an_error(config, tmp_path, train):
    done = train([config, "--folder", tmp_path / "a", "--parallel.tp", "3"], nproc=2, check=False)
    assert (
        "parallel: pp 1 x dp 1 x cp 1 x tp 3 (times fsdp, which takes what is left) do not multiply to the 2 processes" in done.stderr
    )
    done = train([config, "--folder", tmp_path / "b", "--parallel.pp", "2", "--data.packs_per_step", "3"], nproc=2, check=False)
    assert "a pipeline of 2 ranks needs a multiple of 2 packs a step on each data rank, and has 3" in done.stderr
    done = train([config, "--folder", tmp_path / "c", "--parallel.tp", "2", "--model.language.ffn", "63"], nproc=2, check=False)
    assert "model.language.ffn = 63 is not a multiple of tp = 2" in done.stderr
