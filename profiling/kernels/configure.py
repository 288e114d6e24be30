"""``smalt kernels configure``: the launch tables, from the model of the chips and the word of the compiler.

For each kernel, chip, width of dtype and size the fastest configuration by the model is compiled; where it spills, does not fit or
does not compile, the next one is tried. What remains is written to ``kernels/launch_tables``, beside the rows of the interpreter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smalt.kernels.launch import TABLES, TARGETS

from .cases import CASES
from .check import run_tasks
from .chips import CHIPS, TENSOR_MEMORY
from .launch_model import KERNELS, ranked, row, sizes

Row = dict[str, Any]
Key = tuple[str, str, int, int]  # kernel, target, bits, size
MAX_ROUNDS = 40
SPILLS = " spills"


def configure(kernel: str | None = None, targets: Iterable[str] = TARGETS, jobs: int = 2) -> tuple[list[Row], list[str]]:
    """The rows that the compiler confirms, and what it refused, a line each.

    kernel: only this one; targets: only these. Raises ValueError for a name that does not exist, and RuntimeError where no
    configuration of the model compiles.
    """
    targets = tuple(targets)
    chosen = [k for k in KERNELS if kernel in (None, k.name)]
    if not chosen:
        raise ValueError(f"unknown kernel {kernel!r}; choose among {', '.join(k.name for k in KERNELS)}")
    if unknown := [t for t in targets if t not in TARGETS]:
        raise ValueError(f"unknown target {unknown[0]!r}; choose among {', '.join(TARGETS)}")
    left = {}
    for k in chosen:
        for target in targets:
            for bits in k.bits:
                for size in sizes(k, bits):
                    left[k.name, target, bits, size] = [row(k, target, bits, size, guess) for guess in ranked(k, target, bits, size)]
    refused: list[str] = []
    open_keys = set(left)
    for _ in range(MAX_ROUNDS):
        for key in open_keys:
            if not left[key]:
                raise RuntimeError(f"no configuration of the model compiles for {key}; give it smaller tiles in launch_model.py")
        failed = _failures({key: rows[0] for key, rows in left.items()}, open_keys, jobs)
        for key, why in failed.items():
            first = left[key].pop(0)
            refused.append(f"{describe(first)}: {why}")
            if why.endswith(SPILLS):  # of the values of a tile; how many tiles are on their way changes little
                left[key] = [r for r in left[key] if (r["tiles"], r["num_warps"]) != (first["tiles"], first["num_warps"])]
        open_keys = set(failed)
        if not open_keys:
            return [rows[0] for rows in left.values()], refused
    refused += [f"{key}: nothing in {MAX_ROUNDS} rounds; its row is left as it is" for key in sorted(open_keys)]
    left_alone = [r for r in read_rows() if _key(r) in open_keys]
    return [rows[0] for key, rows in left.items() if key not in open_keys] + left_alone, refused


def _failures(rows: dict[Key, Row], open_keys: set[Key], jobs: int) -> dict[Key, str]:
    """Compile the open ones; of those that do not do, why."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        # Rows that are not open stand in for what a case launches besides.
        file.write(json.dumps(list(rows.values()) + _rows_of_others(rows)))
        file.flush()
        tasks = []
        for name, target, bits, size in sorted(open_keys):
            case = next(c for c in CASES if name in c.kernels)
            dtype = "fp32" if bits == 32 and "fp32" in case.dtypes else case.dtypes[0]
            # The row's own size, and those of the model that take the row.
            limits = [s for n, t, b, s in rows if (n, t, b) == (name, target, bits)]
            taken = {s for s in case.sizes if size == min((limit for limit in limits if limit >= s), default=None)}
            for each in sorted({size, *taken}):
                task = {"library": "smalt", "case": case.name, "target": target, "dtype": dtype, "size": each, "rows": file.name}
                if task not in tasks:
                    tasks.append(task)
        results = run_tasks(tasks, jobs)
    failed: dict[Key, str] = {}
    for task, result in zip(tasks, results, strict=True):
        if "error" in result:
            raise RuntimeError(f"{task['case']} on {task['target']}: {result['error']}")
        mine = {key for key in open_keys if key[1] == task["target"]}
        for name, why in result["problems"]:
            failed |= {key: why for key in mine if key[0] == name}
        for compiled in result["rows"]:
            if why := _complaint(compiled):
                failed |= {key: why for key in mine if _same(rows[key], compiled)}
    return failed


def _rows_of_others(rows: dict[Key, Row]) -> list[Row]:
    """Shipped rows of kernels that are not being configured."""
    present = {key[:3] for key in rows}
    return [r for r in read_rows() if _key(r)[:3] not in present]


def _complaint(compiled: Row) -> str:
    limit = CHIPS[compiled["target"]].shared
    if compiled["spills"]:
        return f"{compiled['spills']}{SPILLS}"
    if compiled["shared"] > limit:
        return f"{compiled['shared']} bytes of shared memory of {limit}"
    if compiled.get("tensor", 0) > TENSOR_MEMORY:
        return f"{compiled['tensor']} columns of tensor memory of {TENSOR_MEMORY}"
    return ""


def _same(chosen: Row, compiled: Row) -> bool:
    return all(chosen[name] == compiled[name] for name in ("kernel", "target", "tiles", "num_warps", "num_stages"))


def _key(r: Row) -> Key:
    return r["kernel"], r["target"], r["bits"], r["size"]


def read_rows(folder: Path = TABLES) -> list[Row]:
    """All rows of the launch tables."""
    return [r for path in sorted(folder.glob("*.json")) for r in json.loads(path.read_text())]


def place(r: Row) -> str:
    """Which row of the tables this is."""
    return f"{r['kernel']} on {r['target']}, {r['bits']} bits, size {r['size']}"


def choice(r: Row) -> str:
    """What the row chooses."""
    tiles = " ".join(f"{name}={value}" for name, value in r["tiles"].items())
    return f"{tiles}, {r['num_warps']} warps, {r['num_stages']} stages"


def describe(r: Row) -> str:
    return f"{place(r)}: {choice(r)}"


def write_rows(rows: list[Row], folder: Path = TABLES) -> list[Path]:
    """Put the rows into the tables that hold their kernels, in place of those with the same kernel, target and bits.

    Raises ValueError for a kernel of which no table has a row; those of the interpreter are written by hand.
    """
    written = []
    replaced = {(r["kernel"], r["target"], r["bits"]) for r in rows}
    tables = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if homeless := {r["kernel"] for r in rows} - {r["kernel"] for old in tables.values() for r in old}:
        raise ValueError(f"no table in {folder} has rows of {sorted(homeless)}: write its row for the interpreter first")
    for path, old in tables.items():
        names = list(dict.fromkeys(r["kernel"] for r in old))
        new = [r for r in old if (r["kernel"], r["target"], r["bits"]) not in replaced] + [r for r in rows if r["kernel"] in names]
        order = ["interpreter", *TARGETS]
        new.sort(key=lambda r: (names.index(r["kernel"]), order.index(r["target"]), r["bits"], r["size"]))
        if new != old:
            path.write_text("[\n" + ",\n".join(json.dumps(r) for r in new) + "\n]\n")
            written.append(path)
    return written
