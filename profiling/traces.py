"""Traces of torch.profiler, read into what overlap needs: when a rank computed, and which collectives were in flight when.

What a trace says, and what it does not:

- GPU. A collective is in flight while its NCCL kernel runs, time that the kernel waits for other ranks included. Kernels carry
  "Collective name", "In msg nelems", "dtype", "Process Group Name" and "Process Group Description" where torch could tie them to a
  call; a batch of sends and receives is one kernel (``send_recv``) and may carry none. Compute is every kernel that is not NCCL's;
  copies of memory are neither. (Field names: kineto, libkineto/src/output_json.cpp.)
- CPU (gloo). A collective is in flight from its call (the ``c10d::`` op) to the end of its ``gloo:`` event on a worker thread:
  queueing and waiting for other ranks included. Both are in the trace. Which call a worker's event belongs to is not: it follows
  from gloo's flight recorder (what was launched when, in which group), the threads, each of which serves one group, and the order,
  for a group's works start in the order of their launch. When a thread begins to wait is not in the trace either.
  Estimates, and counted as such: a send or receive ends when it was waited for, which may be after it was done, and is of axis pp
  where the mesh has one, for no record says its group; an end that the trace lacks is that of the call; without the flight
  recorder the order alone decides.
  Compute is what operators do (``aten::``, custom ones), outside of calls of collectives; an operator that calls a collective
  counts by its parts. Python between operators is not compute, so on a CPU idle and exposed time hold the work of the interpreter;
  nor are the kernels inside a compiled graph, which the trace does not show one by one.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Interval = tuple[float, float]
Event = dict[str, Any]
UNKNOWN = "unknown"
PATTERNS = ("rank-*.json.gz", "rank-*.json", "*.pt.trace.json", "*.pt.trace.json.gz")
_STEP = re.compile(r"(?:smalt step |ProfilerStep#)(\d+)$")
_NOT_COMPUTE = ("autograd::", "torch::", "c10d::", "_c10d_functional::", "_c10d_functional_autograd::", "_dtensor::")
# In this order: "reducescatter" is also a "reduce" and a "scatter".
_KINDS = {
    "allgather": "all_gather", "reducescatter": "reduce_scatter", "allreduce": "all_reduce", "alltoall": "all_to_all",
    "sendrecv": "send_recv", "send": "send", "recv": "recv", "broadcast": "broadcast", "barrier": "barrier",
    "gather": "gather", "scatter": "scatter", "reduce": "reduce",
}  # fmt: skip
_BYTES = {
    **dict.fromkeys(("double", "long", "long int", "complexfloat"), 8), **dict.fromkeys(("float", "int"), 4),
    **dict.fromkeys(("bfloat16", "half", "short", "short int", "c10::bfloat16", "c10::half"), 2), "complexdouble": 16,
}  # fmt: skip
# The clocks of the profiler and of the flight recorder agree to some microseconds.
_SLACK_US = 20.0


class TraceError(ValueError):
    """A trace that cannot be used; the message names the file or folder and what is wrong."""


@dataclass(frozen=True)
class Collective:
    """One collective of one rank. start, end: in flight, microseconds; nbytes: of the larger of what a rank puts in and takes out.

    axis: of the mesh, or "unknown"; label: the innermost annotation around the call, FSDP2's name of the block; estimated: the end, or
    which work it was, is not in the trace.
    """

    kind: str
    axis: str
    label: str
    start: float
    end: float
    nbytes: int = 0
    estimated: bool = False


@dataclass(frozen=True)
class RankTrace:
    """What one rank did. steps: (number, start, end); compute: disjoint intervals in order. Times in microseconds of one clock."""

    path: Path
    rank: int
    world_size: int
    device: str
    steps: tuple[tuple[int, float, float], ...]
    compute: tuple[Interval, ...]
    collectives: tuple[Collective, ...]


# Intervals: half-open; a list is "disjoint" when sorted, without overlap and without empty ones, as union() makes it.


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The disjoint intervals that cover the same points. Empty and inverted ones cover none."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(disjoint: Iterable[Interval]) -> float:
    return sum(end - start for start, end in disjoint)


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The points in both of two disjoint lists."""
    shared, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > start:
            shared.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return shared


# Files


def read_traces(folder: Path) -> list[RankTrace]:
    """The traces of a folder (``rank-*.json.gz``, ``*.pt.trace.json``, each packed or plain), by rank. A folder that holds none may
    hold one folder of them, as a run names it (``step-00000006``). Raises TraceError."""
    if not folder.is_dir():
        raise TraceError(f"{folder} is not a folder; give the one that the traces were written to")
    recordings = [folder] if _paths(folder) else [held for held in sorted(folder.glob("step-*")) if _paths(held)]
    if not recordings:
        raise TraceError(f"{folder} holds no trace ({', '.join(PATTERNS)}); record one with logging.trace_steps")
    if len(recordings) > 1:
        raise TraceError(f"{folder} holds several recordings; give one of them: {', '.join(map(str, recordings))}")
    traces = sorted((read_trace(path) for path in _paths(recordings[0])), key=lambda t: t.rank)
    for before, after in pairwise(traces):
        if before.rank == after.rank:
            raise TraceError(f"{before.path} and {after.path} are both of rank {after.rank}; a folder holds one trace a rank")
    if len(sizes := {trace.world_size for trace in traces}) > 1:
        raise TraceError(
            f"the traces of {folder} are of runs on {' and '.join(map(str, sorted(sizes)))} processes: one was recorded over another; "
            "remove the older files"
        )
    return traces


def _paths(folder: Path) -> list[Path]:
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})


def read_trace(path: Path) -> RankTrace:
    """One file. Raises TraceError naming it where it is cut off, no JSON or no trace of torch.profiler."""
    try:
        raw = path.read_bytes()
        document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except OSError as error:
        raise TraceError(f"trace {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise TraceError(f"trace {path} is cut off or damaged: {error}") from error
    except ValueError as error:
        raise TraceError(f"trace {path} is no JSON, or cut off: {error}") from error
    try:
        return parse_trace(document, path)
    except TraceError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise TraceError(f"trace {path} is not of torch.profiler: {type(error).__name__} {error}") from error


def parse_trace(document: dict[str, Any], path: Path) -> RankTrace:
    """A Chrome trace as JSON holds it. Without smalt's metadata it works from what torch writes."""
    smalt, world = document.get("smalt", {}), document.get("distributedInfo", {})
    events = [_checked(e) for e in document["traceEvents"] if e.get("ph") == "X" and e.get("cat") != "Trace"]
    if not events:
        raise TraceError(f"trace {path} holds no event with a duration")
    axes = {name: group["axis"] for name, group in smalt.get("groups", {}).items()}
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in ("cpu_op", "user_annotation"):
            threads[event["pid"], event["tid"]].append(event)
    nodes = {thread: _nest(found) for thread, found in threads.items()}
    if any(e["cat"] == "kernel" for e in events):
        device, (compute, collectives) = "gpu", _read_gpu(events, nodes, axes)
    else:
        base = document.get("baseTimeNanoseconds", 0)
        launches = [
            _Launch((entry["time_ns"] - base) / 1e3, entry["name"], entry["group"], _axis(axes, entry["group"], entry["description"]),
                    entry["elements"], entry["dtype"])
            for entry in smalt.get("launches", [])
        ]  # fmt: skip
        device, (compute, collectives) = "cpu", _read_cpu(nodes, launches, "pp" if "pp" in axes.values() else UNKNOWN)
    return RankTrace(
        path, int(smalt.get("rank", world.get("rank", 0))), int(smalt.get("world_size", world.get("world_size", 1))), device,
        _steps(events, smalt.get("last_step")), tuple(union(compute)), tuple(sorted(collectives, key=lambda c: c.start)),
    )  # fmt: skip


def _checked(event: Event) -> Event:
    event["ts"], event["dur"] = float(event["ts"]), float(event["dur"])
    event["end"] = event["ts"] + event["dur"]
    event.setdefault("args", {})
    return event


def _steps(events: list[Event], last: int | None) -> tuple[tuple[int, float, float], ...]:
    """The annotated steps; where there is none, all events as step 0."""
    found = [(e, _STEP.match(e["name"])) for e in events if e["cat"] == "user_annotation"]
    steps = sorted((e["ts"], e["end"], int(match[1])) for e, match in found if match)
    if not steps:
        return ((0, min(e["ts"] for e in events), max(e["end"] for e in events)),)
    return tuple((number, start, end) for start, end, number in steps if last is None or number <= last)


def _kind(name: str) -> str | None:
    plain = name.lower().replace("_", "")
    return next((kind for part, kind in _KINDS.items() if part in plain), None)


def _axis(axes: dict[str, str], group: str, description: str) -> str:
    """The name that the recorder was given, else the one that DeviceMesh put into the description."""
    return axes.get(group) or description.removeprefix("mesh_") or UNKNOWN


def _dtype_bytes(dtype: str) -> int:
    return _BYTES.get(dtype.lower(), 1)


# Threads of the host


@dataclass
class _Node:
    """An event of a host thread. label: innermost annotation around it; inside, contains: a call of a collective."""

    event: Event
    label: str
    inside: bool
    contains: bool = field(default=False)


def _nest(events: list[Event]) -> list[_Node]:
    """The events of one thread with what is around and inside them; gloo's events do not nest with the others."""
    nodes: list[_Node] = []
    stack: list[_Node] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while stack and stack[-1].event["end"] <= event["ts"]:
            stack.pop()
        label = next((n.event["name"] for n in reversed(stack) if n.event["cat"] == "user_annotation"), "")
        node = _Node(event, "" if _STEP.match(label) else label, any(_is_call(n.event) for n in stack))
        nodes.append(node)
        if not event["name"].startswith("gloo:"):
            if _is_call(event):
                for outer in stack:
                    outer.contains = True
            stack.append(node)
    return nodes


def _is_call(event: Event) -> bool:
    return event["cat"] == "cpu_op" and event["name"].startswith(("c10d::", "_c10d_functional", "record_param_comms"))


# GPU


def _read_gpu(events: list[Event], nodes: dict[Any, list[_Node]], axes: dict[str, str]) -> tuple[list[Interval], list[Collective]]:
    labels = {n.event["args"].get("External id"): n.label for found in nodes.values() for n in found if n.event["cat"] == "cpu_op"}
    compute, collectives = [], []
    for event in events:
        if event["cat"] != "kernel":
            continue
        args = event["args"]
        if "Collective name" not in args and not event["name"].lower().startswith("nccl"):
            compute.append((event["ts"], event["end"]))
            continue
        elements = max(int(args.get("In msg nelems", 0)), int(args.get("Out msg nelems", 0)))
        collectives.append(
            Collective(
                _kind(args.get("Collective name", "")) or _kind(event["name"]) or "other",
                _axis(axes, args.get("Process Group Name", ""), args.get("Process Group Description", "")),
                labels.get(args.get("External id"), ""), event["ts"], event["end"], elements * _dtype_bytes(args.get("dtype", "")),
            )
        )  # fmt: skip
    return compute, collectives


# CPU


@dataclass(frozen=True, eq=False)
class _Launch:
    """What gloo's flight recorder kept of one work. time: microseconds of the trace."""

    time: float
    name: str
    group: str
    axis: str
    elements: int
    dtype: str


def _read_cpu(nodes: dict[Any, list[_Node]], launches: list[_Launch], p2p_axis: str) -> tuple[list[Interval], list[Collective]]:
    calls = [(thread, n) for thread, found in nodes.items() for n in found if _is_launch(n.event)]
    workers = _workers(nodes)
    compute = [
        (n.event["ts"], n.event["end"])
        for thread, found in nodes.items()
        if thread not in workers
        for n in found
        if _is_operator(n.event) and not n.inside and not n.contains
    ]
    works = [(thread, n.event) for thread in workers for n in nodes[thread] if n.event["name"].startswith("gloo:")]
    by_call = _launches_of_calls([n for _, n in calls], launches)
    ends = _match_works([launch for found in by_call.values() for launch in found], works)
    collectives = []
    for thread, node in calls:
        if _kind(node.event["name"]) in ("send", "recv"):
            collectives.append(_point_to_point(node, nodes[thread], p2p_axis))
        else:
            collectives.append(_collective(node, [(launch, ends.get(launch)) for launch in by_call[id(node)]]))
    return compute, collectives


def _is_launch(event: Event) -> bool:
    return event["cat"] == "cpu_op" and event["name"].startswith("c10d::") and _kind(event["name"]) is not None


def _is_operator(event: Event) -> bool:
    return event["cat"] == "cpu_op" and "::" in event["name"] and not event["name"].startswith(_NOT_COMPUTE)


def _workers(nodes: dict[Any, list[_Node]]) -> set[Any]:
    """gloo's threads: they run works and call nothing."""
    return {
        thread
        for thread, found in nodes.items()
        if any(n.event["name"].startswith("gloo:") for n in found) and not any(_is_launch(n.event) for n in found)
    }


def _launches_of_calls(calls: list[_Node], launches: list[_Launch]) -> dict[int, list[_Launch]]:
    """The works that each call launched, by the id of its node: by the flight recorder, or one that the call's name stands for."""
    calls = sorted(calls, key=lambda n: n.event["ts"])
    starts = [n.event["ts"] for n in calls]
    found: dict[int, list[_Launch]] = {id(n): [] for n in calls}
    for launch in launches:
        at = bisect_right(starts, launch.time + _SLACK_US) - 1
        if at >= 0 and launch.time <= calls[at].event["end"] + _SLACK_US:
            found[id(calls[at])].append(launch)
    for node in calls:
        if not found[id(node)]:
            kind = _kind(node.event["name"])
            # gloo has no reduce-scatter of its own.
            work = "all_reduce" if kind == "reduce_scatter" else kind
            found[id(node)].append(_Launch(node.event["ts"], f"gloo:{work}", "", UNKNOWN, 0, ""))
    return found


def _match_works(launches: list[_Launch], works: list[tuple[Any, Event]]) -> dict[_Launch, Event]:
    """The worker's event of each launch, as far as there is one.

    An idle worker starts at once, so most events follow the launch of their own group most closely: that tells whose a thread is.
    Then, for one name in one group, events and launches have the same order.
    """
    launches = sorted(launches, key=lambda launch: launch.time)
    times = {name: [x.time for x in launches if x.name == name] for name in {x.name for x in launches}}
    named = {name: [x for x in launches if x.name == name] for name in times}
    votes: dict[Any, Counter[str]] = defaultdict(Counter)
    for thread, event in works:
        at = bisect_right(times.get(event["name"], []), event["ts"] + _SLACK_US) - 1
        if at >= 0:
            votes[thread][named[event["name"]][at].group] += 1
    owner = {thread: count.most_common(1)[0][0] for thread, count in votes.items()}
    queues: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for thread, event in sorted(works, key=lambda w: w[1]["ts"]):
        queues[owner.get(thread, ""), event["name"]].append(event)
    matched = {}
    for launch in launches:
        queue = queues[launch.group, launch.name]
        while queue and queue[0]["ts"] < launch.time - _SLACK_US:
            queue.pop(0)
        if queue:
            matched[launch] = queue.pop(0)
    return matched


def _collective(node: _Node, works: list[tuple[_Launch, Event | None]]) -> Collective:
    event, first = node.event, works[0][0]
    elements = max(sum(launch.elements for launch, _ in works), _elements(event["args"]))
    types = [first.dtype, *(work["args"].get("Input type", [""])[0] for _, work in works if work), *_types(event["args"])]
    ends = [work["end"] for _, work in works if work]
    return Collective(
        _kind(event["name"]) or "other", first.axis, node.label, event["ts"], max([event["end"], *ends]),
        elements * _dtype_bytes(next((t for t in types if t), "")), len(ends) < len(works) or first.group == "",
    )  # fmt: skip


def _point_to_point(node: _Node, thread: list[_Node], axis: str) -> Collective:
    """gloo runs no worker for a send or receive: its event begins inside the call and ends with the wait."""
    event, name = node.event, f"gloo:{_kind(node.event['name'])}"
    work = next((n.event for n in thread if n.event["name"] == name and event["ts"] <= n.event["ts"] <= event["end"]), event)
    size = _elements(event["args"]) * _dtype_bytes((work["args"].get("Input type") or [""])[0])
    return Collective(name.removeprefix("gloo:"), axis, node.label, event["ts"], work["end"], size, True)


def _elements(args: dict[str, Any]) -> int:
    """The largest argument of a call; a list of tensors counts as their sum."""
    return max((_count(dims) for dims in args.get("Input Dims", [])), default=0)


def _count(dims: list[Any]) -> int:
    if dims and isinstance(dims[0], list):
        return sum(_count(d) for d in dims)
    product = 1 if dims else 0
    for size in dims:
        product *= size
    return product


def _types(args: dict[str, Any]) -> list[str]:
    return [t for t in args.get("Input type", []) if t.lower() in _BYTES]
