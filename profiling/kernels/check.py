"""Compile every kernel with every launch configuration that ships, and hold what comes out against a committed table.

With any version of Triton these hold: a kernel compiles, spills nothing, fits the chip's shared memory and tensor memory, keeps the
kind of matrix instruction and the asynchronous copies that the table says it had; each launch configuration is compiled by some
case. With the version that wrote the table also: no figure grows. With another version the figures are only shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from smalt.kernels.launch import TARGETS

from .cases import CASES, Case
from .chips import CHIPS, TENSOR_MEMORY
from .others import LIBRARIES, OTHERS, is_installed
from .worker import launch_rows

TABLE = Path(__file__).with_name("table.json")
GROWING = ("registers", "stack", "shared", "tensor")
WRITE = "if it is worth it, rewrite the table: smalt kernels check --write"
_RANK = {"": 0, "mma": 1, "mfma": 1, "wgmma": 2, "tcgen05": 2}
_IDENTITY = ("kernel", "target", "dtype", "size", "constants", "tiles", "num_warps", "num_stages", "variant")

Row = dict[str, Any]


@dataclass(frozen=True)
class Violation:
    """A broken rule: of which kernel on which target in which configuration, which figure, what it was and is, what to do."""

    kernel: str
    target: str
    configuration: str
    figure: str
    was: Any
    now: Any
    advice: str

    def __str__(self) -> str:
        change = f"{self.now}" if self.was is None else f"was {self.was}, is {self.now}"
        return (
            f"{self.kernel} on {self.target}{self.configuration and f', {self.configuration}'}: {self.figure}: {change}; {self.advice}"
        )


@dataclass
class Outcome:
    """rows: what was compiled; beside: the same operations of other libraries; absent: libraries that are not installed; notes:
    changes that break no rule; triton, table_triton: versions; compiled, cached: how many kernels, and how many of them Triton had."""

    rows: list[Row] = field(default_factory=list)
    beside: list[Row] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    triton: str = ""
    table_triton: str = ""
    compiled: int = 0
    cached: int = 0


def check(
    kernel: str | None = None,
    targets: Iterable[str] = TARGETS,
    rows: Path | None = None,
    table: Path = TABLE,
    beside: bool = True,
    jobs: int = 2,
    write: bool = False,
) -> Outcome:
    """Compile, compare and, on request, write the table.

    kernel: only this one, a name of the launch table or of a case; targets: only these; rows: launch tables, a file or a folder, in
    place of those that ship; table: the committed table; beside: compile other libraries' kernels too; jobs: processes. Raises
    ValueError for a name or a target that does not exist, and where writing would mix versions of Triton.
    """
    targets = tuple(targets)
    if unknown := [t for t in targets if t not in CHIPS]:
        raise ValueError(f"unknown target {unknown[0]!r}; choose among {', '.join(CHIPS)}")
    shipped = launch_rows(str(rows) if rows else None)
    names = {case.name for case in CASES} | {name for case in CASES for name in case.kernels} | {row["kernel"] for row in shipped}
    if kernel is not None and kernel not in names:
        raise ValueError(f"unknown kernel {kernel!r}; choose among {', '.join(sorted(names))}")
    cases = [case for case in CASES if kernel is None or kernel in (case.name, *case.kernels)] or list(CASES)
    outcome = Outcome(absent=[library for library in LIBRARIES if beside and not is_installed(library)])
    tasks = [_task(case, target, dtype, size, rows) for target in targets for case in cases for dtype, size in _sizes(case)]
    tasks += [
        _task(name, target, "bf16", size, None, library)
        for target in targets
        for library, name, size in OTHERS
        if beside and library not in outcome.absent and name in {case.name for case in cases}
    ]
    reached = _run(tasks, jobs, outcome)
    # Rows that the model's sizes do not reach are compiled at their own.
    todo = [i for i, row in enumerate(shipped) if row["target"] in targets and kernel in (None, row["kernel"]) and i not in reached]
    by_row = [_task_of_row(case, shipped[i], rows) for i in todo for case in cases if shipped[i]["kernel"] in case.kernels]
    reached |= _run(list({json.dumps(task): task for task in by_row}.values()), jobs, outcome)
    for i in todo:
        if i not in reached:
            row = shipped[i]
            told = "no case compiles this launch configuration"
            advice = "let a case in profiling/kernels/cases.py launch it, or remove the row from kernels/launch_tables"
            where = f"{row['bits']} bits, size {row['size']}"
            outcome.violations.append(Violation(row["kernel"], row["target"], where, "coverage", None, told, advice))
    outcome.rows = _distinct([r for r in outcome.rows if kernel is None or kernel in (r["kernel"], r["case"])])
    if kernel is not None:
        outcome.violations = [v for v in outcome.violations if v.kernel == kernel or kernel in {c.name for c in cases}]
    compare(outcome, table, whole=kernel is None, targets=targets)
    if write:
        write_table(outcome, table, whole=kernel is None, targets=targets)
    return outcome


def _sizes(case: Case) -> list[tuple[str, int]]:
    return [(dtype, size) for dtype in case.dtypes for size in (case.sizes if dtype == case.dtypes[0] else case.sizes[:1])]


def _task(case: Case | str, target: str, dtype: str, size: int, rows: Path | None, library: str = "smalt") -> Row:
    name = case if isinstance(case, str) else case.name
    return {"library": library, "case": name, "target": target, "dtype": dtype, "size": size, "rows": str(rows) if rows else None}


def _task_of_row(case: Case, row: Row, rows: Path | None) -> Row:
    dtype = "fp32" if row["bits"] == 32 and "fp32" in case.dtypes else case.dtypes[0]
    return _task(case, row["target"], dtype, row["size"], rows)


def _run(tasks: list[Row], jobs: int, outcome: Outcome) -> set[int]:
    """Add the results of tasks to the outcome; returns the numbers of the launch table rows that they used."""
    reached: set[int] = set()
    for task, result in zip(tasks, run_tasks(tasks, jobs), strict=True):
        _take(task, result, outcome)
        if task["library"] == "smalt":
            reached.update(result.get("reached", ()))
    return reached


def _take(task: Row, result: Row, outcome: Outcome) -> None:
    """Add the result of a task to the outcome."""
    where = f"{task['dtype']} {task['size']}"
    if "error" in result:
        problems = [[task["case"], result["error"]]]
    else:
        problems = result["problems"]
        outcome.triton = result["triton"]
        outcome.compiled += len(result["rows"])
        outcome.cached += result["cached"]
        into = outcome.rows if task["library"] == "smalt" else outcome.beside
        into += [row if task["library"] == "smalt" else {**row, "library": task["library"]} for row in result["rows"]]
    for name, why in problems:
        if task["library"] != "smalt":
            outcome.notes.append(f"{task['library']} {name} on {task['target']}: {why}")
        else:
            violation = Violation(name, task["target"], where, "compilation", None, why, "nothing of it is checked until then")
            if violation not in outcome.violations:
                outcome.violations.append(violation)


def _distinct(rows: list[Row]) -> list[Row]:
    """Each kernel and configuration once; rows that differ only in what the compiler was told of their arguments are numbered."""
    seen: dict[str, list[str]] = {}
    distinct = []
    for row in rows:
        row = dict(row)
        compiled = row.pop("hash")
        hashes = seen.setdefault(_key(row), [])
        if compiled not in hashes:
            hashes.append(compiled)
            distinct.append(row if len(hashes) == 1 else {**row, "variant": len(hashes)})
    return distinct


def _key(row: Row) -> str:
    return json.dumps([row.get(name) for name in _IDENTITY], sort_keys=True)


# Processes that compile


def run_tasks(tasks: list[Row], jobs: int) -> list[Row]:
    """The result of each task, from ``jobs`` processes that do not interpret kernels; of one that died, {"error": why}."""
    queue: SimpleQueue[tuple[int, Row]] = SimpleQueue()
    for item in enumerate(tasks):
        queue.put(item)
    results: list[Row] = [{} for _ in tasks]

    def work(_: int) -> None:
        with tempfile.TemporaryFile("w+") as errors:
            process = _start(errors)
            try:
                while not queue.empty():
                    i, task = queue.get()
                    line = _ask(process, task)
                    if not line:
                        process.wait()
                        errors.seek(0)
                        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
                        results[i] = {"error": f"the compiling process died ({process.returncode}): {last}"}
                        process = _start(errors)
                    else:
                        results[i] = json.loads(line)
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe:
                        pipe.close()

    if not tasks:
        return []
    jobs = max(1, min(jobs, len(tasks)))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, range(jobs)))
    return results


def _start(errors: Any) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "smalt.profiling.kernels.worker"]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def _ask(process: subprocess.Popen[str], task: Row) -> str:
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


# The table


def compare(outcome: Outcome, table: Path, whole: bool = True, targets: Iterable[str] = TARGETS) -> None:
    """Add to the outcome the rules that its rows break, and what changed."""
    known, outcome.table_triton = _read_table(table)
    same = outcome.triton == outcome.table_triton
    for row in outcome.rows:
        _hard_rules(row, outcome)
        was = known.pop(_key(row), None)
        if was is None:
            if known or outcome.table_triton:
                _changed(row, "configuration", None, "not in the table", "add it: smalt kernels check --write", same, outcome)
            continue
        if _RANK[row["matrix"]] < _RANK[was["matrix"]]:
            _add(row, "matrix instructions", was["matrix"], row["matrix"] or "none", "find what keeps the compiler from them", outcome)
        if was["copies"] and not row["copies"]:
            advice = "give the loads a divisibility that the compiler can see, or more stages"
            _add(row, "asynchronous copies", was["copies"], "none", advice, outcome)
        for figure, before, now in _figures(was, row):
            if now > before:
                _changed(row, figure, before, now, WRITE, same, outcome)
            elif now < before:
                outcome.notes.append(f"{row['kernel']} on {row['target']}, {configuration(row)}: {figure}: was {before}, is {now}")
    if whole:
        for was in known.values():
            if was["target"] in targets:
                told = "in the table, compiled no more"
                _changed(was, "configuration", None, told, "remove it: smalt kernels check --write", same, outcome)


def _figures(was: Row, row: Row) -> Iterable[tuple[str, int, int]]:
    yield from ((name, was.get(name, 0), row.get(name, 0)) for name in GROWING)
    pairs = list(zip(was["loops"], row["loops"], strict=False))
    # Loops are told apart by their order, which says nothing where their number changed; the first has most matrix work.
    for i, (before, now) in enumerate(pairs if len(was["loops"]) == len(row["loops"]) else pairs[:1]):
        yield f"instructions an iteration of loop {i + 1}", before["total"], now["total"]
    yield "spills", was["spills"], row["spills"]


def _hard_rules(row: Row, outcome: Outcome) -> None:
    limit = CHIPS[row["target"]].shared
    if row["spills"]:
        _add(row, "spills", None, f"{row['spills']}", "use smaller tiles or more warps", outcome)
    if row["shared"] > limit:
        _add(row, "shared memory", None, f"{row['shared']} bytes of {limit}", "use smaller tiles or fewer stages", outcome)
    if row.get("tensor", 0) > TENSOR_MEMORY:
        _add(row, "tensor memory", None, f"{row['tensor']} columns of {TENSOR_MEMORY}", "use smaller tiles", outcome)


def _add(row: Row, figure: str, was: Any, now: Any, advice: str, outcome: Outcome) -> None:
    outcome.violations.append(Violation(row["kernel"], row["target"], configuration(row), figure, was, now, advice))


def _changed(row: Row, figure: str, was: Any, now: Any, advice: str, same: bool, outcome: Outcome) -> None:
    """A change that breaks a rule with the table's version of Triton and is only shown with another."""
    if same:
        _add(row, figure, was, now, advice, outcome)
    else:
        change = now if was is None else f"was {was}, is {now}"
        outcome.notes.append(f"{row['kernel']} on {row['target']}, {configuration(row)}: {figure}: {change}")


def configuration(row: Row) -> str:
    """Dtype, size, constants, tiles, warps and stages of a row, to read."""
    parts = [f"{row['dtype']} {row['size']}", *(f"{k}={v}" for k, v in {**row["tiles"], **row["constants"]}.items())]
    variant = f", variant {row['variant']}" if row.get("variant") else ""
    return f"{' '.join(parts)}, {row['num_warps']} warps, {row['num_stages']} stages{variant}"


def _read_table(path: Path) -> tuple[dict[str, Row], str]:
    if not path.exists():
        return {}, ""
    table = json.loads(path.read_text())
    return {_key(row): row for row in table["rows"]}, table["triton"]


def write_table(outcome: Outcome, path: Path, whole: bool = True, targets: Iterable[str] = TARGETS) -> None:
    """Write the rows of the outcome; where only some kernels or targets were compiled, beside the rows of the others."""
    known, version = _read_table(path)
    whole_table = whole and set(targets) == set(TARGETS)
    if known and version != outcome.triton and not whole_table:
        raise ValueError(f"{path} is of Triton {version}, this is {outcome.triton}: write all kernels and targets at once")
    names = {row["kernel"] for row in outcome.rows}
    kept = [row for row in known.values() if not whole_table and not (row["target"] in targets and (whole or row["kernel"] in names))]
    rows = sorted([*kept, *outcome.rows], key=lambda row: (row["case"], row["kernel"], TARGETS.index(row["target"]), _key(row)))
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": {json.dumps(outcome.triton)}, "rows": [\n{lines}\n]}}\n')
