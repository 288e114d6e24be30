"""Runs that meet bad data, bad numbers and bad settings: what can go on goes on and is counted, what cannot says what to do."""

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smalt.engine import checkpoints, launch
from smalt.engine.config import load_config
from smalt.engine.data.packing import PackerState
from smalt.engine.stage import Stage
from smalt.engine.train import main
from smalt.engine.trainer import open_data
from smalt.parallel import Watchdog, alone

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("error:No artists with labels"),
]
ONE_STAGE = {"stages.align": None, "evaluation": {}, "data.validation": {}, "checkpoint.every": 100}


@pytest.fixture
def run(tmp_path, capsys):
    """run(config, *arguments): train in this process into tmp_path/run; gives (exit code, what it said on stderr)."""

    def train_here(config, *arguments):
        code = main([str(config), "--folder", str(tmp_path / "run"), *arguments])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return train_here


@pytest.fixture
def lines(tmp_path):
    """lines(name): the JSON lines that the run wrote under that name."""
    return lambda name: [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


def _bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


@pytest.fixture
def spoiled(digits, tmp_path):
    """A file of 20 records, of which the first of each ten are spoiled, and what is wrong with which."""
    rows = pq.read_table(digits / "train" / "read.parquet").to_pylist()[:20]
    png = rows[0]["images"][0]["bytes"]
    rows[0]["images"][0]["bytes"] = png[: len(png) // 2]
    rows[1]["images"][0]["bytes"] = _bomb()
    rows[2]["images"][0]["bytes"] = b"404 not found"
    rows[3]["images"].append({"bytes": png, "path": None})
    rows[4]["images"][0] = {"bytes": None, "path": "gone.png"}
    rows[10]["messages"][0]["role"] = "human"
    rows[11]["messages"].pop()
    rows[12]["messages"] = []
    path = tmp_path / "spoiled.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(digits / "train" / "read.parquet")), path, row_group_size=7)
    causes = {
        0: "corrupt image", 1: "huge image", 2: "not an image", 3: "placeholder mismatch", 4: "missing image",
        10: "malformed message", 11: "no answer", 12: "no messages",
    }  # fmt: skip
    return path, causes


@pytest.mark.slow
def test_spoiled_records_are_skipped_named_and_counted(spoiled, tiny_config, train, lines, tmp_path):
    path, causes = spoiled
    changes = {**ONE_STAGE, "data.sources": {"photos": path}, "stages.sft.mixture": {"photos": 1.0}, "stages.sft.steps": 6}
    train([tiny_config(changes), "--folder", tmp_path / "run"])
    skipped, metrics = lines("skipped.jsonl"), lines("metrics.jsonl")
    assert {(s["source"], s["record"], s["cause"]) for s in skipped} == {("photos", i, cause) for i, cause in causes.items()}
    assert all(s["detail"] for s in skipped)
    counted = {key: n for key, n in metrics[-1].items() if "skipped" in key}
    assert counted == {f"records skipped: {cause}": n for cause, n in Counter(s["cause"] for s in skipped).items()}
    assert [m["step"] for m in metrics] == list(range(1, 7))
    assert all(m["documents/photos"] > 0 and m["loss"] > 0 for m in metrics)


@pytest.mark.slow
def test_a_source_of_nothing_but_bad_records_ends_the_run(spoiled, tiny_config, run, tmp_path):
    path, _ = spoiled
    pq.write_table(pq.read_table(path).slice(0, 5), tmp_path / "hopeless.parquet")
    changes = {**ONE_STAGE, "data.sources": {"photos": tmp_path / "hopeless.parquet"}, "stages.sft.mixture": {"photos": 1.0}}
    code, said = run(tiny_config(changes))
    assert code == 1
    assert said.startswith("error: no usable record: nothing of 2 steps in a row could be decoded (of the last: ")
    assert "corrupt image" in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("data.sources.read", "data source 'read'"),
        ("data.validation.read", "data source 'read'"),
        ("evaluation.sources.sum", "data source 'sum'"),
        ("data.tokenizer", "tokenizer"),
    ],
)
def test_missing_files_are_found_before_training(tiny_config, run, tmp_path, key, said):
    code, error = run(tiny_config({key: "nowhere/gone"}))
    assert code == 1
    assert error.startswith(f"error: {said}")
    assert "nowhere/gone does not exist" in error
    assert "smalt data digits" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_real_command_fails_with_one_clear_line(tiny_config, train, tmp_path):
    done = train([tiny_config({"data.sources.read": "gone.parquet"}), "--folder", tmp_path / "run"], check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: data source 'read': gone.parquet does not exist.")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_documents_longer_than_a_pack_are_skipped_and_counted(tiny_config, run, lines):
    code, _ = run(tiny_config({**ONE_STAGE, "stages.sft.sequence_length": 30}))
    assert code == 0
    skipped, metrics = lines("skipped.jsonl"), lines("metrics.jsonl")
    assert {s["cause"] for s in skipped} == {"longer than a pack"}
    assert metrics[-1]["records skipped: longer than a pack"] == len(skipped) > 0
    assert len(metrics) == 4


@pytest.mark.slow
def test_documents_longer_than_a_pack_can_be_split(tiny_config, run, lines):
    code, _ = run(tiny_config({**ONE_STAGE, "stages.sft.sequence_length": 30, "data.long_documents": "split"}))
    assert code == 0
    assert lines("skipped.jsonl") == []
    assert sum(m["loss_tokens"] for m in lines("metrics.jsonl")) > 0


@pytest.mark.slow
def test_steps_without_a_loss_token_are_skipped_and_counted(tiny_config, run, lines):
    """Pieces of 8 tokens: many hold nothing but a question, and one of them is a step."""
    changes = {"stages.sft.sequence_length": 8, "data.long_documents": "split", "data.packs_per_step": 1, "stages.sft.steps": 12}
    code, _ = run(tiny_config({**ONE_STAGE, **changes, "data.validation": {}}))
    assert code == 0
    metrics = lines("metrics.jsonl")
    empty = [m["loss_tokens"] == 0 for m in metrics]
    assert 0 < sum(empty) < 12
    assert metrics[-1]["steps skipped: no loss token"] == sum(empty)
    assert [m["grad_norm"] == 0 for m in metrics] == empty


@pytest.mark.slow
def test_held_out_documents_that_all_are_too_long_have_no_loss_rather_than_a_perfect_one(tiny_config, run, lines, digits):
    changes = {"stages.sft.sequence_length": 24, "data.validation": {"sum": digits / "held_out" / "sum.parquet"}}
    code, _ = run(tiny_config({**ONE_STAGE, **changes}))
    assert code == 0
    assert not any(key.startswith("validation_loss") for key in lines("metrics.jsonl")[-1])


@pytest.mark.slow
def test_a_diverging_run_stops_and_says_what_to_do(tiny_config, run, lines):
    arguments = "--stages.sft.learning-rate 1e30 --stages.sft.warmup-steps 0 --stages.sft.steps 20 --optimizer.max-bad-steps 3"
    code, said = run(tiny_config(ONE_STAGE), *arguments.split())
    assert code == 1
    assert "error: the loss or its gradient was not finite in 3 steps in a row, up to step 4; lower learning_rate" in said
    assert [m.get("steps skipped: non-finite", 0) for m in lines("metrics.jsonl")] == [0, 1, 2, 3]
    assert [(s["step"], s["action"], bool(s["samples"])) for s in lines("spikes.jsonl")] == [(n, "skip", True) for n in (2, 3, 4)]
    assert lines("metrics.jsonl")[-1]["loss"] is None


@pytest.mark.slow
def test_a_run_that_diverged_goes_on_from_before(tiny_config, run, lines, tmp_path):
    config = tiny_config({**ONE_STAGE, "checkpoint.every": 1, "checkpoint.keep": 3, "optimizer.max_bad_steps": 3})
    assert run(config, "--stages.sft.steps", "3", "--stages.sft.schedule", "constant")[0] == 0
    code, said = run(config, "--resume", "--stages.sft.steps", "20", "--stages.sft.learning-rate", "1e30")
    # The weights of step 4, whose loss was good, are those from which it diverged; what came after was not saved over the others.
    assert code == 1
    assert "not finite in 3 steps in a row, up to step 7" in said
    assert "step-00000004 is set aside as step-00000004.diverged; --resume goes on from step-00000003" in said
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004.diverged"]
    assert run(config, "--resume", "--stages.sft.steps", "6", "--stages.sft.learning-rate", "1e-3")[0] == 0
    assert all(line["loss"] is not None for line in lines("metrics.jsonl"))


@pytest.mark.slow
def test_a_run_that_ends_in_steps_that_are_not_finite_fails(tiny_config, run, tmp_path):
    arguments = "--stages.sft.learning-rate 1e30 --stages.sft.warmup-steps 0 --stages.sft.steps 3 --optimizer.max-bad-steps 9"
    code, said = run(tiny_config({**ONE_STAGE, "checkpoint.every": 1}), *arguments.split())
    assert code == 1
    assert "not finite in 2 steps in a row, up to step 3" in said
    assert "no checkpoint from before is left: begin anew" in said


@pytest.mark.slow
def test_steps_that_are_not_finite_are_counted_over_a_stop(tiny_config, run, monkeypatch, lines):
    arguments = "--stages.sft.learning-rate 1e30 --stages.sft.warmup-steps 0 --stages.sft.steps 20 --optimizer.max-bad-steps 4"
    train_step = Stage.train_step
    # As where SIGTERM comes in the third step.
    monkeypatch.setattr(Stage, "train_step", lambda self, batch, asked: train_step(self, batch, asked or self.done == 2))
    assert run(tiny_config({**ONE_STAGE, "checkpoint.every": 100}), *arguments.split())[0] == 0
    monkeypatch.undo()
    assert "not finite in 4 steps in a row, up to step 5" in run(tiny_config(ONE_STAGE), "--resume")[1]


@pytest.mark.slow
def test_a_run_that_stops_itself_waits_for_its_save_under_a_pause(tiny_config, run, monkeypatch):
    whole, pauses = checkpoints.save_snapshot, []
    watchdogs = []

    class Watched(Watchdog):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            watchdogs.append(self)

    def slow(*arguments):
        time.sleep(1)
        pauses.append(list(watchdogs[0]._pauses))
        whole(*arguments)

    monkeypatch.setattr(launch, "Watchdog", Watched)
    monkeypatch.setattr(checkpoints, "save_snapshot", slow)
    arguments = "--stages.sft.learning-rate 1e30 --stages.sft.warmup-steps 0 --stages.sft.steps 20 --optimizer.max-bad-steps 1"
    assert run(tiny_config({**ONE_STAGE, "checkpoint.every": 1}), *arguments.split())[0] == 1
    assert pauses == [["a checkpoint"]]


@pytest.mark.slow
def test_a_run_whose_end_cannot_be_saved_fails(tiny_config, run, monkeypatch, tmp_path):
    whole = checkpoints.save_snapshot

    def full(snapshot, folder, *rest):
        if folder.name.startswith("step-00000004"):
            raise OSError(28, "No space left on device")
        whole(snapshot, folder, *rest)

    monkeypatch.setattr(checkpoints, "save_snapshot", full)
    code, said = run(tiny_config({**ONE_STAGE, "stages.sft.steps": 4, "checkpoint.every": 2}))
    assert code == 1
    assert "No space left on device" in said
    assert "it was the last of this run: make room, then --continue --folder" in said


@pytest.fixture
def stage(tiny_config):
    """The stage sft of the tiny run, ready for its first step."""
    config = load_config(tiny_config())
    stage = Stage(config, "sft", alone(torch.device("cpu")), open_data(config), None, None)
    yield stage
    stage.close()


def _weights(stage):
    return torch.cat([p.detach().flatten().clone() for p in stage.model.parameters()])


def _moments(stage):
    return [t.clone() for state in stage.optimizer.state.values() for t in state.values()]


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_goes_on(stage):
    batches = stage.batches()
    assert stage.train_step(next(batches)).skipped is None
    weights, moments, batch = _weights(stage), _moments(stage), next(batches)
    poisoned = replace(batch, packs=[replace(batch.packs[0], tiles=batch.packs[0].tiles * float("nan")), *batch.packs[1:]])
    assert stage.train_step(poisoned).skipped == "non-finite"
    assert torch.equal(_weights(stage), weights)
    assert all(map(torch.equal, _moments(stage), moments))
    assert (stage.done, stage.loader_state) == (2, batch.state)
    result = stage.train_step(next(batches))
    assert result.skipped is None
    assert result.grad_norm > 0
    assert not torch.equal(_weights(stage), weights)


def test_a_step_without_a_loss_token_changes_nothing_and_is_not_a_bad_one(stage):
    weights = _weights(stage)
    batch = replace(next(stage.batches()), loss_tokens=0.0, state=PackerState(7, [(1, 0)]))
    result = stage.train_step(batch)
    assert (result.loss, result.grad_norm, result.skipped) == (0.0, 0.0, "no loss token")
    assert torch.equal(_weights(stage), weights)
    assert (stage.done, stage.loader_state) == (1, PackerState(7, [(1, 0)]))


LIMITED = """
import resource, sys
from smalt.engine.train import main
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc and RLIMIT_AS")
def test_out_of_memory_names_the_settings_and_what_holds_the_memory(tiny_config, tmp_path):
    """One layer of activations of 8192 tokens x 16384 takes 512 MiB a tensor; the process may have 1 GiB."""
    config = tiny_config({**ONE_STAGE, "stages.sft.sequence_length": 8192, "model.language.ffn": 16384, "data.packs_per_step": 1})
    command = [sys.executable, "-c", LIMITED, str(config), "--folder", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: out of memory in stage sft:")
    assert "weights 6.1 MiB, gradients" in done.stderr
    assert "optimiser state" in done.stderr
    assert "stages.sft.sequence_length (now 8192)" in done.stderr
    assert "Traceback" not in done.stderr


LATE = """
import os, time
real = time.strftime
time.strftime = lambda format, *t: real(format, *t) + ("-late" if os.environ.get("RANK") == "1" else "")
"""


@pytest.mark.slow
def test_processes_that_start_in_different_seconds_share_one_folder(tiny_config, train_command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LATE)
    command = train_command([tiny_config({**ONE_STAGE, "stages.sft.steps": 1})], nproc=2)
    command[command.index("engine/train.py")] = str(ROOT / "engine" / "train.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert not folder.name.endswith("late")
    assert len(list((folder / "checkpoints" / "step-00000001").glob("*.safetensors"))) == 2


def test_a_folder_that_holds_a_run_is_left_alone(tiny_config, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("the run of someone else")
    code, said = run(tiny_config())
    assert code == 1
    assert said.startswith(f"error: {tmp_path / 'run'} holds a run already; continue it with --resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.json"]


def test_resume_needs_a_run_and_a_checkpoint(tiny_config, run, tmp_path, monkeypatch, capsys):
    code, said = run(tiny_config(), "--resume")
    assert (code, said) == (1, f"error: {tmp_path / 'run'} holds no run to resume: config.json is missing\n")
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_config()), "--resume"]) == 1
    assert capsys.readouterr().err == "error: there is no run of 'tiny' under runs/ to resume\n"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(load_config(tiny_config()).model_dump_json())
    code, said = run(tiny_config(), "--resume")
    assert (code, said) == (1, f"error: {tmp_path / 'run' / 'checkpoints'} holds no checkpoint\n")


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_order_says_so(tiny_config, run, tmp_path):
    config = tiny_config({**ONE_STAGE, "stages.sft.steps": 2})
    assert run(config) == (0, "")
    _, said = run(config, "--resume", "--stages.sft.steps", "3")
    assert "another order" not in said
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text())
    cursor, carried = state["loader"]["cursor"], len(state["loader"]["carried"])
    code, said = run(config, "--resume", "--stages.sft.steps", "4", "--seed", "1")
    assert code == 0
    (warning,) = [line for line in said.splitlines() if "another order" in line]
    assert warning == (
        f"warning: stage 'sft' goes on at sample {cursor} of another order than that of its checkpoint (seed: 0, now 1): some "
        f"records come again and others never; {carried} documents that waited for a pack are given up"
    )


def test_a_wrong_value_is_said_before_anything_runs(tiny_config, run, tmp_path):
    code, said = run(tiny_config({"dtype": "float16"}))
    assert code == 1
    assert "dtype: Input should be 'float32', 'bfloat16' or 'float64' (given: 'float16')" in said
    assert not (tmp_path / "run").exists()
