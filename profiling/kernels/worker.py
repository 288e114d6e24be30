"""The process that compiles: reads a task a line from stdin, writes its result a line to stdout, both JSON.

A process of its own, since kernels that were imported under TRITON_INTERPRET cannot be compiled, and since the compiler may crash.

    task    {"library": "smalt", "case": .., "target": .., "dtype": .., "size": .., "rows": path of launch tables or null}
    result  {"triton": version, "rows": [..], "problems": [[kernel, why], ..], "reached": numbers of launch table rows, "cached": n}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from smalt.kernels.launch import TABLES, Launch, recording

from .cases import CASES, DTYPES
from .compile import compile_launch
from .machine_code import figures


def launch_rows(path: str | None) -> list[dict[str, Any]]:
    """The rows of the launch tables in a file or a folder; of those that ship without one."""
    place = Path(path) if path else TABLES
    return [row for file in (sorted(place.glob("*.json")) if place.is_dir() else [place]) for row in json.loads(file.read_text())]


def examine(task: dict[str, Any]) -> dict[str, Any]:
    """Record, compile and read one case on one target."""
    import triton

    result: dict[str, Any] = {"triton": triton.__version__, "rows": [], "problems": [], "reached": [], "cached": 0}
    rows = launch_rows(task["rows"])
    seen: set[str] = set()
    for launch in _record(task, rows, result["problems"]):
        # Configurations hold the very dict of the row that they came from.
        result["reached"] += [i for i, row in enumerate(rows) if row["tiles"] is launch.config.tiles]
        try:
            compiled = compile_launch(launch)
            if compiled.kernel.hash in seen:
                continue
            seen.add(compiled.kernel.hash)
            found = figures(compiled.kernel, launch.target)
        except Exception as error:
            result["problems"].append([launch.name, f"does not compile: {type(error).__name__}: {_first_line(error)}"])
            continue
        result["cached"] += compiled.cached
        result["rows"].append({**_identity(task, launch), **found, "hash": compiled.kernel.hash})
    return result


def _record(task: dict[str, Any], rows: list[dict[str, Any]], problems: list[list[str]]) -> list[Launch]:
    if task["library"] != "smalt":
        from .others import record_other

        return record_other(task["library"], task["case"], task["size"], task["target"], DTYPES[task["dtype"]])
    launches: list[Launch] = []
    (case,) = [c for c in CASES if c.name == task["case"]]
    for call in case.launches:
        with recording(task["target"], rows) as record:
            try:
                call(task["size"], DTYPES[task["dtype"]])
            except KeyError as error:
                if not (error.args and isinstance(error.args[0], tuple) and len(error.args[0]) == 3):
                    raise
                kernel, target, bits = error.args[0]
                problems.append([kernel, f"no launch configuration for {target}, {bits} bits: add a row to kernels/launch_tables"])
            except Exception as error:
                problems.append([task["case"], f"cannot be launched: {type(error).__name__}: {_first_line(error)}"])
        launches += record
    return launches


def _identity(task: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """What was compiled: the first columns of the table."""
    tiles = launch.config.tiles
    constants = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in launch.constants.items() if k not in tiles}
    return {
        "kernel": launch.name,
        "case": task["case"],
        "target": launch.target,
        "dtype": task["dtype"],
        "size": task["size"],
        "constants": constants,
        "tiles": tiles,
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
    }


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def main() -> None:
    # What libraries print must not mix with the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            result = examine(json.loads(line))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    main()
