"""The report of a curation: what each step removed, how much and why, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from smalt.profiling.tables import print_table


@dataclass(frozen=True)
class StepReport:
    """One step. read: records that came to it; causes: records that it removed, by cause; changed: of those that are kept in the end;
    examples: the first records of each cause, each with its source, its number there and the detail."""

    name: str
    kind: str
    read: int
    causes: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        return sum(self.causes.values())


@dataclass(frozen=True)
class Report:
    """sources: path, records read and kept, by name; evaluation_sets: what decontamination compared with, by step; seconds: of the
    first pass, the decisions and the second pass."""

    output: str
    sources: dict[str, dict[str, Any]]
    steps: list[StepReport]
    evaluation_sets: dict[str, dict[str, Any]]
    processes: int
    seconds: dict[str, float]

    @property
    def read(self) -> int:
        return sum(source["read"] for source in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(source["kept"] for source in self.sources.values())

    @property
    def records_per_second(self) -> float:
        return self.read / max(sum(self.seconds.values()), 1e-9)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "steps": [{**asdict(step), "removed": step.removed} for step in self.steps],
            "records": {"read": self.read, "kept": self.kept, "removed": self.read - self.kept},
            "records_per_second": self.records_per_second,
        }


def print_report(report: Report) -> None:
    console = Console(highlight=False)
    table = Table("step", "kind", title=f"{report.read:,} records, {report.kept:,} kept", box=None, title_justify="left")
    for column in ("read", "removed", "changed"):
        table.add_column(column, justify="right")
    table.add_column("causes")
    for step in report.steps:
        causes = "\n".join(f"{count:,} {cause}" for cause, count in sorted(step.causes.items(), key=lambda item: -item[1]))
        counts = (f"{n:,}" if n else "" for n in (step.read, step.removed, step.changed))
        table.add_row(step.name, step.kind, *counts, causes)
    print_table(console, table)
    for name, found in report.evaluation_sets.items():
        unreadable = sum(found["unreadable"].values())
        console.print(
            f"{name}: compared with {found['records']:,} records of evaluation sets, {unreadable:,} of them not readable "
            f"({found['ngrams']:,} n-grams, {found['images']:,} images)", soft_wrap=True, markup=False,
        )  # fmt: skip
    seconds = ", ".join(f"{what} {spent:.1f} s" for what, spent in report.seconds.items())
    processes = f"{report.processes} process{'es' if report.processes > 1 else ''}"
    console.print(f"{report.records_per_second:,.0f} records/s with {processes} ({seconds})", soft_wrap=True, markup=False)
    console.print(f"{report.output}: one Parquet file a source, report.json, removed.jsonl", soft_wrap=True, markup=False)
