"""Removes records that evaluation sets hold: by n-grams of words (Brown et al. 2020, arXiv 2005.14165, appendix C) and by images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import BadRecord, UserError
from ...evaluation import open_benchmark
from ..images import ImageLimits
from ..records import Record, Records
from ..sources import open_source
from .config import Decontaminate
from .pictures import NearHashes, perceptual_hash
from .text import encoded, ngrams, part_text, words


@dataclass(frozen=True)
class EvaluationIndex:
    """What evaluation sets hold. grams: hashes of their n-grams, sorted, uint64 [G]; images: perceptual hashes, uint64 [I];
    num_records: of all sets; unreadable: those of them that cannot be read, by cause."""

    grams: np.ndarray
    images: np.ndarray
    num_records: int
    unreadable: Mapping[str, int] = field(default_factory=dict)


def open_sets(settings: Decontaminate) -> dict[str, Records]:
    """Evaluation sets by name: any source, or a file of questions as an evaluation reads it. Raises UserError."""
    return {name: open_benchmark(name, path) or open_source(name, path) for name, path in settings.sources.items()}


def evaluation_index(sources: Mapping[str, Records], settings: Decontaminate, limits: ImageLimits) -> EvaluationIndex:
    """Read evaluation sets. A record of them that cannot be read is counted. Raises UserError for a set that holds nothing to compare
    with."""
    grams, hashes = set[int](), set[int]()
    unreadable: Counter[str] = Counter()
    num_records = 0
    for name, source in sources.items():
        own, usable = Counter[str](), 0
        for number in range(len(source)):
            num_records += 1
            try:
                record = source[number]
                grams.update(of_it := _grams(record, settings).tolist())
                pictures = [perceptual_hash(image, limits) for image in record.images] if settings.distance is not None else []
                hashes.update(pictures)
                usable += bool(of_it or pictures)
            except BadRecord as error:
                own[error.cause] += 1
        if not usable:
            cause = ", ".join(f"{count} times {cause!r}" for cause, count in own.most_common(1)) or "they lack what is compared"
            raise UserError(
                f"evaluation set {name!r} ({settings.sources[name]}): none of its {len(source)} records can be compared with: "
                f"{cause}; give a source of docs/data.md, or a file of questions of docs/evaluation.md"
            )
        unreadable += own
    return EvaluationIndex(np.array(sorted(grams), np.uint64), np.array(sorted(hashes), np.uint64), num_records, dict(unreadable))


def decontaminate(settings: Decontaminate, limits: ImageLimits, index: EvaluationIndex) -> Callable[[Record], Record]:
    near = NearHashes(settings.distance or 0)
    for i, value in enumerate(index.images.tolist()):
        near.add((value,), i)

    def apply(record: Record) -> Record:
        share = _share(_grams(record, settings), index.grams)
        in_text = share > 0 and share >= settings.min_share
        if settings.match == "all" and record.images and not in_text:
            return record
        images = record.images if settings.distance is not None else ()
        in_images = any(near.find((perceptual_hash(image, limits),)) is not None for image in images)
        if settings.match == "all" and record.images and not in_images:
            return record
        if in_text or in_images:
            what = [f"{share:.3f} of its n-grams"] * in_text + ["an image"] * in_images
            raise BadRecord("in an evaluation set", " and ".join(what))
        return record

    return apply


def _grams(record: Record, settings: Decontaminate) -> np.ndarray:
    """Hashes of the distinct n-grams of a record, uint64 [G]; a shorter text is one n-gram."""
    if settings.ngram == 0:
        return np.zeros(0, np.uint64)
    spelled = words(part_text(record, settings.part))
    distinct = {" ".join(gram) for gram in ngrams(spelled, settings.ngram)}
    hashed = b"".join(hashlib.blake2b(encoded(gram), digest_size=8).digest() for gram in distinct)
    return np.frombuffer(hashed, "<u8")


def _share(grams: np.ndarray, known: np.ndarray) -> float:
    """Share of the n-grams that are in the sorted array."""
    if not len(grams) or not len(known):
        return 0.0
    places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    return float(np.mean(known[places] == grams))
