"""What a table says is there whole, on a terminal of any width and in a file."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Column, Table

from smalt.profiling.tables import print_table
from smalt.profiling.trace_report import overlap_report, print_overlap
from smalt.profiling.traces import Collective, RankTrace

ROWS = [["fsdp_cp_tp", "12345.678", "two words, and some more of them", f"FSDP::all_gather (language.blocks.{i})"] for i in range(3)]


def printed(terminal, width, show):
    file = io.StringIO()
    show(Console(file=file, force_terminal=terminal, width=width, color_system=None))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def table():
    made = Table("axis", Column("milliseconds", justify="right"), "said", Column("annotation", no_wrap=True), title="A title")
    for row in ROWS:
        made.add_row(*row)
    return made


@pytest.mark.parametrize("width", [10, 40, 80, 120, 300])
def test_nothing_is_cut(width):
    out = printed(True, width, lambda console: print_table(console, table()))
    for row in ROWS:
        assert all(out.count(word) >= 1 for cell in row for word in cell.split())
        assert row[3] in out
    assert "milliseconds" in out
    assert len(set(map(len, out.splitlines()[1:]))) == 1, "the columns stand under each other"
    assert width < 120 or max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("width", [10, 80, 300])
def test_a_row_is_one_line_where_there_is_no_terminal(width):
    lines = printed(False, width, lambda console: print_table(console, table())).splitlines()
    assert len(lines) == 3 + 1 + len(ROWS) + 1
    assert all(any(all(cell in line for cell in row) for line in lines) for row in ROWS)


@pytest.mark.parametrize("terminal", [True, False])
def test_trace_tables(terminal):
    found = tuple(
        Collective(kind, "fsdp_cp_tp", f"{label} ([vision].blocks.{i})", 1e5 * i, 1e5 * i + 258.1234, 12)
        for i in range(3)
        for kind, label in (("all_gather", "FSDP::all_gather"), ("reduce_scatter", "FSDP::post_backward_reduce"))
    )
    report = overlap_report([RankTrace("hand", 0, 1, "cpu", ((1, 0, 3e5),), (), found)])
    out = printed(terminal, 80, lambda console: print_overlap(report, console))
    lines = [line for line in out.splitlines() if "blocks" in line]
    # By kind three of each together, by annotation one of each in a line of its own.
    assert re.search(r"fsdp_cp_tp +all_gather +3 +0 +0\.000 +0\.77 +0\.00 +0\.77", out)
    for kind, label in (("all_gather", "FSDP::all_gather"), ("reduce_scatter", "FSDP::post_backward_reduce")):
        for i in range(3):
            wanted = rf"fsdp_cp_tp +{kind} +1 +0 +0\.000 +0\.26 +0\.00 +0\.26 +{label} \(\[vision\]\.blocks\.{i}\)"
            assert sum(bool(re.search(wanted, line)) for line in lines) == 1
