"""The order of training: sample i of a stage's stream is a pure function of (seed, i, log of changes), on any layout, after any
restart."""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from smalt.model import Document

from .chat import Mode
from .reading import Draw, Reader

# grain imports JAX where it finds it and warns where it does not; neither matters here.
logging.getLogger("absl").setLevel(logging.ERROR)
import grain  # noqa: E402

# Share of the cuts that leave nothing of a thought; the others leave a uniform share of it. A cut anywhere in a long thought
# hardly ever falls before its first token, and budget 0 then stayed behind answer mode.
CUT_TO_NOTHING = 0.1


@dataclass(frozen=True)
class Presentation:
    """How records with a thought are shown. think: share in think mode; truncate: share of those whose thought is cut at random."""

    think: float
    truncate: float


@dataclass(frozen=True)
class Mix:
    """What the stream is mixed by. weights: whole numbers, none of them 0; ends: where in its own order a source is used up, of those
    that have an end; thinned: records that are shown less often, as :func:`as_bits`; kept: share of the epochs in which they are."""

    weights: dict[str, int]
    ends: dict[str, int] = field(default_factory=dict)
    thinned: dict[str, str] = field(default_factory=dict)
    kept: float = 1.0


@dataclass(frozen=True)
class Change:
    """An entry of the log: what holds from sample ``first`` on. places: where each source goes on in its own order."""

    first: int
    places: dict[str, int]
    mix: Mix


class UsedUp(IndexError):
    """Every source of the mix was shown as often as it may be."""


class SampleStream:
    """A random-access stream of Draw, endless where a source is. Sources are mixed by weight; each goes through its records in a new
    order every epoch, and where the mix changes it goes on where it was. A source that is used up leaves its weight to the others.

    sizes: records of each source, whose order follows from the seed and its name; log: what :meth:`log` gave.
    """

    def __init__(self, sizes: Mapping[str, int], presentation: Presentation, seed: int, log: Sequence[Any] = ()):
        self.sizes, self.seed = sizes, seed
        self.orders: dict[str, grain.MapDataset] = {}
        for name, size in sizes.items():
            # grain counts epochs up from the seed: neighbouring seeds would give one source the orders of another.
            order = grain.MapDataset.range(size).shuffle(seed=seed_of(seed, name, "order") % 2**32).repeat()
            self.orders[name] = order.random_map(_Present(name, presentation), seed=seed_of(seed, name, "draw") % 2**32)
        self.segments = [_Segment(self, Change(entry["first"], entry["places"], Mix(**entry["mix"]))) for entry in log]

    def __getitem__(self, sample: int) -> Draw:
        """Raises UsedUp where there is no such sample."""
        number = bisect.bisect_right(self.segments, sample, key=lambda segment: segment.change.first)
        if not number:
            raise IndexError(f"sample {sample} is before the first entry of the log")
        return self.segments[number - 1][sample]

    def available(self, samples: Sequence[int]) -> Sequence[int]:
        """Those of the samples, in rising order, that there are before every source is used up."""

        def is_beyond(sample: int) -> bool:
            try:
                self[sample]
            except UsedUp:
                return True
            return False

        if not samples or not is_beyond(samples[-1]):
            return samples
        return samples[: bisect.bisect_left(samples, True, key=is_beyond)]

    def change(self, first: int, mix: Mix) -> None:
        """Mix differently from sample ``first`` on, which is not before that of the last change."""
        if not self.segments:
            self.segments = [_Segment(self, Change(0, dict.fromkeys(self.sizes, 0), mix))]
        last = self.segments[-1]
        if mix != last.change.mix:
            self.segments.append(_Segment(self, Change(first, last.places(first), mix)))

    def forget(self, sample: int) -> None:
        """Samples before ``sample`` are not asked for again."""
        while len(self.segments) > 1 and self.segments[1].change.first <= sample:
            del self.segments[0]

    def log(self) -> list[dict[str, Any]]:
        """For JSON: from this a stream goes on with the same samples."""
        return [asdict(segment.change) for segment in self.segments]


class _Segment:
    """The samples from one change to the next."""

    def __init__(self, stream: SampleStream, change: Change):
        self.stream, self.change = stream, change
        self.weights = {
            name: weight
            for name, weight in change.mix.weights.items()
            if name not in change.mix.ends or change.places[name] < change.mix.ends[name]
        }
        self.thinned = {name: from_bits(bits, stream.sizes[name]) for name, bits in change.mix.thinned.items()}
        self.shown: dict[str, list[int]] = {name: [] for name in self.thinned}
        # From the sample on at which a source is used up, as soon as one beyond it is asked for.
        self.after: _Segment | None = None

    def __getitem__(self, sample: int) -> Draw:
        segment = self._of(sample)
        if not segment.weights:
            raise UsedUp(f"sample {sample} is beyond the end of every source")
        name, number = pick(sample - segment.change.first, segment.weights)
        return self.stream.orders[name][segment._place(name, number)]

    def places(self, sample: int) -> dict[str, int]:
        """Where each source stands before ``sample``."""
        segment = self._of(sample - 1) if sample > self.change.first else self
        return segment._places(sample)

    def _of(self, sample: int) -> _Segment:
        """This segment, or what is left of it after a source was used up, whichever ``sample`` is in."""
        if self.after is None and self.weights and self._is_beyond(sample):
            first = bisect.bisect_left(range(sample + 1), True, lo=self.change.first, key=self._is_beyond)
            used_up, _ = pick(first - self.change.first, self.weights)
            places = {**self._places(first), used_up: self.change.mix.ends[used_up]}
            self.after = _Segment(self.stream, replace(self.change, first=first, places=places))
        if self.after is None or sample < self.after.change.first:
            return self
        return self.after._of(sample)

    def _is_beyond(self, sample: int) -> bool:
        """Whether a source would go beyond its end in the samples up to ``sample``."""
        drawn = counts(sample + 1 - self.change.first, self.weights)
        ends = self.change.mix.ends
        return any(drawn[name] and self._place(name, drawn[name] - 1) >= ends[name] for name in self.weights if name in ends)

    def _places(self, sample: int) -> dict[str, int]:
        drawn = counts(sample - self.change.first, self.weights) if self.weights else {}
        return {
            name: self._place(name, drawn[name] - 1) + 1 if drawn.get(name) else place for name, place in self.change.places.items()
        }

    def _place(self, name: str, number: int) -> int:
        """Where in its own order a source has the ``number``-th record that it shows here."""
        first = self.change.places[name]
        if name not in self.thinned:
            return first + number
        shown = self.shown[name]
        while len(shown) <= number:
            place = shown[-1] + 1 if shown else first
            while self._left_out(name, place):
                place += 1
            shown.append(place)
        return shown[number]

    def _left_out(self, name: str, place: int) -> bool:
        record, epoch = self.stream.orders[name][place].record, place // self.stream.sizes[name]
        if not self.thinned[name][record]:
            return False
        return seed_of(self.stream.seed, name, epoch, record) >= self.change.mix.kept * 2**64


def seed_of(*of: object) -> int:
    """A number below 2**64 that follows from numbers and names, and is near that of no others."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, of)).encode(), digest_size=8).digest(), "big")


def counts(samples: int, weights: Mapping[str, int]) -> dict[str, int]:
    """How many of the first ``samples`` are of each source: exactly in proportion to the weights after every multiple of their sum,
    and within one of it for two sources at any sample. One more sample is one more of exactly one source."""
    found, total = {}, sum(weights.values())
    for name, weight in weights.items():
        found[name] = -(-samples * weight // total)
        samples, total = samples - found[name], total - weight
    return found


def pick(sample: int, weights: Mapping[str, int]) -> tuple[str, int]:
    """The source of a sample, and how many samples of that source come before it."""
    before, after = counts(sample, weights), counts(sample + 1, weights)
    return next((name, before[name]) for name in weights if after[name] > before[name])


def as_bits(chosen: np.ndarray) -> str:
    """Records of a source, bool by number, as text: the log and checkpoints are JSON."""
    return base64.b64encode(zlib.compress(np.packbits(chosen).tobytes())).decode()


def from_bits(bits: str, size: int) -> np.ndarray:
    """What :func:`as_bits` was given, of ``size`` records."""
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8), count=size).astype(bool)


def stream_documents(stream: SampleStream, reader: Reader, count: int) -> list[Document]:
    """The first ``count`` usable documents of a stream."""
    read = (reader.read(stream[i]) for i in range(2**62))
    return list(itertools.islice((found for found in read if isinstance(found, Document)), count))


class _Present(grain.transforms.RandomMap):
    """Record number to Draw; what is drawn at random comes from the generator that grain keys by the sample's index."""

    def __init__(self, source: str, presentation: Presentation):
        self.source, self.presentation = source, presentation

    def random_map(self, element: int, rng: np.random.Generator) -> Draw:
        think, truncate, cut = rng.random(3)
        mode: Mode = "think" if think < self.presentation.think else "answer"
        keep = max(0.0, (float(cut) - CUT_TO_NOTHING) / (1 - CUT_TO_NOTHING)) if truncate < self.presentation.truncate else None
        return Draw(self.source, int(element), mode, keep)
