"""What ranks know of a stalled run, and the text made of it: which collective waits where, and which rank does not come to it."""

from __future__ import annotations

import functools
import json
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "model", "parallel", "profiling", "engine")
_TORCH = os.path.dirname(torch.__file__) + os.sep
_DISTRIBUTED = os.path.join(_TORCH, "distributed") + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_WATCHERS = {str(ROOT / "parallel" / name) for name in ("stalls.py", "watchdog.py")}
# Frames of a place, and of the stack of a rank that does not wait.
PLACE, STACK = 3, 12
# How the state of a rank begins whose collective failed under it: the cause is elsewhere.
LOST = "failed in"
# Lines of a report for ranks; a large run has as many as it has groups.
MOST_LINES = 40

Frame = tuple[str, int, str]  # file, line, function


@dataclass(frozen=True)
class Collective:
    """One collective. number: how many-th of its group, None where torch does not count it; at: the line that issued it, if known.

    An asynchronous one was issued elsewhere than where the training thread is now, and autograd's thread has no line of Smalt.
    """

    kind: str
    group: str
    number: int | None
    shapes: str = ""
    at: str = ""

    def __str__(self) -> str:
        count = "" if self.number is None else f" #{self.number}"
        group = f" of {self.group}" if self.group else ""
        return f"{self.kind}{count}{group}"


@dataclass(frozen=True)
class Heart:
    """What a rank says of itself. count: rises as long as its process lives; step: the one it is in; at: where its training thread is.

    waiting: the oldest unfinished collective of each group; last: the newest of each group, and whether it is done; stack: of the
    training thread, innermost first, where it waits for no collective. These three only once a rank has raised an alarm.
    """

    count: int
    step: int
    state: str
    at: str
    waiting: list[Collective] = field(default_factory=list)
    last: dict[str, tuple[Collective, bool]] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Heart:
        raw = json.loads(text)
        raw["waiting"] = [Collective(**c) for c in raw["waiting"]]
        raw["last"] = {group: (Collective(**c), done) for group, (c, done) in raw["last"].items()}
        return Heart(**raw)


def unfinished(entries: list[dict[str, Any]], names: Mapping[str, str]) -> list[Collective]:
    """The oldest unfinished collective of each group in a record of torch. names: of groups, by ``group_name``."""
    waiting: dict[tuple[str, str, bool], Collective] = {}
    for entry in entries:
        key = _stream(entry)
        if _is_done(entry):
            # Those of one group run in order. NCCL never marks the parts of a coalesced operation as done, only the whole.
            waiting.pop(key, None)
        else:
            waiting.setdefault(key, _collective(entry, names))
    return list(waiting.values())


def newest(entries: list[dict[str, Any]], names: Mapping[str, str]) -> dict[str, tuple[Collective, bool]]:
    """The newest collective of each group by the group's name, and whether it is done."""
    return {(c := _collective(entry, names)).group: (c, _is_done(entry)) for entry in entries}


def _stream(entry: dict[str, Any]) -> tuple[str, str, bool]:
    return entry["profiling_name"].partition(":")[0], entry["process_group"][0], entry["is_p2p"]


def _is_done(entry: dict[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _collective(entry: dict[str, Any], names: Mapping[str, str]) -> Collective:
    name, description = entry["process_group"]
    kind = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    shapes = ", ".join(f"{t}{s}" for t, s in zip(entry["input_dtypes"], entry["input_sizes"], strict=False))
    at = place((f["filename"], f["line"], f["name"]) for f in entry.get("frames", ()))
    return Collective(kind, names.get(name, f"{description or 'group'} ({name})"), number, shapes, at)


def is_distributed(frame: Frame) -> bool:
    return frame[0].startswith(_DISTRIBUTED)


def waiting_by_stack(frames: list[Frame]) -> Collective | None:
    """What a thread waits for by its stack, for what torch does not record: gloo's send and recv, the store."""
    if not frames or not is_distributed(frames[0]):
        return None
    return Collective(caller(frames), "", None, "", place(frames))


def caller(frames: list[Frame]) -> str:
    """The innermost function of torch.distributed on a stack; ``wrapper`` is its logger's."""
    return next((frame[2] for frame in frames if is_distributed(frame) and frame[2] != "wrapper"), "a collective")


def stack_of(frame: FrameType | None) -> list[Frame]:
    """File, line and function of a frame and its callers, innermost first."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def stack_of_error(traceback: TracebackType | None) -> list[Frame]:
    """The same of an exception."""
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno, traceback.tb_frame.f_code.co_name))
        traceback = traceback.tb_next
    return frames[::-1]


def training_stacks(training_thread: int) -> list[list[Frame]]:
    """The stack of the training thread, then those of threads that Python did not start: autograd runs FSDP's hooks in its own."""
    frames = sys._current_frames()
    known = {t.ident for t in threading.enumerate() if not isinstance(t, threading._DummyThread)}
    return [stack_of(frames.get(training_thread)), *(stack_of(f) for ident, f in frames.items() if ident not in known)]


def place(frames: Iterable[Frame]) -> str:
    """The innermost lines of Smalt and its caller, with theirs: ``parallel/a.py:8 in f < engine/b.py:3 in g``."""
    return " < ".join([line(f) for f in frames if _is_own(f[0])][:PLACE])


def line(frame: Frame) -> str:
    return f"{_shown(frame[0])}:{frame[1]} in {frame[2]}"


@functools.cache
def _shown(file: str) -> str:
    """Relative to the root of Smalt, where it is under it."""
    path = Path(os.path.realpath(file))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


@functools.cache
def _is_own(file: str) -> bool:
    """Whether a file is Smalt's, or of what called it: no library, and not the watchdog itself."""
    path = os.path.realpath(file)
    if path.startswith(tuple(f"{ROOT / room}{os.sep}" for room in ROOMS)):
        return path not in _WATCHERS
    return not (file.startswith("<") or path.startswith(_STDLIB) or "site-packages" in path or file.startswith(_TORCH))


def describe(hearts: Mapping[int, Heart | None], silent: set[int]) -> str:
    """One line for each group of ranks that are in the same place, those that hold up the others first.

    hearts: by rank, None for one that was never heard of. silent: ranks whose process says nothing any more.
    """
    missing: dict[str, list[int]] = {}
    waiting: dict[str, list[int]] = {}
    for rank, heart in hearts.items():
        for kind, text in _lines(heart, rank in silent):
            (missing if kind == "missing" else waiting).setdefault(text, []).append(rank)
    stalled = {c.group for h in hearts.values() if h for c in h.waiting}
    lines = []
    for text, ranks in missing.items():
        lines.append(f"{_ranks(ranks)}, {text}{_progress(hearts[ranks[0]], stalled)}")
        heart = hearts[ranks[0]]
        lines += [f"    {entry}" for entry in (heart.stack if heart else [])]
    lines += [f"{_ranks(ranks)}, {text}" for text, ranks in waiting.items()]
    lines += _disagreements(hearts)
    more = [f"and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    return "\n".join(f"  {entry}" for entry in [*lines[:MOST_LINES], *more, _advice(missing)])


def _lines(heart: Heart | None, silent: bool) -> list[tuple[str, str]]:
    """What there is to say of a rank, each with whether it holds up others ("missing") or is held up ("waiting")."""
    if heart is None:
        return [("missing", "never heard of: it did not come to training")]
    where = f"in step {heart.step} at {heart.at}"
    if heart.state.startswith(LOST):
        return [("waiting", f"{heart.state}: {where}")]
    if heart.state.startswith(("failed", "ended")):
        return [("missing", f"{heart.state}: {where}")]
    if silent:
        return [("missing", f"silent: its process is dead or frozen, or its machine cut off; last {where}")]
    if heart.state != "running":
        return [("missing", f"{heart.state}: {where}")]
    if not heart.waiting:
        return [("missing", f"not waiting: {where}")]
    shown = [(f"{c}, {c.shapes}" if c.shapes else str(c), c.at or heart.at) for c in heart.waiting]
    return [("waiting", f"waiting in {what}: in step {heart.step} at {at}") for what, at in shown]


def _progress(heart: Heart | None, stalled: set[str]) -> str:
    """How far a rank that does not wait has come in the groups that do."""
    if heart is None:
        return ""
    known = [f"its last of {group} is {c.kind} #{c.number}" for group, (c, _) in heart.last.items() if group in stalled]
    return "; " + ", ".join(known) if known else ""


def _disagreements(hearts: Mapping[int, Heart | None]) -> list[str]:
    """Collectives that ranks of one group call differently at the same count."""
    calls: dict[tuple[str, int], dict[str, list[int]]] = {}
    for rank, heart in hearts.items():
        for c in heart.waiting if heart else ():
            if c.number is not None:
                calls.setdefault((c.group, c.number), {}).setdefault(c.kind, []).append(rank)
    return [
        f"#{number} of {group} is not the same everywhere: " + ", ".join(f"{kind} on {_ranks(r)}" for kind, r in kinds.items())
        for (group, number), kinds in calls.items()
        if len(kinds) > 1
    ]


def _advice(missing: Mapping[str, list[int]]) -> str:
    if missing:
        return f"look first at {_ranks(sorted({r for ranks in missing.values() for r in ranks}))}"
    return "all ranks wait: they call collectives in different order, or the network between them is broken"


def _ranks(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    shown = [str(r[0]) if len(r) == 1 else f"{r[0]}, {r[1]}" if len(r) == 2 else f"{r[0]} to {r[-1]}" for r in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(shown)
