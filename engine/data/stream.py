"""The order of training: sample i of a stage's stream is a pure function of (seed, stage, i), on any layout, after any restart."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from smalt.model import Document

from ..errors import BadRecord
from .chat import ChatEncoder, Mode
from .records import ParquetRecords

# grain imports JAX where it finds it and warns where it does not; neither matters here.
logging.getLogger("absl").setLevel(logging.ERROR)
import grain  # noqa: E402

# Share of the cuts that leave nothing of a thought; the others leave a uniform share of it. A cut anywhere in a long thought
# hardly ever falls before its first token, and budget 0 then stayed behind answer mode.
CUT_TO_NOTHING = 0.1


@dataclass(frozen=True)
class SampleId:
    """A document of a step. record: its number in its source; position: its index in the stage's stream."""

    source: str
    record: int
    position: int


@dataclass(frozen=True)
class SkippedSample:
    """A record that could not become a document: which, and why."""

    source: str
    record: int
    cause: str
    detail: str


@dataclass(frozen=True)
class Presentation:
    """How records with a thought are shown. think: share in think mode; truncate: share of those whose thought is cut at random."""

    think: float
    truncate: float


def sample_stream(
    sources: Mapping[str, ParquetRecords],
    mixture: Mapping[str, float],
    encoder: ChatEncoder,
    presentation: Presentation,
    seed: int,
) -> grain.MapDataset:
    """An endless random-access stream of Document | SkippedSample, sources mixed by weight, each shuffled anew every epoch."""
    shares = source_shares(mixture)
    parts = []
    for number, name in enumerate(shares):
        encode = _Encode(sources[name], encoder, presentation)
        # grain counts epochs up from the seed: neighbouring seeds would give one source the orders of another.
        order_seed, draw_seed = (int(n) for n in np.random.SeedSequence((seed, number)).generate_state(2))
        order = grain.MapDataset.range(len(sources[name])).shuffle(seed=order_seed).repeat()
        parts.append(order.random_map(encode, seed=draw_seed))
    return grain.MapDataset.mix(parts, list(shares.values()))


def source_shares(mixture: Mapping[str, float]) -> dict[str, float]:
    """The share of each source of positive weight."""
    chosen = {name: weight for name, weight in mixture.items() if weight > 0}
    total = sum(chosen.values())
    return {name: weight / total for name, weight in chosen.items()}


def stream_documents(stream: grain.MapDataset, count: int) -> list[Document]:
    """The first ``count`` usable documents of a stream."""
    usable = (item for item in (stream[i] for i in range(2**62)) if isinstance(item, Document))
    return list(itertools.islice(usable, count))


class _Encode(grain.transforms.RandomMap):
    """Record number to Document; what is drawn at random comes from the generator that grain keys by the sample's index."""

    def __init__(self, records: ParquetRecords, encoder: ChatEncoder, presentation: Presentation):
        self.records, self.encoder, self.presentation = records, encoder, presentation

    def random_map(self, element: int, rng: np.random.Generator) -> Document | SkippedSample:
        think, truncate, cut = rng.random(3)
        mode: Mode = "think" if think < self.presentation.think else "answer"
        keep = max(0.0, (float(cut) - CUT_TO_NOTHING) / (1 - CUT_TO_NOTHING)) if truncate < self.presentation.truncate else None
        try:
            return self.encoder.sample(self.records[int(element)], mode, keep)
        except BadRecord as error:
            return SkippedSample(self.records.name, int(element), error.cause, error.detail)
