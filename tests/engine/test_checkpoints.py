"""Checkpoints are whole or not there, hold no pickle, and survive a full disk."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from smalt.engine.checkpoints import latest_checkpoint
from smalt.engine.errors import UserError
from smalt.engine.inference import load_run

# All parts learn from the first step: every checkpoint has the same size.
ONE_STAGE = {"stages.align": None, "stages.sft.steps": 7}


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(kibibytes): a folder on a file system of that size."""
    mounted = []

    def mount(kibibytes):
        folder = tmp_path / "run" / "checkpoints"
        folder.mkdir(parents=True)
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train):
    """make(config): the folder of a finished run, made once."""
    made = []

    def make(config):
        if not made:
            made.append(tmp_path_factory.mktemp("finished") / "run")
            train([config, "--folder", made[0]])
        return made[0]

    return make


def size_of(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.mark.slow
def test_full_disk_goes_on(tiny_config, tmp_path, train, small_disk, finished):
    # Room for one checkpoint and a half: the first is written, every later one fails.
    one = size_of(latest_checkpoint(finished(tiny_config(ONE_STAGE)) / "checkpoints").path)
    checkpoints = small_disk(one * 3 // 2048)
    done = train([tiny_config(ONE_STAGE), "--folder", tmp_path / "run"], check=False)
    assert done.returncode == 1
    assert "it was the last of this run" in done.stderr
    assert "checkpoint of step 4 could not be written" in done.stdout
    assert "No space left on device" in done.stdout
    assert f"the last good one is {checkpoints / 'step-00000002'}" in done.stdout
    assert [p.name for p in checkpoints.iterdir()] == ["step-00000002"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 7
    assert last["checkpoints failed"] >= 1
    assert load_run(tmp_path / "run").model is not None


@pytest.mark.slow
def test_full_disk_stops(tiny_config, tmp_path, train, small_disk, finished):
    one = size_of(latest_checkpoint(finished(tiny_config(ONE_STAGE)) / "checkpoints").path)
    checkpoints = small_disk(one * 3 // 2048)
    done = train([tiny_config({**ONE_STAGE, "checkpoint.on_error": "stop"}), "--folder", tmp_path / "run"], check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "checkpoint.on_error" in done.stderr
    assert latest_checkpoint(checkpoints).step == 2


@pytest.mark.slow
def test_newest_are_kept_and_hold_no_pickle(tiny_config, finished):
    folders = sorted((finished(tiny_config(ONE_STAGE)) / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-00000006", "step-00000007"]
    for file in (f for folder in folders for f in folder.iterdir()):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="pt") as tensors:
                assert len(tensors.keys()) > 10


def test_nothing_unpickles():
    engine = Path(__file__).resolve().parents[2] / "engine"
    sources = [p.read_text() for p in engine.rglob("*.py")]
    assert len(sources) > 10
    assert not [s for s in sources if "import pickle" in s or "torch.load(" in s or "weights_only=False" in s]


@pytest.fixture
def damaged(tiny_config, tmp_path, finished):
    """A copy of the finished run with one bit of its newest checkpoint's weights flipped."""
    run = tmp_path / "copy"
    subprocess.run(["cp", "-r", finished(tiny_config(ONE_STAGE)), run], check=True)
    shard = next((run / "checkpoints" / "step-00000007").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    return run


def heard(run, said):
    return [
        line
        for line in said.splitlines()
        if line.startswith(f"warning: checkpoint {run / 'checkpoints' / 'step-00000007'} is damaged")
    ]


@pytest.mark.slow
def test_a_run_is_loaded_from_the_one_before_the_damaged(damaged, capfd):
    load_run(damaged)
    said = capfd.readouterr().err
    assert len(heard(damaged, said)) == 1
    assert "it is passed over, and left as it is" in said
    assert "step 6 is used instead" in said
    # A reader has no lock: it renames nothing.
    assert sorted(p.name for p in (damaged / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_goes_on_from_the_one_before_the_damaged(tiny_config, damaged, finished, train, nproc):
    # Of several processes the first alone verifies, sets aside and speaks; the others take its word.
    done = train([tiny_config(ONE_STAGE), "--folder", damaged, "--resume"], nproc=nproc)
    assert len(heard(damaged, done.stderr)) == 1
    assert done.stderr.count("step 6 is used instead") == 1
    assert sorted(p.name for p in (damaged / "checkpoints").iterdir()) == ["step-00000006", "step-00000007", "step-00000007.damaged"]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (damaged, finished(None))]
    ours, theirs = ([json.loads(line) for line in of_run] for of_run in lines)
    assert [line["step"] for line in ours] == list(range(1, 8))
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_every_process_ends_when_no_checkpoint_is_whole(tiny_config, damaged, train):
    (damaged / "checkpoints" / "step-00000006" / "state.json").unlink()
    done = train([tiny_config(ONE_STAGE), "--folder", damaged, "--resume"], nproc=2, check=False)
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert "holds no whole checkpoint, only step-00000006.damaged, step-00000007.damaged" in done.stderr


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        latest_checkpoint(tmp_path)
