"""``smalt bench kernels``: every kernel on a GPU, first for correctness, then for speed, against what else there is."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .bench_attention import ATTENTION
from .bench_cases import Absent, Contestant, Given, Operation, Shape
from .bench_head import HEAD_OPERATIONS
from .bench_machine import Machine, versions
from .bench_results import FORMAT, Result, Row, render
from .bench_rows import ROW_OPERATIONS
from .bench_time import Device, Runner, race, roofline, summary, warm_up

OPERATIONS: tuple[Operation, ...] = (ATTENTION, *HEAD_OPERATIONS, *ROW_OPERATIONS)
SECONDS = 420.0  # after which nothing more is begun; what then runs to its end stays within 8 minutes
RACE_SECONDS = {True: 0.5, False: 1.5}  # of one shape of one operation, with --quick and without
# Relative RMS difference of a baseline's bf16 outputs from Smalt's, beyond which it computes something else.
AGREEMENT = 3e-2


def chosen(only: Iterable[str], quick: bool) -> list[tuple[Operation, Shape]]:
    """What is to be measured, the first shapes of all operations before the others, so that time runs out for the least.

    Raises ValueError for a name that is none of an operation.
    """
    names = {operation.name for operation in OPERATIONS}
    only = tuple(only)
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"unknown operation {unknown[0]!r}; choose among {', '.join(sorted(names))}")
    operations = [operation for operation in OPERATIONS if not only or operation.name in only]
    most = max(len(operation.shapes) for operation in operations)
    return [
        (operation, operation.shapes[i])
        for i in range(most)
        for operation in operations
        if i < (min(operation.quick, len(operation.shapes)) if quick else len(operation.shapes))
    ]


def table(results: Iterable[Result]) -> str:
    """Markdown of results; "not measured" where there are none."""
    return render(results, [(operation.name, tuple(s.name for s in operation.shapes)) for operation in OPERATIONS])


def measure_all(
    device: Device, machine: Machine, only: Iterable[str], quick: bool, deadline: float, tests: dict[str, Any],
    say: Callable[[str], None] = print,
) -> Result:  # fmt: skip
    """Measure; returns what :func:`bench_results.write_result` writes. deadline: on time.monotonic(); what has not begun by then is
    left out, and is "not measured"."""
    only = tuple(only)
    todo, rows, left = chosen(only, quick), [], []
    before = roofline(device)
    for operation, shape in todo:
        if time.monotonic() > deadline:
            left.append([operation.name, shape.name])
            say(f"{operation.name}, {shape.name}: not measured, the time is up")
            continue
        start = time.monotonic()
        rows += measure(operation, shape, device, machine, RACE_SECONDS[quick])
        say(f"{operation.name}, {shape.name}: {time.monotonic() - start:.0f} s")
    after = roofline(device)
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "whole": not (only or quick or left),
        "left": left,
        "machine": machine.state(),
        "versions": versions(),
        "tests": tests,
        # The most that the machine showed, before or after.
        "roofline": {name: max(before[name], after[name]) for name in before},
        "roofline_before": before,
        "roofline_after": after,
        "rows": rows,
    }


def measure(operation: Operation, shape: Shape, device: Device, machine: Machine, budget: float) -> list[Row]:
    """A row for each contestant of one operation at one shape."""
    torch.manual_seed(0)
    torch.compiler.reset()
    device.clear()
    reasons: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        reasons[name] = reason(error)
        device.clear()

    given = operation.inputs(shape, device.name)
    work = operation.work(given)
    runners: dict[str, Runner] = {}
    memory: dict[str, dict[str, int]] = {}
    truth: list[Tensor] | None = None
    for contestant in operation.contestants:
        try:
            runner, outputs, memory[contestant.name] = prepare(contestant, given, operation, device)
            truth = outputs if truth is None and contestant.name == "smalt" else truth
            check_agreement(outputs, truth)
        except Exception as error:
            failed(contestant.name, error)
            continue
        runners[contestant.name] = runner
    notes = {name: runner.call.note for name, runner in runners.items()}
    taking_part = dict(runners)
    race(runners, device, budget, failed)
    clocks = machine.now()
    return [
        {
            "operation": operation.name,
            "shape": shape.name,
            "contestant": c.name,
            "absent": reasons.get(c.name),
            "note": notes.get(c.name, ""),
            "times": summary(taking_part[c.name].times) if c.name not in reasons else {},
            "work": work,
            "roofline": operation.roofline,
            "memory": memory[c.name] if c.name not in reasons else {},
            "clocks": clocks,
        }
        for c in operation.contestants
    ]


def prepare(contestant: Contestant, given: Given, operation: Operation, device: Device) -> tuple[Runner, list[Tensor], dict[str, int]]:
    """A contestant that is warm, what it computes, and the memory that it takes."""
    runner = Runner(contestant.prepare(given), operation.parts)
    return runner, *warm_up(runner, device)


def check_agreement(outputs: list[Tensor], truth: list[Tensor] | None) -> None:
    """Raises Absent where a contestant computes something else than Smalt: its time would say nothing."""
    for i, (mine, theirs) in enumerate(zip(truth or [], outputs, strict=False)):
        if mine.shape != theirs.shape:
            raise Absent(f"computes something else: output {i} is {tuple(theirs.shape)}, not {tuple(mine.shape)}")
        difference = relative_rms(theirs.double(), mine.double())
        if not difference <= AGREEMENT:
            raise Absent(f"computes something else: output {i} differs by {difference:.1g}, relative RMS")


def relative_rms(got: Tensor, want: Tensor) -> float:
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)).item()


def reason(error: Exception) -> str:
    """Why a contestant is absent, in one line."""
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError | AttributeError):
        return f"this version has none: {first_line(error)}"
    return f"failed: {type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def failures(result: Result) -> list[str]:
    """Operations of which Smalt itself was not measured, with the reason."""
    return [
        f"{row['operation']}, {row['shape']}: {row['absent']}"
        for row in result["rows"]
        if row["contestant"] == "smalt" and row["absent"] is not None
    ]
