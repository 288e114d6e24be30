"""DeepSpeed gives the numbers of one process, in fp32: as near as two runs of one process whose sums are in another order.

Real processes on gloo: deepspeed_ranks.py under torchrun, and the real command.
"""

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from smalt.parallel import alone

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (the extra deepspeed)")

# A run may differ from the reference by this many times what the reference differs from itself with the packs in other orders.
FACTOR, ORDERS = 8, 4
ROUNDING = 2.0**-23
DEFAULTS = {"variant": "", "trainable": "all", "autocast": False, "fault": None, "kind": "train", "ffn": None, "parallel": {}}
SHARDED = {"stage": 3, "keep_whole": 0}
ROWS = {
    "zero-2": {"deepspeed": {"stage": 2}},
    "zero-2-cpu": {"deepspeed": {"stage": 2, "offload_optimizer": "cpu"}},
    "zero-2-frozen tower": {"deepspeed": {"stage": 2}, "trainable": "frozen tower"},
    "zero-2-selective": {"deepspeed": {"stage": 2}, "parallel": {"checkpointing": "selective"}},
    "zero-3": {"deepspeed": SHARDED},
    "zero-3-whole": {"deepspeed": {"stage": 3}},  # every parameter is small
    "zero-3-cpu": {"deepspeed": {**SHARDED, "offload_optimizer": "cpu"}},
    "zero-3-projector only": {"deepspeed": SHARDED, "trainable": "projector only"},
    "zero-3-full": {"deepspeed": SHARDED, "parallel": {"checkpointing": "full"}},
    "zero-3-no prefetch": {"deepspeed": SHARDED, "parallel": {"prefetch": False}},
    "zero-3-untied text": {"deepspeed": SHARDED, "variant": "untied text"},
    "zero-3-bf16": {"deepspeed": SHARDED, "autocast": True},
}
PLANTED = {
    "zero-2-averaged": {"deepspeed": {"stage": 2}, "fault": "averaging left on"},
    "zero-3-averaged": {"deepspeed": SHARDED, "fault": "averaging left on"},
    "zero-3-blank": {"deepspeed": SHARDED, "variant": "text", "fault": "a blank tile not connected to the loss"},
}
OTHERS = {
    f"{kind}-{name}": {"deepspeed": deepspeed, "kind": kind}
    for kind in ("go on", "skip", "fill")
    for name, deepspeed in (
        ("zero-2", {"stage": 2}),
        ("zero-2-cpu", {"stage": 2, "offload_optimizer": "cpu"}),
        ("zero-3", SHARDED),
        ("zero-3-cpu", {**SHARDED, "offload_optimizer": "cpu"}),
    )
}
FIRST_STEP = ("loss 0", "evaluated", "norm 0", "clipped 0")
# Large enough that DeepSpeed swaps: it keeps groups under a megabyte in memory.
WIDE = 8192
NVME = {"nvme": {"kind": "train"}, "go on-nvme": {"kind": "go on"}, "skip-nvme": {"kind": "skip"}}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(folder, rows, num_processes):
    """What each row left, by its name: a result, or an error as text."""
    rows = [{**DEFAULTS, **row, "name": name} for name, row in rows.items()]
    (folder / "rows.json").write_text(json.dumps(rows))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    done = subprocess.run(
        [*torchrun, str(HERE / "deepspeed_ranks.py"), str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    found = {row["name"]: done.stdout[-2000:] + done.stderr[-4000:] for row in rows}
    found |= {path.stem: path.read_text() for path in folder.glob("*.error")}
    return found | {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes found in each row."""
    return launch(tmp_path_factory.mktemp("two"), {**ROWS, **PLANTED, **OTHERS}, 2)


@pytest.fixture(scope="module")
def results_of_three(tmp_path_factory):
    """What three processes found: parameters do not divide by them, and three is no power of two."""
    rows = {f"go on-zero-{d['stage']}": {"deepspeed": d, "kind": "go on"} for d in ({"stage": 2}, SHARDED)}
    return launch(tmp_path_factory.mktemp("three"), rows, 3)


@pytest.fixture(scope="module")
def results_with_nvme(tmp_path_factory):
    """What two processes found with the optimiser's state on a disk; skips where async_io cannot be built."""
    if not can_build_async_io():
        pytest.skip("DeepSpeed's async_io cannot be built here: it needs libaio and its headers")
    disk = tmp_path_factory.mktemp("disk")
    deepspeed = {**SHARDED, "offload_optimizer": "nvme", "nvme_path": str(disk)}
    found = launch(tmp_path_factory.mktemp("nvme"), {n: {**row, "deepspeed": deepspeed, "ffn": WIDE} for n, row in NVME.items()}, 2)
    return found | {"left on the disk": [path.name for path in disk.iterdir()]}


def can_build_async_io():
    code = "from deepspeed.ops.op_builder import AsyncIOBuilder; print('answer', AsyncIOBuilder().is_compatible(verbose=False))"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return "answer True" in subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def reference():
    """reference(row): what one process finds, and by how much it differs from itself when the packs come in other orders."""
    ranks, known = load(HERE / "deepspeed_ranks.py"), {}

    def run(row, order):
        if row["autocast"] or row["ffn"]:
            return ranks.train(row, alone(torch.device("cpu")), order)
        make_steps = ranks.workload.make_steps
        with patch.object(ranks.workload, "make_steps", lambda *args: [order(packs) for packs in make_steps(*args)]):
            return ranks.workload.run_reference(row["variant"], row["trainable"], "float32")

    def get(row):
        row = {**DEFAULTS, **row}
        key = tuple(row[k] for k in ("variant", "trainable", "autocast", "ffn"))
        if key not in known:
            first = run(row, lambda packs: packs)
            others = [run(row, lambda packs, seed=seed: random.Random(seed).sample(packs, len(packs))) for seed in range(ORDERS)]
            apart = [differences(other, first) for other in others]
            known[key] = first, {figure: max(d[figure] for d in apart) for figure in apart[0]}
        return known[key]

    return get


def differences(got, want):
    """Errors by figure: of scalars relative; of tensors max|a - b| / max(max|b|, s), s 1e-3 times the RMS of all of their kind."""
    found = {}
    for kind in ("loss", "norm", "clipped"):
        found |= {f"{kind} {i}": abs(g - w) / abs(w) for i, (g, w) in enumerate(zip(got[kind], want[kind], strict=True))}
    found["evaluated"] = abs(got["evaluated"] - want["evaluated"]) / abs(want["evaluated"])
    for kind in ("gradients", "parameters"):
        assert got[kind].keys() == want[kind].keys()
        tensors = [t.double() for t in want[kind].values() if t is not None]
        floor = 1e-3 * math.sqrt(sum(t.square().sum().item() for t in tensors) / sum(t.numel() for t in tensors))
        for name, tensor in want[kind].items():
            one_sided = (got[kind][name] is None) != (tensor is None)
            found[f"{kind} {name}"] = math.inf if one_sided else 0.0 if tensor is None else error(got[kind][name], tensor, floor)
    return found


def error(got, want, floor):
    assert got.shape == want.shape
    apart = (got.double() - want.double()).abs().max().item() / max(want.double().abs().max().item(), floor)
    return math.inf if math.isnan(apart) else apart


def beyond(got, expected):
    """The figures that differ by more than they may, with what they may."""
    want, apart = expected
    found = differences(got, want)
    limits = {figure: FACTOR * max(apart[figure], ROUNDING) for figure in found}
    return {figure: (value, limits[figure]) for figure, value in found.items() if not value <= limits[figure]}


def result_of(results, name):
    assert isinstance(results[name], dict | list), f"no result of {name}: {results[name]}"
    return results[name]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_numbers_of_one_process(name, results, reference):
    got, expected = result_of(results, name), reference(ROWS[name])
    assert min(expected[0]["norm"]) > 0.5, "nothing would be clipped"
    assert all(torch.equal(got["initial"][n], p) for n, p in expected[0]["initial"].items())
    found = beyond(got, expected)
    if ROWS[name].get("autocast"):
        # Under ZeRO-3 every linear map is DeepSpeed's own, which rounds a bias to bfloat16 in another place; they are 0 at first.
        found = {figure: value for figure, value in found.items() if figure in FIRST_STEP or figure.startswith("gradients")}
    assert not found


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-2-averaged", "zero-3-averaged"])
def test_gradients_that_are_averaged_are_found(name, results, reference):
    found = beyond(result_of(results, name), reference(PLANTED[name]))
    assert found["norm 0"][0] == pytest.approx(0.5, rel=1e-3)
    assert sum(figure.startswith("gradients") for figure in found) > 50
    assert "loss 0" not in found


@needs_deepspeed
@pytest.mark.slow
def test_parameters_without_a_gradient_are_named(results):
    assert "no gradient reached vision." in results["zero-3-blank"]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OTHERS if n.startswith("go on")])
def test_goes_on_from_its_state(name, results):
    assert_went_on(result_of(results, name))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["go on-zero-2", "go on-zero-3"])
def test_goes_on_where_parameters_do_not_divide(name, results_of_three):
    assert_went_on(result_of(results_of_three, name))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OTHERS if n.startswith("fill")])
def test_weights_that_are_filled_in_are_those_that_it_steps(name, results):
    found = result_of(results, name)
    filled = found["fresh"] | found["values"]
    assert 0 < len(found["values"]) < len(filled)
    assert not [n for n, tensor in filled.items() if not torch.equal(found["filled"][n], tensor)]
    # A step of AdamW is at most the rate, with decay.
    assert max((found["stepped"][n] - tensor).abs().max().item() for n, tensor in filled.items()) < 0.03


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OTHERS if n.startswith("skip")])
def test_steps_that_are_not_taken_change_nothing(name, results):
    assert_skipped(*result_of(results, name))


def assert_went_on(found):
    for kind in ("parameters", "moments"):
        first, *others = found[kind]
        assert not [n for other in others for n, p in first.items() if not torch.equal(p, other[n])], kind
    assert found["last"][0] == found["last"][1] == found["last"][2]
    assert any(n.startswith("optimizer.exp_avg_sq.") and p.abs().max() > 0 for n, p in found["moments"][0].items())
    assert {p.item() for n, p in found["moments"][0].items() if n.startswith("optimizer.step.")} == {3.0}


def assert_skipped(plain, spoiled):
    assert not plain["skipped"]
    finite = [(math.isfinite(loss), math.isfinite(norm)) for loss, norm in spoiled["skipped"]]
    assert finite == [(False, False), (True, False), (True, True)] * 3
    for kind in ("parameters", "moments"):
        assert not [n for n, p in plain[kind].items() if not torch.equal(p, spoiled[kind][n])], kind


@needs_deepspeed
@pytest.mark.slow
def test_state_on_a_disk(results_with_nvme, reference):
    assert not beyond(result_of(results_with_nvme, "nvme"), reference({"ffn": WIDE}))
    assert_went_on(result_of(results_with_nvme, "go on-nvme"))
    assert_skipped(*result_of(results_with_nvme, "skip-nvme"))
    assert not results_with_nvme["left on the disk"]
