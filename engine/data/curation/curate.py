"""Runs a curation in two passes: all steps over every record, then the decisions over whole sources, then what is kept is written.

A step over the sources sees only what the steps before it have left, as if one had run after the other; it decides when all signatures
are there, and until then signatures are all that is held.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

from rich.progress import track

from .config import CurationConfig, Decontaminate
from .decontamination import EvaluationIndex, evaluation_index, open_sets
from .job import READ, WRITE, Chunk, Examined, Job, Row, chunks, image_limits
from .output import REMOVED, REPORT, RecordWriter, check_output, output_folder
from .report import Report, StepReport
from .steps import Removed, SourceStep
from .workers import Run, workers


@dataclass(frozen=True)
class Numbering:
    """All records in the order of reading. sources: the range of numbers of each."""

    sources: dict[str, range]

    @classmethod
    def of(cls, job: Job) -> Numbering:
        edges = accumulate((len(source) for source in job.sources.values()), initial=0)
        return cls({name: range(low, high) for name, (low, high) in zip(job.sources, pairwise(edges), strict=True)})

    def place(self, number: int) -> tuple[str, int]:
        """Source, and number in it."""
        return next((name, number - numbers.start) for name, numbers in self.sources.items() if number in numbers)


# Of each removed record, by number: the place of the step that removed it (-1: reading; the number of steps: writing), and why.
Removals = dict[int, tuple[int, Removed]]


def curate(config: CurationConfig, overwrite: bool = False, show_progress: bool = False) -> Report:
    """Run the steps of a config and write its output: NAME.parquet of each source, report.json, removed.jsonl with a line a record.

    The Parquet files and removed.jsonl do not depend on the number of processes. Bad records are counted by cause. Raises UserError
    for a source, library or tokenizer that is not there, and for an output that is there already, or cannot be written.
    """
    check_output(config, overwrite)
    indices = {
        name: evaluation_index(open_sets(step), step, image_limits(config))
        for name, step in config.steps.items()
        if isinstance(step, Decontaminate)
    }
    job = Job.open(config, indices)
    numbering = Numbering.of(job)
    with workers(job, indices) as run, output_folder(config.output) as folder:
        for _ in run("examine", [("", ())]):  # what takes seconds to start has started before the clock
            pass
        clock = _Clock()
        removals, signatures = _examine(config, numbering, job, run, show_progress)
        clock.lap("examining")
        _decide(job, signatures, removals)
        clock.lap("deciding")
        changed = _write(config, numbering, removals, job, run, folder, show_progress)
        clock.lap("writing")
        report = _report(config, numbering, removals, changed, indices, clock.seconds)
        _write_text(folder / REMOVED, _removed_lines(numbering, removals, report))
        _write_text(folder / REPORT, [json.dumps({**report.as_json(), "config": config.model_dump(mode="json")}, indent=2)])
    return report


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self.seconds[what], self._last = now - self._last, now


def _examine(
    config: CurationConfig, numbering: Numbering, job: Job, run: Run, shown: bool
) -> tuple[Removals, dict[int, list[tuple[int, bytes]]]]:
    """What single records are removed for, and the signatures of the others by the place of the step that decides over them."""
    removals: Removals = {}
    over_sources = [place for place, step in enumerate(job.steps) if isinstance(step, SourceStep)]
    signatures: dict[int, list[tuple[int, bytes]]] = {place: [] for place in over_sources}
    cut = chunks({name: range(len(numbers)) for name, numbers in numbering.sources.items()}, config.chunk)
    for (source, numbers), results in _shown("examining", cut, run("examine", cut), shown):
        for number, found in zip(numbers, cast(list[Examined], results), strict=True):
            number += numbering.sources[source].start
            for place, signature in zip(over_sources, found.signatures, strict=False):
                if signature is not None:
                    signatures[place].append((number, signature))
            if found.removed is not None:
                removals[number] = found.stop, found.removed
    return removals, signatures


def _decide(job: Job, signatures: dict[int, list[tuple[int, bytes]]], removals: Removals) -> None:
    for place, of_it in signatures.items():
        step = job.steps[place]
        assert isinstance(step, SourceStep)
        # What a step after this one removes from its record alone still takes part here.
        there = ((n, signature) for n, signature in of_it if n not in removals or removals[n][0] > place)
        removals |= {number: (place, removed) for number, removed in step.decide(there).items()}
        of_it.clear()


def _write(
    config: CurationConfig, numbering: Numbering, removals: Removals, job: Job, run: Run, folder: Path, shown: bool
) -> Counter[int]:
    """Write the records that are kept; returns how many of them each step changed, by place. Removes those that cannot be written."""
    changed: Counter[int] = Counter()
    writers = {
        name: RecordWriter(folder / f"{name}.parquet", config.keep_columns, config.row_group_records, config.row_group_bytes)
        for name in numbering.sources
    }
    kept = {name: [n - all_.start for n in all_ if n not in removals] for name, all_ in numbering.sources.items()}
    cut = chunks(kept, config.chunk)
    for (source, numbers), rows in _shown("writing", cut, run("rows", cut), shown):
        for number, row in zip(numbers, cast(list[Row], rows), strict=True):
            if row.values is None:
                assert row.removed is not None
                removals[numbering.sources[source].start + number] = len(job.steps), row.removed
            else:
                changed.update(row.changed)
                writers[source].add(row.values, row.size)
    for writer in writers.values():
        writer.close()
    return changed


def _shown(what: str, cut: list[Chunk], results: Iterator[Any], shown: bool) -> Iterable[tuple[Chunk, Any]]:
    """Each chunk with its result, beside a bar on a terminal."""
    return track(zip(cut, results, strict=True), what, total=len(cut), disable=not shown, transient=True)


def _report(
    config: CurationConfig, numbering: Numbering, removals: Removals, changed: Counter[int],
    indices: Mapping[str, EvaluationIndex], seconds: dict[str, float],
) -> Report:  # fmt: skip
    kinds = [(READ, ""), *((name, step.kind) for name, step in config.steps.items()), (WRITE, "")]
    stopped = Counter(place for place, _ in removals.values())
    there, steps = sum(map(len, numbering.sources.values())), []
    for place, (name, kind) in enumerate(kinds, -1):
        steps.append(StepReport(name, kind, there, changed=changed[place]))
        there -= stopped[place]
    for number in sorted(removals):
        place, removed = removals[number]
        step = steps[place + 1]
        step.causes[removed.cause] = step.causes.get(removed.cause, 0) + 1
        examples = step.examples.setdefault(removed.cause, []) if config.examples else []
        if len(examples) < config.examples:
            examples.append(_line(numbering, number, removed))
    sources = {
        name: {"path": config.sources[name], "read": len(numbers), "kept": sum(n not in removals for n in numbers)}
        for name, numbers in numbering.sources.items()
    }
    sets = {
        name: {"records": i.num_records, "unreadable": dict(i.unreadable), "ngrams": len(i.grams), "images": len(i.images)}
        for name, i in indices.items()
    }
    return Report(str(config.output), sources, steps, sets, config.num_processes, seconds)


def _removed_lines(numbering: Numbering, removals: Removals, report: Report) -> Iterator[str]:
    for number in sorted(removals):
        place, removed = removals[number]
        yield json.dumps({"step": report.steps[place + 1].name, "cause": removed.cause, **_line(numbering, number, removed)})


def _line(numbering: Numbering, number: int, removed: Removed) -> dict[str, Any]:
    source, record = numbering.place(number)
    line: dict[str, Any] = {"source": source, "record": record, "detail": removed.detail}
    if removed.like is not None:
        line["like"] = dict(zip(("source", "record"), numbering.place(removed.like), strict=True))
    return line


def _write_text(path: Path, lines: Iterable[str]) -> None:
    with path.open("w") as file:
        file.writelines(line + "\n" for line in lines)
