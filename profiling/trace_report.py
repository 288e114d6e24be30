"""``smalt trace``: how much communication a step hides behind compute, from the traces of its ranks: a table, JSON, a picture.

For each rank, within the recorded steps, with unions of intervals:

    compute        the rank computes
    communication  at least one collective is in flight        = covered + exposed
    exposed        a collective is in flight and the rank computes nothing
    idle           neither                                     window = compute + exposed + idle

The same for the collectives of one axis, or of one axis and kind, alone; what two axes share in time counts for both, so axes add up
to more than communication where they overlap. What is in flight, and how far a trace of a CPU can tell: see traces.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .tables import print_table
from .traces import Collective, Interval, RankTrace, intersection, length, union

MAX_LABELS, MAX_RANKS_DRAWN = 12, 8
Figures = dict[str, Any]


def overlap_report(traces: Sequence[RankTrace]) -> dict[str, Any]:
    """What :func:`print_overlap` shows, ready for JSON. Times in seconds, over all recorded steps.

    ``ranks`` has one entry a trace; ``together`` their sums (counts, bytes, rank-seconds). Each has window, compute, communication,
    covered, exposed, idle; ``axes``, ``kinds`` (by axis and kind) and ``labels`` (by axis, kind and annotation, FSDP2's block for one)
    with count, bytes, total, covered, exposed, and overlapped: how many were in flight while the rank computed.
    """
    ranks = [_rank(trace) for trace in traces]
    return {
        "num_ranks": len(traces), "world_size": max(t.world_size for t in traces), "device": traces[0].device,
        "steps": [number for number, _, _ in traces[0].steps], "ranks": ranks, "together": _together(ranks),
    }  # fmt: skip


def _rank(trace: RankTrace) -> Figures:
    window = union((start, end) for _, start, end in trace.steps)
    compute = intersection(trace.compute, window)
    own = [c for c in trace.collectives if intersection([(c.start, max(c.end, c.start + 1e-3))], window)]
    flight = intersection(union((c.start, c.end) for c in own), window)
    covered = length(intersection(flight, compute))
    busy = length(union([*flight, *compute]))
    return {
        "rank": trace.rank, "num_steps": len(trace.steps), "window": length(window) / 1e6, "compute": length(compute) / 1e6,
        "communication": length(flight) / 1e6, "covered": covered / 1e6, "exposed": (length(flight) - covered) / 1e6,
        "idle": (length(window) - busy) / 1e6, "estimated": sum(c.estimated for c in own),
        "axes": _grouped(own, window, compute, lambda c: {"axis": c.axis}),
        "kinds": _grouped(own, window, compute, lambda c: {"axis": c.axis, "kind": c.kind}),
        "labels": _grouped(own, window, compute, lambda c: {"axis": c.axis, "kind": c.kind, "label": c.label}),
    }  # fmt: skip


def _grouped(
    collectives: Iterable[Collective], window: list[Interval], compute: list[Interval], name: Callable[[Collective], dict[str, str]]
) -> list[Figures]:
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for c in collectives:
        groups.setdefault(tuple(name(c).values()), []).append(c)
    rows = []
    for found in groups.values():
        flight = intersection(union((c.start, c.end) for c in found), window)
        covered = length(intersection(flight, compute))
        overlapped = sum(bool(intersection([(c.start, c.end)], compute)) for c in found)
        rows.append(
            {
                **name(found[0]), "count": len(found), "bytes": sum(c.nbytes for c in found), "total": length(flight) / 1e6,
                "covered": covered / 1e6, "exposed": (length(flight) - covered) / 1e6, "overlapped": overlapped,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["exposed"])


def _together(ranks: list[Figures]) -> Figures:
    """Sums over ranks; rows of the same axis, kind and label are one."""
    total: Figures = {}
    for rank in ranks:
        for key, value in rank.items():
            if isinstance(value, list):
                rows = total.setdefault(key, {})
                for row in value:
                    names = {k: v for k, v in row.items() if isinstance(v, str)}
                    into = rows.setdefault(tuple(names.values()), {**names})
                    for k in row.keys() - names.keys():
                        into[k] = into.get(k, 0) + row[k]
            elif key != "rank":
                total[key] = total.get(key, 0) + value
    return {k: sorted(v.values(), key=lambda row: -row["exposed"]) if isinstance(v, dict) else v for k, v in total.items()}


# Table


def print_overlap(report: dict[str, Any], console: Console | None = None) -> None:
    """The tables of :func:`overlap_report`, for people: milliseconds a step; together: the mean over ranks."""
    console = console or Console()
    together, steps = report["together"], report["steps"]
    console.print(
        f"steps {steps[0]} to {steps[-1]}, {report['num_ranks']} of {report['world_size']} ranks, {report['device']}; "
        "milliseconds a step, means over steps and ranks"
    )
    times = Table("rank", *(_right(n) for n in ("step", "compute", "communication", "covered", "exposed", "idle")), title="Overlap")
    for name, row in [*((str(r["rank"]), r) for r in report["ranks"]), ("all", together)]:
        figures = (row[k] for k in ("window", "compute", "communication", "covered", "exposed", "idle"))
        times.add_row(name, *(_ms(f, row) for f in figures))
    print_table(console, times)
    print_table(console, _table("By axis and kind", together["kinds"], together))
    labels = [row for row in together["labels"] if row["label"]]
    if labels:
        title = f"Most exposed, by annotation ({min(MAX_LABELS, len(labels))} of {len(labels)})"
        print_table(console, _table(title, labels[:MAX_LABELS], together))
    if together["estimated"]:
        console.print(f"{together['estimated']} collectives end, or are of an axis, by estimate (profiling/traces.py says which)")


def _table(title: str, rows: list[Figures], of: Figures) -> Table:
    # "overlaps": how many of them were in flight while the rank computed.
    figures = ("count", "overlaps", "MB", "total", "covered", "exposed")
    table = Table("axis", "kind", *(_right(n) for n in figures), title=title, title_justify="left", box=None)
    labelled = "label" in rows[0] if rows else False
    if labelled:
        # Last: on a narrow terminal it is what goes on in the next line.
        table.add_column("annotation", no_wrap=True)
    for row in rows:
        count, overlapped = (f"{row[k] / of['num_steps']:.4g}" for k in ("count", "overlapped"))
        size = f"{row['bytes'] / 1e6 / of['num_steps']:.3f}"
        times = (_ms(row[k], of) for k in ("total", "covered", "exposed"))
        table.add_row(row["axis"], row["kind"], count, overlapped, size, *times, *([escape(row["label"])] if labelled else []))
    return table


def _right(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _ms(seconds: float, of: Figures) -> str:
    """of: has num_steps, the sum over ranks where the seconds are one too."""
    return f"{seconds * 1e3 / of['num_steps']:.2f}"


# Picture


def plot_overlap(traces: Sequence[RankTrace], report: dict[str, Any], path: Path) -> None:
    """One picture: the last recorded step of each rank as a timeline (the first eight ranks), and covered and exposed time by axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = traces[:MAX_RANKS_DRAWN]
    axes_names = [row["axis"] for row in report["together"]["axes"]]
    height = max(3.5, 1.2 + 0.4 * len(shown) * (1 + len(axes_names)))
    figure, (lanes, bars) = plt.subplots(1, 2, figsize=(14, height), width_ratios=(3, 1), layout="constrained")
    _plot_lanes(lanes, shown, axes_names)
    _plot_bars(bars, report["together"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_lanes(plot: Any, traces: Sequence[RankTrace], axes_names: list[str]) -> None:
    """From top to bottom: of each rank its compute, then one lane an axis."""
    names, row = [], 0
    for trace in traces:
        _, start, end = trace.steps[-1]
        step = [(start, end)]
        lanes = [("compute", "0.6", list(trace.compute))]
        for i, axis in enumerate(axes_names):
            lanes.append((axis, f"C{i}", union((c.start, c.end) for c in trace.collectives if c.axis == axis)))
        for name, color, intervals in lanes:
            inside = [((a - start) / 1e3, (b - a) / 1e3) for a, b in intersection(intervals, step)]
            plot.broken_barh(inside, (row + 0.1, 0.8), color=color)
            names.append(f"rank {trace.rank}  {name}")
            row += 1
        plot.axhline(row, color="0.8", linewidth=0.8)
    plot.set(title=f"Step {traces[0].steps[-1][0]}", xlabel="ms from the rank's start of the step", ylim=(row, 0))
    plot.set_yticks([i + 0.5 for i in range(row)], names, fontsize=8)


def _plot_bars(plot: Any, together: Figures) -> None:
    rows = together["axes"]
    covered, exposed = ([row[k] * 1e3 / together["num_steps"] for row in rows] for k in ("covered", "exposed"))
    plot.bar(range(len(rows)), covered, 0.6, color="0.7", label="covered")
    drawn = plot.bar(range(len(rows)), exposed, 0.6, bottom=covered, color="C3", label="exposed")
    plot.bar_label(drawn, [f"{value:.1f} exposed" for value in exposed], fontsize=8)
    plot.set(title="In flight, mean of a rank and step", ylabel="ms", xticks=range(len(rows)), xticklabels=[r["axis"] for r in rows])
    plot.margins(y=0.12)
    if rows:
        plot.legend(fontsize=8)
