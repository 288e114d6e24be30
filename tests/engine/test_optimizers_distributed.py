"""Optimisers and norms on meshes of 2 and 4 real processes compute what one process computes (tests/engine/optimizer_processes.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "optimizer_processes.py"
KINDS = ("adamw", "smalt_adamw", "muon", "adamw, offload", "smalt_adamw, offload")


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """(number of processes, what each case found), from one start of the processes."""
    path = tmp_path_factory.mktemp("processes") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param), SCRIPT, path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, json.loads(path.read_text())


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_state_after_three_steps(found, layout, kind):
    assert found[1][layout][kind] < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_keeps_its_share_of_the_state(found, kind):
    processes, cases = found
    assert cases["fsdp"][f"{kind}: share of the state"] < 1.1 / processes
    assert cases["hsdp"][f"{kind}: share of the state"] < 1.1 / (processes / 2)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_weights_gradients_and_state(found, layout, kind):
    assert found[1][layout][f"{kind}: norms"] < 1e-12


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_stochastic_rounding_gives_the_bits_of_one_process(found, layout):
    for name, different in found[1][layout].items():
        if name.startswith("rounded"):
            assert different == 0, name


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_offload_changes_no_bit(found, layout):
    different = {name: value for name, value in found[1][layout].items() if name.startswith("offload bits")}
    assert len(different) == 2
    assert not any(different.values()), different


def test_muon_on_tensor_parallelism(found):
    processes, cases = found
    cases = {name: values for name, values in cases.items() if name.startswith("tp")}
    assert len(cases) == (3 if processes == 4 else 1)
    for name, values in cases.items():
        assert values["strided"] == 3, name
        assert values["error"] < 1e-10, name
        assert values["norm"] < 1e-12, name


def test_each_matrix_is_computed_once_among_those_that_share_it(found):
    for name, values in found[1].items():
        if name.startswith("tp"):
            assert values["matrices computed"] == values["matrices"], name


def test_any_placements(found):
    assert found[1]["placements"]["norms"] < 1e-12
    assert found[1]["placements"]["exchange"] < 1e-12


@pytest.mark.parametrize("values", [{"kind": "muon"}, {"kind": "smalt_adamw", "offload": "cpu"}], ids=lambda v: v["kind"])
def test_real_runs_resume_on_the_other_number_of_processes(tiny_config, tmp_path, train, values):
    changes = {"dtype": "float64", "checkpoint.every": 5, "checkpoint.keep": 3, "stages.sft.vision_layer_decay": 0.8}
    config = tiny_config({**changes, **{f"optimizer.{key}": value for key, value in values.items()}})
    one, two = tmp_path / "one", tmp_path / "two"
    train([config, "--folder", one])
    train([config, "--folder", two], nproc=2)
    want = metrics(one)
    assert len(want) == 7
    assert same_losses(metrics(two), want)
    # As if killed after step 5: its checkpoint is then the newest.
    (two / "checkpoints" / "step-00000007").rename(tmp_path / "gone")
    train([config, "--folder", two, "--resume"])
    assert same_losses(metrics(two), want)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_losses(ours, theirs):
    keys = ("step", "loss", "grad_norm")
    return [[line[k] for k in keys] for line in ours] == [pytest.approx([line[k] for k in keys], rel=1e-10) for line in theirs]
