"""What a process of a curation does with a chunk of records: examine it in the first pass, make rows of it in the second."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import BadRecord
from ..chat import PLACEHOLDER, num_placeholders
from ..files import is_url
from ..images import ImageLimits, image_bytes
from ..records import Image, Record, Records
from ..sources import CACHED_BYTES, open_sources
from .answers import answers, majority
from .config import CurationConfig
from .decontamination import EvaluationIndex, decontaminate
from .duplicates import exact_duplicates, near_images, near_text
from .filters import clean, images, language, length
from .repetition import repetition
from .steps import RecordStep, Removed, SourceStep, Step

READ, WRITE = "read", "write"
Indices = Mapping[str, EvaluationIndex]
# A chunk: the name of a source and numbers of its records, in order.
Chunk = tuple[str, Sequence[int]]


@dataclass(frozen=True)
class Examined:
    """One record after the first pass. stop: place of the step that removed it, -1 for reading, the number of steps where none did;
    signatures: those of the steps over the source that it reached, in their order; None where the step passes it over."""

    stop: int
    removed: Removed | None
    signatures: tuple[bytes | None, ...]


@dataclass(frozen=True)
class Row:
    """One record of the second pass: its row of the output, with its size in bytes, or why there is none; changed: places of the steps
    that changed it."""

    values: dict[str, Any] | None
    size: int
    removed: Removed | None
    changed: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """The open sources and the steps. It is made anew in each process, and holds no state: every result follows from the record."""

    config: CurationConfig
    sources: dict[str, Records]
    steps: list[Step]

    @classmethod
    def open(cls, config: CurationConfig, indices: Indices) -> Job:
        carried = {column: column for column in config.all_columns}
        named = {name: section.model_dump(exclude_none=True) for name, section in config.columns.items()}
        columns = {name: {**carried, **named.get(name, {})} for name in config.sources}
        sources = open_sources(config.sources, columns, CACHED_BYTES // config.num_processes)
        return cls(config, sources, build_steps(config, indices))

    def examine(self, chunk: Chunk) -> list[Examined]:
        source, numbers = chunk
        return [self._examine(source, number) for number in numbers]

    def rows(self, chunk: Chunk) -> list[Row]:
        source, numbers = chunk
        return [self._row(source, number) for number in numbers]

    def _examine(self, source: str, number: int) -> Examined:
        signatures: list[bytes | None] = []
        place = -1
        try:
            record = self._read(source, number)
            for place, step in enumerate(self.steps):  # noqa: B007 - the place is used where a step raises
                passed_over = step.of_talks and record.messages[0][0] == "text"
                if isinstance(step, SourceStep):
                    signatures.append(None if passed_over else step.signature(record))
                elif not passed_over:
                    record = step.apply(record)
        except BadRecord as error:
            return Examined(place, Removed(error.cause, error.detail), tuple(signatures))
        return Examined(len(self.steps), None, tuple(signatures))

    def _row(self, source: str, number: int) -> Row:
        changed = []
        try:
            record = self._read(source, number)
            for place, step in enumerate(self.steps):
                if isinstance(step, RecordStep) and step.changes and (after := step.apply(record)) != record:
                    changed.append(place)
                    record = after
            pictures = [self._stored(image) for image in record.images]
            size = sum(len(content.encode()) for _, content in record.messages) + sum(len(p["bytes"] or b"") for p in pictures)
        except BadRecord as error:  # the source has changed since the first pass, or only the output needs the image
            return Row(None, 0, Removed(error.cause, error.detail), ())
        values = {
            "messages": [{"role": role, "content": content} for role, content in record.messages],
            "images": pictures,
            "source": source,
            "record": number,
            **{column: dict(record.extra).get(column) for column in self.config.keep_columns},
        }
        return Row(values, size, None, tuple(changed))

    def _read(self, source: str, number: int) -> Record:
        record = self.sources[source][number]
        if (places := num_placeholders(record.messages)) != len(record.images):
            raise BadRecord("placeholder mismatch", f"{places} {PLACEHOLDER} in the messages, {len(record.images)} images")
        return record

    def _stored(self, image: Image) -> dict[str, Any]:
        if self.config.images == "keep" and image.data is None and image.path is not None and image.part is None:
            return {"bytes": None, "path": image.path if is_url(image.path) else str(Path(image.path).resolve())}
        return {"bytes": image_bytes(image, image_limits(self.config)), "path": None}


def image_limits(config: CurationConfig) -> ImageLimits:
    return ImageLimits(config.max_image_bytes, config.max_image_pixels)


def build_steps(config: CurationConfig, indices: Indices) -> list[Step]:
    """The steps of a config. indices: what the evaluation sets of its decontamination steps hold, by the name of the step.

    Raises UserError for a library, a tokenizer or a language that is not there.
    """
    limits = image_limits(config)
    makers: dict[str, Callable[[str, Any], Step]] = {
        "clean": lambda name, _: RecordStep(name, clean, changes=True),
        "exact_duplicates": lambda name, settings: exact_duplicates(name, settings, limits),
        "near_text": lambda name, settings: near_text(name, settings, limits),
        "near_images": lambda name, settings: near_images(name, settings, limits),
        "length": lambda name, settings: RecordStep(name, length(settings)),
        "language": lambda name, settings: RecordStep(name, language(settings)),
        "repetition": lambda name, settings: RecordStep(name, repetition(settings)),
        "images": lambda name, settings: RecordStep(name, images(settings, limits)),
        "answers": lambda name, settings: RecordStep(name, answers(settings)),
        "majority": lambda name, settings: majority(name, settings, limits),
        "decontaminate": lambda name, settings: RecordStep(name, decontaminate(settings, limits, indices[name])),
    }

    def of_talks(settings: Any) -> bool:
        return settings.kind in ("answers", "majority") or getattr(settings, "part", "record") != "record"

    return [replace(makers[settings.kind](name, settings), of_talks=of_talks(settings)) for name, settings in config.steps.items()]


def chunks(numbers: Mapping[str, Iterable[int]], size: int) -> list[Chunk]:
    """The records of each source in chunks of ``size``, in order."""
    cut: list[Chunk] = []
    for source, of_it in numbers.items():
        listed = of_it if isinstance(of_it, range) else list(of_it)
        cut += [(source, listed[low : low + size]) for low in range(0, len(listed), size)]
    return cut
