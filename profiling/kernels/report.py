"""The outcome of ``smalt kernels check``, to read: on the terminal and in docs/kernels.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smalt.kernels.launch import TARGETS

from .check import TABLE, Outcome, Row

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
SHOWN = "sm_90"  # the chip in the file
BEGIN, END = "<!-- smalt kernels check: begin -->", "<!-- smalt kernels check: end -->"
_COLUMNS: tuple[tuple[str, Callable[[Row], Any]], ...] = (
    ("kernel", lambda row: f"{row['library']}: {row['kernel']}" if "library" in row else row["kernel"]),
    ("size", lambda row: f"{row['dtype']} {row['size']}"),
    ("configuration", lambda row: _configuration(row)),
    ("warps, stages", lambda row: f"{row['num_warps']}, {row['num_stages']}"),
    ("registers", lambda row: row["registers"]),
    ("spills", lambda row: row["spills"]),
    ("shared KiB", lambda row: round(row["shared"] / 1024, 1)),
    ("matrix", lambda row: row["matrix"]),
    ("copies", lambda row: row["copies"]),
    ("an iteration", lambda row: _loops(row, "total")),
    ("matrix i.", lambda row: _loops(row, "matrix")),
    ("special", lambda row: _loops(row, "special")),
    ("fp32", lambda row: _loops(row, "fp32")),
    ("integer", lambda row: _loops(row, "integer")),
    ("mask", lambda row: _loops(row, "mask")),
    ("memory", lambda row: _loops(row, "memory")),
    ("overlap %", lambda row: _loops(row, "overlap")),
    ("alone %", lambda row: _loops(row, "alone")),
)
LEGEND = """\
A row is one binary. Columns after `copies` (asynchronous ones to shared memory) count one warp's instructions in one iteration of the
innermost loops, the one with most matrix work first; `mask` are the compares and selects among the others. `overlap` is the share of
the chip's peak of matrix instructions that the loop allows when all pipes run side by side, `alone` when they run one after another;
both follow from public issue rates (profiling/kernels/chips.py), and nothing of this was measured."""

REST = f"""\
First {SHOWN}, whole, then the kernels with products on all chips. `smalt kernels check --target NAME` prints a chip; the committed
figures of all are in profiling/kernels/table.json. Instructions are told apart on NVIDIA's chips only."""
# Shown for every chip, in bf16: kernel and size.
MAIN = (
    ("attention_forward", 128),
    ("attention_dq", 128),
    ("attention_dkv", 128),
    ("linear_statistics_forward", 2560),
    ("linear_statistics_backward", 2560),
    ("matmul", 2560),
    ("matmul_weight", 2560),
)


def _configuration(row: Row) -> str:
    """Tiles, and the constants that switch something on."""
    switched = [] if "library" in row else [name for name, value in row["constants"].items() if value is True]
    return " ".join([*(f"{name}={value}" for name, value in row["tiles"].items()), *switched])


def _loops(row: Row, figure: str) -> str:
    """A figure of up to three loops."""
    values = [loop.get(figure, None if figure in ("overlap", "alone") else 0) for loop in row["loops"][:3]]
    return "/".join("" if v is None else str(v) for v in values) if any(v is not None for v in values) else ""


def _tables(outcome: Outcome) -> list[tuple[str, list[Row]]]:
    """The rows of each target, those of other libraries behind Smalt's of the same operation."""
    rows = [*outcome.rows, *outcome.beside]
    order = list(dict.fromkeys(row["case"] for row in rows))
    rows = sorted(rows, key=lambda row: (order.index(row["case"]), "library" in row))
    return [(target, [r for r in rows if r["target"] == target]) for target in dict.fromkeys(row["target"] for row in rows)]


def print_outcome(outcome: Outcome) -> int:
    """Show the outcome; returns the exit code: 1 where a rule is broken, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..tables import print_table

    console = Console()
    for target, rows in _tables(outcome):
        table = Table(title=target, title_justify="left", box=None, padding=(0, 1))
        for name, _ in _COLUMNS:
            table.add_column(name, no_wrap=name == "kernel")
        for row in rows:
            table.add_row(*(escape(str(value(row))) for _, value in _COLUMNS), style="dim" if "library" in row else None)
        print_table(console, table)
    for library in outcome.absent:
        console.print(f"{library}: not installed")
    for note in outcome.notes:
        console.print(escape(note), soft_wrap=True)
    for violation in outcome.violations:
        console.print(f"[bold red]{escape(str(violation))}[/]", soft_wrap=True)
    against = f"the table of Triton {outcome.table_triton}" if outcome.table_triton else "no table"
    if outcome.table_triton and outcome.table_triton != outcome.triton:
        against += " (another version: figures are only shown)"
    print(f"Triton {outcome.triton} against {against}: {outcome.compiled} kernels, {outcome.cached} from Triton's cache")
    print(f"{len(outcome.violations)} broken rules" if outcome.violations else "all rules hold")
    return 1 if outcome.violations else 0


def _main_rows() -> list[Row]:
    """The rows of ``MAIN`` in the committed table, each kernel's together."""
    rows = [r for r in json.loads(TABLE.read_text())["rows"] if r["dtype"] == "bf16" and "variant" not in r]
    return [r for kernel in MAIN for target in TARGETS for r in rows if (r["kernel"], r["size"]) == kernel and r["target"] == target]


def _markdown(columns: Iterable[tuple[str, Callable[[Row], Any]]], rows: Iterable[Row]) -> list[str]:
    columns = tuple(columns)
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(str(value(row)) for _, value in columns) + " |" for row in rows]


def write_docs(outcome: Outcome, path: Path = DOCS) -> None:
    """Put the table of ``SHOWN`` between its marks in a Markdown file, at its end where it has none; without rows change nothing."""
    shown = [rows for target, rows in _tables(outcome) if target == SHOWN]
    if not shown:
        return
    lines = [BEGIN, "", f"Triton {outcome.triton}, from `smalt kernels check --write`.", "", LEGEND, "", REST, ""]
    lines += [f"### {SHOWN}", "", *_markdown(_COLUMNS, shown[0]), ""]
    chip: tuple[str, Callable[[Row], Any]] = ("chip", lambda row: row["target"])
    kept = [column for column in _COLUMNS if column[0] not in ("size", "integer", "memory", "special", "fp32")]
    lines += ["### All chips", "", *_markdown((kept[0], chip, *kept[1:]), _main_rows()), ""]
    lines += [f"{library}: not installed where this was written." for library in outcome.absent]
    text = path.read_text() if path.exists() else "# Kernels\n\n## What the compiler makes of them\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2].lstrip("\n")
    path.write_text(head.rstrip() + "\n\n" + "\n".join([*lines, END]) + "\n" + (f"\n{tail}" if tail else ""))
