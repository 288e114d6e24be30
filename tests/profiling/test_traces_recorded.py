"""Traces of real processes: what overlaps is a matter of order, and that is what is tested; never how long it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalt.profiling.bench_overlap import bench_overlap, print_report
from smalt.profiling.record import TraceRecorder, recording_folder
from smalt.profiling.trace_report import overlap_report
from smalt.profiling.traces import intersection, read_traces

BLOCKS = ("0", "1", "2", "3")


def record(folder, steps, **options):
    recorder = TraceRecorder(folder, 0, **options)
    square = torch.randn(50, 50)
    for _ in range(steps):
        square.mm(square)
        recorder.step()
    recorder.close()
    return [number for number, _, _ in read_traces(folder)[0].steps] if folder.exists() else None


def test_steps_that_are_recorded(tmp_path):
    assert record(tmp_path / "a", 6, first_step=2, num_steps=3) == [2, 3, 4]
    assert record(tmp_path / "b", 3, first_step=1, num_steps=1) == [1]
    assert record(tmp_path / "c", 6, first_step=2, num_steps=3, done=2) == [3, 4]
    assert record(tmp_path / "d", 6, first_step=2, num_steps=2, done=3) is None
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["rank-00000.json.gz"]
    trace = read_traces(tmp_path / "a")[0]
    assert (trace.rank, trace.world_size, trace.device) == (0, 1, "cpu")
    # Each step has its product.
    assert all(intersection(trace.compute, [(start, end)]) for _, start, end in trace.steps)


def test_every_life_of_a_run_has_a_folder_of_its_own(tmp_path, capsys):
    def begins(done):
        return recording_folder(tmp_path, 6, 3, done).name

    assert begins(0) == "step-00000006"
    (tmp_path / "step-00000006").mkdir()
    # Killed, and gone on from a checkpoint: of step 7, of step 5, and so once more.
    assert begins(7) == "step-00000008"
    assert begins(5) == "step-00000006-2"
    (tmp_path / "step-00000006-2").mkdir()
    assert begins(0) == "step-00000006-3"
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("num_steps", "done", "said"), [(3, 6, "only 7 to 8 are"), (3, 8, "none is"), (3, 5, None), (0, 9, None)])
def test_steps_that_are_over_and_were_not_recorded_are_named(tmp_path, capsys, num_steps, done, said):
    recording_folder(tmp_path, 6, num_steps, done)
    warned = f"warning: steps 6 to 8 were to be recorded (logging.trace_steps); the run goes on after step {done}: {said}\n"
    assert capsys.readouterr().err == (warned if said else "")


def test_runs_that_end_early(tmp_path):
    assert record(tmp_path / "two", 3, first_step=2, num_steps=9) == [2, 3]
    assert record(tmp_path / "none", 1, first_step=2, num_steps=9) is None
    assert record(tmp_path / "warm", 1, first_step=3, num_steps=9) is None
    assert record(tmp_path / "short", 1, first_step=9, num_steps=9) is None
    # An end in the middle leaves the profiler usable.
    assert record(tmp_path / "after", 3, first_step=2, num_steps=1) == [2]


def test_nothing_is_recorded_for_no_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("smalt.profiling.record.profile", None)
    monkeypatch.setattr("smalt.profiling.record.record_function", None)
    assert record(tmp_path / "run", 3, first_step=1, num_steps=0) is None


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    worker = Path(__file__).with_name("overlap_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker), str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def gathers(trace, prefix="", nbytes=4 * 8 * 512**2):
    """Of each block's all-gathers, forward and backward: in how many of the recorded steps they were in flight over compute.

    The first all-gather of a block in a step is that of the forward pass, the second that of the backward pass.
    """
    counts = {}
    for _, start, end in trace.steps:
        for block in BLOCKS:
            label = f"FSDP::all_gather ({prefix}{block})"
            found = [c for c in trace.collectives if c.label == label and start <= c.start < end]
            assert [(c.kind, c.axis, c.estimated) for c in found] == [("all_gather", "fsdp_cp", False)] * 2
            # Whole parameters of a block.
            assert {c.nbytes for c in found} == {nbytes}
            for name, c in zip(("forward", "backward"), found, strict=True):
                counts[name, block] = counts.get((name, block), 0) + bool(intersection([(c.start, c.end)], trace.compute))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_prefetched_all_gathers_are_in_flight_during_compute(recorded, rank):
    # Block 0 has nobody to prefetch it in the forward pass, block 3 nobody in the backward pass.
    forward, backward = {("forward", b) for b in BLOCKS[1:]}, {("backward", b) for b in BLOCKS[:-1]}
    counts = {name: gathers(read_traces(recorded / name)[rank]) for name in ("prefetch", "at-once", "backward-only")}
    overlapped = {name: {key for key, count in found.items() if count} for name, found in counts.items()}
    # A launched transfer can be over before the next operator begins, on a busy machine; hardly so in every step.
    assert overlapped["prefetch"] == forward | backward
    assert overlapped["at-once"] == set()
    assert overlapped["backward-only"] == backward


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_engine_prefetches(recorded, rank):
    nbytes = 4 * (4 * 512 * 512 + 3 * 512 * 512 + 2 * 512)  # attention, feed-forward, two norms
    counts = {name: gathers(read_traces(recorded / name)[rank], "language.blocks.", nbytes) for name in ("engine", "engine-late")}
    overlapped = {name: {key for key, count in found.items() if count} for name, found in counts.items()}
    ahead = {("forward", b) for b in BLOCKS[1:]} | {("backward", b) for b in BLOCKS[:-1]}
    assert overlapped["engine"] >= ahead
    assert not overlapped["engine-late"]


def overlaps(trace, kind):
    """Of the exchanges of cp of a kind, one after the other as in each step: whether any was in flight over compute."""
    found = []
    for _, start, end in trace.steps:
        own = [c for c in trace.collectives if (c.kind, c.axis) == (kind, "cp") and start <= c.start < end]
        found.append([bool(intersection([(c.start, c.end)], trace.compute)) for c in own])
    return [any(step) for step in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_keys_come_while_a_layer_computes(recorded, rank):
    # Two layers. Nothing can be computed before the first keys are there, nor while the gradients of the first go home.
    trace = read_traces(recorded / "keys-in-parts")[rank]
    assert overlaps(trace, "all_gather") == 2 * [False, True, True, True]
    assert overlaps(trace, "reduce_scatter") == 2 * [True, True, True, False]
    whole = read_traces(recorded / "keys-whole")[rank]
    assert overlaps(whole, "all_gather") == overlaps(whole, "reduce_scatter") == [False, False]


@pytest.mark.slow
def test_report_of_real_traces(recorded):
    reports = {name: overlap_report(read_traces(recorded / name))["together"] for name in ("prefetch", "at-once")}
    for together in reports.values():
        kinds = {(row["axis"], row["kind"]): row for row in together["kinds"]}
        assert {key: row["count"] / together["num_steps"] for key, row in kinds.items()} == {
            ("fsdp_cp", "all_gather"): 8, ("fsdp_cp", "reduce_scatter"): 4,
        }  # fmt: skip
        assert kinds["fsdp_cp", "reduce_scatter"]["bytes"] / together["num_steps"] == 4 * 4 * 8 * 512**2
        assert together["covered"] + together["exposed"] == pytest.approx(together["communication"])
        assert together["compute"] + together["exposed"] + together["idle"] == pytest.approx(together["window"])
        assert together["estimated"] == 0
        # FSDP2 waits for every reduce-scatter on a CPU.
        assert kinds["fsdp_cp", "reduce_scatter"]["overlapped"] == 0
    assert reports["at-once"]["covered"] == 0
    assert reports["at-once"]["exposed"] == reports["at-once"]["communication"]
    assert reports["prefetch"]["covered"] > 0


@pytest.mark.slow
def test_groups_kinds_and_bytes_of_other_collectives(recorded):
    for trace in read_traces(recorded / "others"):
        together = overlap_report([trace])["together"]
        rows = {
            (r["axis"], r["kind"]): (r["count"] / together["num_steps"], r["bytes"] / together["num_steps"]) for r in together["kinds"]
        }
        assert rows == {
            ("cp", "all_reduce"): (1, 4 << 21), ("dp", "all_reduce"): (1, 4 << 21), ("tp", "all_gather"): (1, 4000),
            ("tp", "reduce_scatter"): (1, 2000), ("tp", "all_to_all"): (1, 2000), ("tp", "broadcast"): (1, 2000),
            ("pp", "send"): (1, 2000), ("pp", "recv"): (1, 2000),
        }  # fmt: skip
        overlapped = {row["axis"]: row["overlapped"] for row in together["kinds"] if row["kind"] == "all_reduce"}
        assert overlapped["cp"] > 0
        assert overlapped["dp"] == 0
        assert together["estimated"] == 2 * together["num_steps"]


@pytest.mark.slow
def test_bench(tmp_path, capsys):
    result = bench_overlap(1, 1, tmp_path)
    print_report(result)
    assert "prefetch" in capsys.readouterr().out
    contestants = {c["name"]: c for c in result["contestants"]}
    assert list(contestants) == ["at once", "prefetch", "reduce each", "reduce last", "keys whole", "keys in parts"]
    context = {name: contestants.pop(name)["collectives"] for name in ("keys whole", "keys in parts")}
    for kind in ("all_gather, cp", "reduce_scatter, cp"):
        assert {name: c[kind]["count"] for name, c in context.items()} == {"keys whole": 2, "keys in parts": 8}
        assert not context["keys whole"][kind]["overlapped"]
        assert context["keys in parts"][kind]["overlapped"]
    reduced = {name: c["collectives"]["reduce_scatter, FSDP::post_backward_reduce (1)"]["count"] for name, c in contestants.items()}
    assert reduced == {"at once": 1, "prefetch": 1, "reduce each": 3, "reduce last": 1}
    assert not any(row["overlapped"] for row in contestants["at once"]["collectives"].values())
    assert any(row["overlapped"] for row in contestants["prefetch"]["collectives"].values())
    assert all(c["exposed_ms"][0] <= c["communication_ms"][2] for c in contestants.values())
    assert len(read_traces(tmp_path / "round-0" / "reduce-last")) == 2
    with pytest.raises(ValueError, match="rounds = 0"):
        bench_overlap(0, 1)
