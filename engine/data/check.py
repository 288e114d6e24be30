"""What a source holds, before anything is trained on it: counts, lengths, tiles, what is bad and why, and a few records to look at."""

from __future__ import annotations

import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as PIL_Image
from PIL import ImageDraw
from rich.console import Console
from rich.table import Table

from smalt.model import Document
from smalt.profiling.tables import print_table

from ..config import RunConfig
from .chat import ChatEncoder
from .loader import num_targets
from .mixture import mixture_of
from .reading import Draw, Measured, Part, Reader, SkippedSample
from .records import Records
from .workers import Workers, result_of

QUANTILES = 0.0, 0.5, 0.9, 0.99, 1.0
CHUNK = 16
# Of a sheet: pixels between pictures, its width, and characters of a line of text.
GAP, SHEET_WIDTH, LINE = 8, 1200, 160


@dataclass
class SourceReport:
    """Of the records of a source that were looked at.

    lengths, targets, tiles: of each usable one, its tokens, those that are learned, its tiles; bad: how many, by cause; examples: the
    first of each cause; shown: the first usable ones.
    """

    name: str
    path: str
    records: int
    looked_at: int = 0
    lengths: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, SkippedSample] = field(default_factory=dict)
    shown: list[Document] = field(default_factory=list)

    def add(self, made: Document | SkippedSample, num_shown: int) -> None:
        self.looked_at += 1
        if isinstance(made, SkippedSample):
            self.bad[made.cause] += 1
            self.examples.setdefault(made.cause, made)
            return
        self.lengths.append(len(made))
        self.targets.append(num_targets(made))
        self.tiles.append(len(made.tiles))
        if len(self.shown) < num_shown:
            self.shown.append(made)


def check_sources(
    sources: Mapping[str, Records],
    encoder: ChatEncoder,
    *,
    limit: int | None,
    num_workers: int,
    num_shown: int,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[SourceReport]:
    """Read, measure and decode the records of every source, in think mode. limit: of records a source, spread evenly over it."""
    workers = Workers(Reader(sources, encoder), num_workers)
    try:
        reports = []
        for name, records in sources.items():
            report = SourceReport(name, str(records.path), len(records))
            count = len(records) if limit is None else min(limit, len(records))
            chosen = [i * len(records) // count for i in range(count)]
            for made in _made(workers, [Draw(name, record, "think", None) for record in chosen]):
                report.add(made, num_shown)
                progress(name, report.looked_at, count)
            reports.append(report)
        return reports
    finally:
        workers.close()


def _made(workers: Workers, draws: Sequence[Draw]) -> Iterator[Document | SkippedSample]:
    """Documents in order; so many are worked on at a time that no worker is idle."""
    chunks = [draws[low : low + CHUNK] for low in range(0, len(draws), CHUNK)]
    measuring: deque[tuple[Sequence[Draw], Future[list[Measured | SkippedSample]]]] = deque()
    building: deque[tuple[list[Measured | SkippedSample], Future[list[Document | SkippedSample]]]] = deque()
    most = max(1, 2 * workers.count)
    while chunks or measuring or building:
        while chunks and len(measuring) < most:
            measuring.append((chunks[0], workers.measure(chunks.pop(0))))
        while measuring and len(building) < most:
            asked, future = measuring.popleft()
            found = result_of(future)
            parts = [Part(draw, one, 0, one.length) for draw, one in zip(asked, found, strict=True) if isinstance(one, Measured)]
            building.append((found, workers.build(parts)))
        found, built = building.popleft()
        made = iter(result_of(built))
        yield from (one if isinstance(one, SkippedSample) else next(made) for one in found)


@dataclass(frozen=True)
class StageShare:
    """What a stage takes of a source. share: of the samples that it draws, bad ones too; tokens: in all; epochs: times that each
    record is seen; most: times that it may be, None for any; enough: of the stage's tokens, the share that there is before all of its
    sources are used up."""

    stage: str
    source: str
    share: float
    tokens: float
    epochs: float
    most: float | None
    enough: float


def stage_shares(config: RunConfig, reports: Sequence[SourceReport]) -> list[StageShare]:
    """From the mean lengths of the records that were looked at: packs are taken to be full, no record to be longer than one, weights
    to stay as they are in the mean, and nothing is resampled."""
    by_name, shares = {report.name: report for report in reports}, []
    for stage, section in config.stages.items():
        if not all(name in by_name and by_name[name].lengths for name in section.sources):
            continue
        mixture = mixture_of(section, {name: by_name[name].records for name in section.sources}).shares()
        # Tokens of a sample that is drawn, be it bad: the mixture is of those.
        means = {name: sum(by_name[name].lengths) / by_name[name].looked_at for name in mixture}
        total = section.steps * config.packs_of(stage) * section.sequence_length
        ends = {name: epochs * by_name[name].records for name, epochs in section.epochs.items()}
        drawn = _drawn(total, mixture, means, ends)
        enough = sum(drawn[name] * means[name] for name in mixture) / total
        for name in mixture:
            share, epochs = drawn[name] / sum(drawn.values()), drawn[name] / by_name[name].records
            shares.append(
                StageShare(stage, name, share, drawn[name] * means[name], epochs, section.epochs.get(name), min(1.0, enough))
            )
    return shares


def _drawn(total: float, mixture: Mapping[str, float], means: Mapping[str, float], ends: Mapping[str, float]) -> dict[str, float]:
    """Samples of each source until there are so many tokens, or all are used up; one that is leaves its weight to the others."""
    drawn, left = dict.fromkeys(mixture, 0.0), dict(mixture)
    while left and total > 1e-9:
        share = {name: weight / sum(left.values()) for name, weight in left.items()}
        tokens = sum(share[name] * means[name] for name in left)
        until_end = {name: (ends[name] - drawn[name]) / share[name] for name in left if name in ends}
        samples = min([total / tokens, *until_end.values()])
        for name in share:
            drawn[name] += samples * share[name]
            if until_end.get(name) == samples:
                del left[name]
        total -= samples * tokens
    return drawn


def print_reports(console: Console, reports: Sequence[SourceReport], encoder: ChatEncoder) -> None:
    table = Table(title="Sources")
    for column in ("source", "records", "looked at", "bad", "tokens", *(f"{q:.0%}" for q in QUANTILES), "learned", "images' tiles"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for report in reports:
        lengths, tiles = np.array(report.lengths), Counter(report.tiles)
        quantiles = [f"{int(np.quantile(lengths, q, method='inverted_cdf')):,}" if len(lengths) else "" for q in QUANTILES]
        learned = f"{sum(report.targets) / max(1, lengths.sum()):.0%}"
        histogram = ", ".join(f"{count} x {tiles_}" for tiles_, count in sorted(tiles.items()))
        counts = (report.records, report.looked_at, sum(report.bad.values()), lengths.sum())
        of_images = histogram if len(tiles) <= 4 else f"{min(tiles)} to {max(tiles)}, mean {np.mean(report.tiles):.1f}"
        table.add_row(report.name, *(f"{count:,}" for count in counts), *quantiles, learned, of_images)
    table.caption = "tokens: of the records looked at, in think mode; then the lengths that such a share of them does not exceed"
    print_table(console, table)
    for report in reports:
        for cause, count in report.bad.most_common():
            example = report.examples[cause]
            console.print(
                f"bad in {report.name}: {count} x {cause}; record {example.record}: {example.detail}", soft_wrap=True, markup=False
            )
        for document in report.shown:
            text = _readable(document, encoder)
            console.print(
                f"\n{report.name}, record {document.record}: {len(document)} tokens, {len(document.tiles)} tiles", markup=False
            )
            console.print(textwrap.indent(text, "  "), soft_wrap=True, markup=False)


def print_shares(console: Console, shares: Sequence[StageShare]) -> None:
    table = Table(title="What each stage takes")
    for column in ("stage", "source", "samples", "tokens", "epochs", "at most"):
        table.add_column(column, justify="left" if column in ("stage", "source") else "right")
    for share in shares:
        most = "" if share.most is None else f"{share.most:g}"
        table.add_row(share.stage, share.source, f"{share.share:.1%}", f"{share.tokens:,.0f}", f"{share.epochs:.2f}", most)
    print_table(console, table)
    for stage, enough in {share.stage: share.enough for share in shares}.items():
        if enough < 1 - 1e-6:
            console.print(f"stage {stage}: its epochs allow about {enough:.0%} of its steps; lower its steps, or raise its epochs")


def _readable(document: Document, encoder: ChatEncoder) -> str:
    """The text of a document as the model sees it, an image as one word."""
    words, at, tokens = list[str](), 0, document.tokens.tolist()
    for low, end in document.spans:
        words += [encoder.decode(tokens[at:low]), f"<|image|> x {end - low} "]
        at = end
    return "".join([*words, encoder.decode(tokens[at:])])


def contact_sheet(reports: Sequence[SourceReport], encoder: ChatEncoder, path: Path) -> int:
    """The tiles of the records shown, a row or more for each record, as a PNG. Returns how many tiles there are; none, and no file."""
    shown = [(report, document) for report in reports for document in report.shown if len(document.tiles)]
    if not shown:
        return 0
    side = max(48, shown[0][1].tiles.shape[-1] // 4)
    columns = (SHEET_WIDTH - GAP) // (side + GAP)
    rows = [-(-len(document.tiles) // columns) for _, document in shown]
    sheet = PIL_Image.new("RGB", (SHEET_WIDTH, sum(20 + (side + GAP) * n for n in rows) + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for report, document in shown:
        text = " ".join(_readable(document, encoder).split())[:LINE]
        draw.text((GAP, top), f"{report.name} {document.record}: {text}".encode("ascii", "replace").decode(), fill="black")
        top += 20
        for number, tile in enumerate(document.tiles):
            picture = PIL_Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).resize((side, side), PIL_Image.Resampling.BOX)
            sheet.paste(picture, (GAP + number % columns * (side + GAP), top + number // columns * (side + GAP)))
        top += -(-len(document.tiles) // columns) * (side + GAP)
    sheet.save(path, "PNG")
    return sum(len(document.tiles) for _, document in shown)
