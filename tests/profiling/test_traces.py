"""Traces written by hand, whose overlap is known."""

import gzip
import json
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.profiling.trace_report import overlap_report, plot_overlap, print_overlap
from smalt.profiling.traces import Collective, RankTrace, TraceError, intersection, length, parse_trace, read_trace, read_traces, union

LIMIT = 30
INTERVALS = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)), max_size=8)
SUMS = ("window", "compute", "communication", "covered", "exposed", "idle")


def grid(intervals):
    return {t for start, end in intervals for t in range(start, end)}


def event(name, start, dur, cat="cpu_op", tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": dur, "args": args}


def note(name, start, dur, tid=1, **args):
    return event(name, start, dur, "user_annotation", tid, **args)


def launch(time, name, group="7", description="mesh_fsdp", elements=10, dtype="Float"):
    return {"time_ns": time * 1000, "name": name, "group": group, "description": description, "elements": elements, "dtype": dtype}


def trace(events, tmp_path=None, **smalt):
    return parse_trace({"traceEvents": events, "smalt": {"rank": 0, "world_size": 2, **smalt}}, tmp_path or "hand")


def only(traced, **wanted):
    (found,) = [c for c in traced.collectives if all(getattr(c, k) == v for k, v in wanted.items())]
    return found


# Intervals


@given(INTERVALS, INTERVALS)
def test_intervals_against_a_grid(a, b):
    ua, ub = union(a), union(b)
    assert grid(ua) == grid(a)
    assert length(ua) == len(grid(a))
    assert all(before[1] < after[0] for before, after in pairwise(ua))
    assert grid(intersection(ua, ub)) == grid(a) & grid(b)
    assert length(intersection(ua, ub)) == len(grid(a) & grid(b))


@given(
    INTERVALS, st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, LIMIT), st.integers(0, 9)), max_size=8), st.integers(0, LIMIT)
)
def test_report_against_a_grid(compute, collectives, end):
    window = grid([(3, end)])
    found = tuple(Collective("all_gather", axis, "", start, start + dur) for axis, start, dur in collectives)
    report = overlap_report([RankTrace("hand", 0, 1, "cpu", ((0, 3, end),), tuple(union(compute)), found)])
    row = report["ranks"][0]
    busy, flight = grid(compute) & window, grid([(s, s + d) for _, s, d in collectives]) & window
    want = (window, busy, flight, flight & busy, flight - busy, window - busy - flight)
    assert [round(row[k] * 1e6, 6) for k in SUMS] == [len(w) for w in want]
    for axis in row["axes"]:
        flight = grid([(s, s + d) for a, s, d in collectives if a == axis["axis"]]) & window
        assert round(axis["total"] * 1e6, 6) == len(flight)
        assert round(axis["exposed"] * 1e6, 6) == len(flight - busy)
        assert axis["covered"] + axis["exposed"] == pytest.approx(axis["total"], abs=1e-12)
        assert 0 <= axis["exposed"] <= axis["total"]
        assert axis["overlapped"] <= axis["count"]


# GPU


def nccl(name, start, dur, collective, group="7", description="mesh_fsdp", elements=(10, 40), dtype="BFloat16", **args):
    sizes = {"In msg nelems": elements[0], "Out msg nelems": elements[1], "dtype": dtype}
    groups = {"Process Group Name": group, "Process Group Description": description}
    return event(f"ncclDevKernel_{name}", start, dur, "kernel", 20, **{"Collective name": collective, **sizes, **groups}, **args)


def test_gpu():
    traced = trace(
        [
            note("smalt step 4", 0, 100),
            note("FSDP::all_gather (blocks.1)", 1, 9),
            event("record_param_comms", 2, 3, **{"External id": 55}),
            event("aten::mm", 0, 100),  # the host computes nothing
            event("gemm", 10, 30, "kernel", 7),
            event("softmax", 20, 10, "kernel", 7),  # inside the first
            event("Memcpy HtoD", 90, 10, "gpu_memcpy", 7),
            nccl("AllGather_RING_LL", 30, 20, "_allgather_base", **{"External id": 55}),
            nccl("ReduceScatter_Sum_bf16_RING_LL", 45, 10, "_reduce_scatter_base", "0", "default_pg", (40, 10)),
            event("ncclDevKernel_SendRecv(args)", 60, 0, "kernel", 21),
            event("fsdp::comm", 70, 5, "kernel", 22, **{"Collective name": "allreduce", "In msg nelems": 3, "dtype": "Double"}),
            note("smalt step 5", 100, 10),
        ],
        groups={"0": {"axis": "fsdp_cp", "ranks": [0, 1]}},
        last_step=4,
    )
    assert traced.device == "gpu"
    assert traced.steps == ((4, 0, 100),)
    assert traced.compute == ((10, 40),)
    assert only(traced, kind="all_gather") == Collective("all_gather", "fsdp", "FSDP::all_gather (blocks.1)", 30, 50, 80)
    assert only(traced, kind="reduce_scatter") == Collective("reduce_scatter", "fsdp_cp", "", 45, 55, 80)
    assert only(traced, kind="send_recv") == Collective("send_recv", "unknown", "", 60, 60, 0)
    assert only(traced, kind="all_reduce").nbytes == 24
    row = overlap_report([traced])["ranks"][0]
    assert [row[k] * 1e6 for k in SUMS] == pytest.approx([100, 30, 30, 10, 20, 50])
    assert {(r["axis"], r["kind"]): (r["count"], r["overlapped"]) for r in row["kinds"]} == {
        ("fsdp", "all_gather"): (1, 1), ("fsdp_cp", "reduce_scatter"): (1, 0),
        ("unknown", "send_recv"): (1, 0), ("unknown", "all_reduce"): (1, 0),
    }  # fmt: skip


# CPU


def gather(start, dur=10, **args):
    return event(
        "c10d::_allgather_base_", start, dur, **{"Input Dims": [[8], [4], [], []], "Input type": ["float", "float", "", ""], **args}
    )


def work(name, start, dur, tid=9, **args):
    return note(f"gloo:{name}", start, dur, tid, **args)


def test_collective_waited_for_at_once_hides_nothing():
    events = [gather(100), work("all_gather", 105, 195), event("aten::mm", 310, 100), event("aten::mm", 0, 100)]
    traced = trace([note("smalt step 1", 0, 500), *events], launches=[launch(104, "gloo:all_gather")])
    assert only(traced) == Collective("all_gather", "fsdp", "", 100, 300, 40)
    assert traced.compute == ((0, 100), (310, 410))
    row = overlap_report([traced])["ranks"][0]
    assert [row[k] * 1e6 for k in SUMS] == pytest.approx([500, 200, 200, 0, 200, 100])


def test_prefetched_collective_is_covered_by_what_runs_beside_it():
    events = [
        note("smalt step 1", 0, 500),
        note("FSDP::all_gather (2)", 90, 40),
        gather(100, 20),
        event("aten::copy_", 105, 5),  # inside the call: part of the collective
        work("all_gather", 110, 190),
        event("aten::copy_", 290, 5, tid=9),  # the worker's own
        event("autograd::engine::evaluate_function: MmBackward0", 130, 60),
        event("MmBackward0", 135, 50),
        event("aten::mm", 140, 40),
        event("aten::matmul", 200, 50),
        event("aten::mm", 210, 30),  # nested
        event("aten::view", 260, 0),
    ]
    traced = trace(events, launches=[launch(104, "gloo:all_gather", elements=16)])
    assert traced.compute == ((140, 180), (200, 250))
    assert only(traced) == Collective("all_gather", "fsdp", "FSDP::all_gather (2)", 100, 300, 64)
    (row,) = overlap_report([traced])["ranks"][0]["labels"]
    assert (row["covered"] * 1e6, row["exposed"] * 1e6, row["overlapped"]) == pytest.approx((90, 110, 1))


def test_operator_that_calls_a_collective_counts_by_its_parts():
    events = [
        note("smalt step 1", 0, 500),
        event("aten::mm", 0, 300),  # of DTensor
        event("_c10d_functional::all_reduce", 20, 30),
        event("c10d::allreduce_", 25, 20, **{"Input Dims": [[[4], [2, 3]], []], "Input type": ["TensorList", ""]}),
        work("all_reduce", 30, 100, **{"Input type": ["double"]}),
        event("_c10d_functional::wait_tensor", 60, 80),
        event("aten::mm", 200, 50),
    ]
    traced = trace(events, launches=[launch(26, "gloo:all_reduce", dtype="", elements=0)])
    assert traced.compute == ((200, 250),)
    assert only(traced) == Collective("all_reduce", "fsdp", "", 25, 130, 80)


def test_reduce_scatter_of_a_list_is_several_works():
    events = [
        note("smalt step 1", 0, 500),
        event("c10d::reduce_scatter_", 10, 20),
        work("all_reduce", 20, 50),
        work("all_reduce", 25, 90, 10),
    ]
    traced = trace(events, launches=[launch(15, "gloo:all_reduce"), launch(18, "gloo:all_reduce")])
    assert only(traced) == Collective("reduce_scatter", "fsdp", "", 10, 115, 80)


def test_works_of_two_groups_that_overtake_each_other():
    # Group 7 has threads 9 and 10, both busy: its third work starts after that of group 8, which was launched later.
    starts = [100, 200, 300, 400]
    groups = ["7", "7", "7", "8"]
    events = [note("smalt step 1", 0, 5000), *(gather(s) for s in starts)]
    events += [
        work("all_gather", 105, 900),
        work("all_gather", 205, 1000, 10),
        work("all_gather", 1010, 100),
        work("all_gather", 405, 50, 11),
    ]
    launches = [launch(s + 3, "gloo:all_gather", g, f"mesh_axis{g}") for s, g in zip(starts, groups, strict=True)]
    traced = trace(events, launches=launches)
    assert [(c.axis, c.start, c.end) for c in traced.collectives] == [
        ("axis7", 100, 1005), ("axis7", 200, 1205), ("axis7", 300, 1110), ("axis8", 400, 455),
    ]  # fmt: skip


def test_estimates():
    send = event("c10d::send", 10, 20, **{"Input Dims": [[[5]], []], "Input type": ["TensorList", ""]})
    events = [
        note("smalt step 1", 0, 900), send, work("send", 25, 300, 1, **{"Input type": ["c10::BFloat16"]}), event("aten::mm", 100, 50),
        gather(400), work("all_gather", 405, 45), event("c10d::barrier", 600, 10),
        event("c10d::recv_", 700, 5), work("recv", 702, 20, 1), event("c10d::recv_", 710, 5), work("recv", 712, 40, 1),
    ]  # fmt: skip
    traced = trace(events, groups={"3": {"axis": "pp", "ranks": [0, 1]}})
    # The event of a send lies on the calling thread, around what that computes.
    assert traced.compute == ((100, 150),)
    assert only(traced, kind="send") == Collective("send", "pp", "", 10, 325, 10, True)
    # No flight recorder: the order tells the end, nothing tells the group.
    assert only(traced, kind="all_gather") == Collective("all_gather", "unknown", "", 400, 450, 32, True)
    assert only(traced, kind="barrier") == Collective("barrier", "unknown", "", 600, 610, 0, True)
    assert [c.end for c in traced.collectives if c.kind == "recv"] == [722, 752]
    assert overlap_report([traced])["together"]["estimated"] == 5


def test_steps():
    assert trace([event("aten::mm", 5, 10), event("aten::mm", 30, 10)]).steps == ((0, 5, 40),)
    marked = [event("aten::mm", 5, 10), note("ProfilerStep#3", 20, 10), note("ProfilerStep#2", 10, 10), note("smalt step x", 0, 9)]
    assert trace(marked).steps == ((2, 10, 20), (3, 20, 30))
    # Outside of the steps nothing counts.
    assert overlap_report([trace(marked)])["ranks"][0]["compute"] == pytest.approx(5e-6)


def test_ranks_together():
    one = RankTrace("a", 0, 4, "cpu", ((1, 0, 100),), ((0, 40),), (Collective("all_gather", "fsdp", "", 20, 60, 8),))
    two = RankTrace(
        "b",
        2,
        4,
        "cpu",
        ((1, 500, 600),),
        (),
        (Collective("all_gather", "fsdp", "", 520, 530, 8), Collective("send", "pp", "", 590, 700)),
    )
    report = overlap_report([one, two])
    assert (report["num_ranks"], report["world_size"], report["steps"]) == (2, 4, [1])
    assert [report["together"][k] * 1e6 for k in SUMS] == pytest.approx([200, 40, 60, 20, 40, 120])
    gather, send = report["together"]["kinds"]
    assert (gather["count"], gather["bytes"], gather["overlapped"]) == (2, 16, 1)
    assert [gather[k] * 1e6 for k in ("total", "covered", "exposed")] == pytest.approx([50, 20, 30])
    assert (send["axis"], send["exposed"] * 1e6) == ("pp", pytest.approx(10))
    json.dumps(report)


# Files


def write(path, document, packed=True):
    raw = json.dumps(document).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)


def document(rank):
    events = [note("smalt step 1", 0, 900), gather(100), work("all_gather", 105, 95), event("aten::mm", 150, 500)]
    smalt = {"rank": rank, "world_size": 2, "last_step": 1, "groups": {}, "launches": [launch(104, "gloo:all_gather")]}
    return {"traceEvents": events, "smalt": smalt}


@pytest.mark.slow
def test_folder(tmp_path, capsys):
    write(tmp_path / "rank-00001.json.gz", document(1))
    write(tmp_path / "rank-00000.json", document(0), packed=False)
    (tmp_path / "notes.json").write_text("[]")
    traces = read_traces(tmp_path)
    assert [t.rank for t in traces] == [0, 1]
    report = overlap_report(traces)
    print_overlap(report)
    out = capsys.readouterr().out
    assert "2 of 2 ranks" in out
    assert "all_gather" in out
    plot_overlap(traces, report, tmp_path / "plots" / "overlap.png")
    assert (tmp_path / "plots" / "overlap.png").read_bytes().startswith(b"\x89PNG")
    plot_overlap(traces[:1], overlap_report([trace([event("aten::mm", 5, 10)])]), tmp_path / "bare.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(json.dumps(document(0)).encode())[:-40], "is cut off or damaged"),
        (b"not packed", "Not a gzipped file"),
        (gzip.compress(json.dumps(document(0)).encode()[:-40]), "is no JSON, or cut off"),
        (gzip.compress(b"[]", mtime=0), "is not of torch.profiler"),
        (gzip.compress(b"{}", mtime=0), "is not of torch.profiler: KeyError 'traceEvents'"),
        (gzip.compress(b'{"traceEvents": []}', mtime=0), "holds no event with a duration"),
        (
            gzip.compress(b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": "x", "dur": 1}]}', mtime=0),
            "is not of torch.profiler",
        ),
        (
            gzip.compress(b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a", "ts": 1}]}', mtime=0),
            "is not of torch.profiler: KeyError 'dur'",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "rank-00000.json.gz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(TraceError, match="absent is not a folder"):
        read_traces(tmp_path / "absent")
    with pytest.raises(TraceError, match=r"holds no trace \(rank-\*\.json\.gz.*logging\.trace_steps"):
        read_traces(tmp_path)
    for name in ("rank-00000.json.gz", "rank-00001.json.gz"):
        write(tmp_path / name, document(0))
    with pytest.raises(TraceError, match=r"rank-00000.json.gz and .*rank-00001.json.gz are both of rank 0"):
        read_traces(tmp_path)
    larger = document(1)
    larger["smalt"]["world_size"] = 4
    write(tmp_path / "rank-00001.json.gz", larger)
    with pytest.raises(TraceError, match="of runs on 2 and 4 processes"):
        read_traces(tmp_path)


def test_the_recording_of_a_run(tmp_path):
    (tmp_path / "step-00000006").mkdir()
    write(tmp_path / "step-00000006" / "rank-00000.json.gz", document(0))
    # A rank that was killed while it wrote.
    (tmp_path / "step-00000006-2").mkdir()
    (tmp_path / "step-00000006-2" / "rank-00000.json.plain").write_text("{")
    assert [t.path for t in read_traces(tmp_path)] == [tmp_path / "step-00000006" / "rank-00000.json.gz"]
    (tmp_path / "step-00000008").mkdir()
    write(tmp_path / "step-00000008" / "rank-00000.json.gz", document(0))
    with pytest.raises(TraceError, match=r"holds several recordings; give one of them: .*step-00000006, .*step-00000008$"):
        read_traces(tmp_path)


@pytest.mark.slow
def test_command(tmp_path):
    write(tmp_path / "rank-00000.json.gz", document(0))
    command = [sys.executable, "-m", "smalt.engine.cli", "trace", str(tmp_path)]
    options = ["--json", str(tmp_path / "new" / "overlap.json"), "--plot", str(tmp_path / "overlap.png")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 ranks" in done.stdout
    assert json.loads((tmp_path / "new" / "overlap.json").read_text())["together"]["covered"] == pytest.approx(50e-6)
    assert (tmp_path / "overlap.png").exists()
    for option in ("--json", "--plot"):
        for path, said in ((tmp_path / "new", "is a folder"), (tmp_path / "overlap.png" / "x", "cannot be written: ")):
            done = subprocess.run([*command, option, str(path)], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert done.stderr.startswith(f"error: {path} {said}")
    (tmp_path / "rank-00000.json.gz").write_bytes(b"")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: trace {tmp_path}/rank-00000.json.gz ")
