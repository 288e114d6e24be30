"""Results of ``smalt bench kernels``: JSON files, and the table in docs/kernels.md that is made of them and of nothing else.

A file is one run on one GPU: date, machine, versions, rooflines, and a row for each operation, shape and contestant. Of each GPU the
table shows the newest whole run, or where there is none the newest partial one, and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NOT_MEASURED = "not measured"
FORMAT = 1
UNITS = {"copy": ("GB/s", 1e9), "matmul": ("TFLOP/s", 1e12)}
LEGEND = """\
Median time with the 20th and the 80th percentile in brackets, in milliseconds; rates of the useful work over the median (bytes: each
input once in, each output once out; FLOP: nothing that is computed again), and what they are of the copy or of the matrix product that
the same run measured. `peak`: most memory beyond the inputs, forward and backward; `workspace`: what of it are neither outputs nor
gradients. `against`: time over Smalt's, forward and backward together; above 1 Smalt is faster."""

Result = dict[str, Any]
Row = dict[str, Any]


# Files


def file_name(result: Result) -> str:
    """GPU and date, for example ``nvidia-h100-80gb-hbm3_2026-11-24T2105.json``."""
    gpu = re.sub(r"[^a-z0-9]+", "-", result["machine"]["gpu"].lower()).strip("-")
    return f"{gpu}_{result['date'][:16].replace(':', '')}{'' if result['whole'] else '_partial'}.json"


def write_result(result: Result, folder: Path) -> Path:
    """Write a run into a folder; returns the file. Never over another run: then a number is added to the name."""
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / file_name(result), 2
    while path.exists():
        path, number = folder / file_name(result).replace(".json", f"_{number}.json"), number + 1
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def read_results(folder: Path) -> list[Result]:
    """All runs in a folder, by GPU and date. Raises ValueError for a file that is not one of ours."""
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise ValueError(f"{path}: not a result of smalt bench kernels of format {FORMAT}")
        results.append(result)
    return sorted(results, key=lambda r: (r["machine"]["gpu"], r["date"]))


def shown(results: Iterable[Result]) -> list[Result]:
    """One run of each GPU, by the name of the GPU: the newest whole one, else the newest."""
    by_gpu: dict[str, Result] = {}
    for result in sorted(results, key=lambda r: (r["machine"]["gpu"], r["whole"], r["date"])):
        by_gpu[result["machine"]["gpu"]] = result
    return list(by_gpu.values())


# Figures


def percent(row: Row, part: str, roofline: dict[str, float]) -> float:
    """What a part reached of the roofline that the same run measured, in percent."""
    return 100 * rate(row, part) / roofline[row["roofline"]]


def rate(row: Row, part: str) -> float:
    """Useful work a second: bytes or FLOP."""
    return row["work"][part] / row["times"][part]["median"]


def ratio(row: Row, mine: Row | None) -> float | None:
    """Time of a contestant over Smalt's, of all that was timed; None where one has none."""
    if not row["times"] or mine is None or not mine["times"]:
        return None
    part = "both" if "both" in row["times"] else next(iter(row["times"]))
    return row["times"][part]["median"] / mine["times"][part]["median"]


# The table

PARTS = ("forward", "backward", "both")
HEADER = ("", "forward ms", "rate", "%", "backward ms", "rate", "%", "both ms", "peak MiB", "workspace MiB", "against")


def render(results: Iterable[Result], operations: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    """Markdown of results; operations: names with the names of their shapes, which are "not measured" where no result has them."""
    chosen, operations = shown(results), list(operations)
    if not chosen:
        lines = ["| operation | shape | |", "|---|---|---|"]
        lines += [f"| {name} | {shape} | {NOT_MEASURED} |" for name, shapes in operations for shape in shapes]
        return "\n".join(lines)
    lines = [LEGEND, ""]
    for result in chosen:
        lines += [*_heading(result), ""]
        for name, shapes in operations:
            for shape in shapes:
                lines += [*_table(result, name, shape), ""]
    return "\n".join(lines).rstrip()


def _heading(result: Result) -> list[str]:
    machine, versions, roofline = result["machine"], result["versions"], result["roofline"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    limit = f"power limit {machine['power_limit_w']:.0f} W" if machine["power_limit_w"] is not None else "power limit unknown"
    clocks = (
        f"clocks at most {machine['max_sm_mhz']:.0f} MHz (SM) and {machine['max_memory_mhz']:.0f} MHz (memory)"
        if machine["max_sm_mhz"] is not None and machine["max_memory_mhz"] is not None
        else "clocks unknown"
    )
    whole = "" if result["whole"] else " Only a part was measured."
    source = f"told by {machine['source']}" if not machine["source"].startswith("none") else f"asked in vain: {machine['source']}"
    return [
        f"### {machine['gpu']}",
        "",
        f"{result['date'][:10]}; driver {machine['driver'] or 'unknown'}, {limit}, {clocks}, {source}; {known}.",
        f"Measured: copy {_rate(roofline['copy'], 'copy')}, bf16 product {_rate(roofline['matmul'], 'matmul')}.{whole}",
    ]


def _table(result: Result, name: str, shape: str) -> list[str]:
    rows = [row for row in result["rows"] if (row["operation"], row["shape"]) == (name, shape)]
    title = f"**{name}**, {shape}"
    if not rows:
        return [f"{title}: {NOT_MEASURED}"]
    clocks = rows[0]["clocks"]
    if clocks.get("sm_mhz") is not None:
        title += f" (SM at {clocks['sm_mhz']:.0f} MHz)"
    lines = [title, "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    mine = next((row for row in rows if row["contestant"] == "smalt"), None)
    lines += ["| " + " | ".join(_cells(row, mine, result["roofline"])) + " |" for row in rows]
    notes = [f"{row['contestant']}: {row['note']}" for row in rows if row["note"]]
    return [*lines, *(["", "; ".join(notes) + "."] if notes else [])]


def _cells(row: Row, mine: Row | None, roofline: dict[str, float]) -> list[str]:
    empty = [""] * (len(HEADER) - 1)
    if row["absent"] is not None:
        return [row["contestant"], f"absent: {_escaped(row['absent'])}", *empty[1:]]
    # What has one part only stands in the first columns.
    times = {"forward" if part == "step" else part: t for part, t in row["times"].items()}
    cells = [row["contestant"]]
    for part in ("forward", "backward"):
        if part not in times:
            cells += ["", "", ""]
            continue
        given = part if part in row["times"] else "step"
        cells += [_milliseconds(times[part]), _rate(rate(row, given), row["roofline"]), f"{percent(row, given, roofline):.0f}"]
    cells.append(_milliseconds(times["both"]) if "both" in times else "")
    memory, against = row["memory"], ratio(row, mine)
    cells += [f"{memory['peak'] / 2**20:,.1f}", f"{memory['workspace'] / 2**20:,.1f}"]
    return [*cells, "" if row is mine or against is None else f"{against:.2f}"]


def _milliseconds(t: dict[str, float]) -> str:
    median, low, high = (1e3 * t[k] for k in ("median", "p20", "p80"))
    digits = 4 if median < 1 else 3 if median < 10 else 2
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _rate(value: float, roofline: str) -> str:
    unit, scale = UNITS[roofline]
    return f"{value / scale:,.0f} {unit}" if value / scale >= 10 else f"{value / scale:.2f} {unit}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# The page


def insert_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """Text with the section between the two marks: in place of what stands there, or at the end where there are no marks.

    Raises ValueError where only one of the marks is there, or where they are out of order.
    """
    marked = f"{begin}\n\n{section}\n\n{end}"
    if begin not in text and end not in text:
        return f"{text.rstrip()}\n\n{marked}\n" if text.strip() else f"{marked}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one {begin} and one {end} after it")
    return text[: text.index(begin)] + marked + text[text.index(end) + len(end) :]


def write_docs(section: str, path: Path = DOCS) -> None:
    """Put the section into a Markdown file, which is made if it is not there. The rest of the file is left as it is."""
    before = path.read_text() if path.exists() else ""
    path.write_text(insert_section(before, section))
