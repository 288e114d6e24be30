"""Steps that remove duplicates: exact ones, near ones of text, near ones of images. The first of them stays."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from ..chat import PLACEHOLDER
from ..images import ImageLimits
from ..records import Record
from .config import ExactDuplicates, NearImages, NearText
from .libraries import library
from .pictures import HASH_BYTES, NearHashes, images_digest, perceptual_hash
from .steps import Removed, SourceStep
from .text import DIGEST_BYTES, digest, encoded, ngrams, normalise, part_text, words

_SCHEME, _SEED = "affine32", 1


def exact_duplicates(name: str, settings: ExactDuplicates, limits: ImageLimits) -> SourceStep:
    def signature(record: Record) -> bytes:
        if settings.part == "record":
            texts = [text for message in record.messages for text in message]
        else:
            texts = [part_text(record, settings.part)]
        pictures = [images_digest(record, limits)] if settings.images else []
        return digest(*(encoded(normalise(text.replace(PLACEHOLDER, f" {PLACEHOLDER} "))) for text in texts), *pictures)

    def decide(signatures: Iterable[tuple[int, bytes]]) -> dict[int, Removed]:
        first: dict[bytes, int] = {}
        return {
            number: Removed("exact duplicate", like=kept)
            for number, value in signatures
            if (kept := first.setdefault(value, number)) != number
        }

    return SourceStep(name, signature, decide)


def near_text(name: str, settings: NearText, limits: ImageLimits) -> SourceStep:
    """MinHash (Broder 1997) with locality-sensitive hashing: a record goes when its estimated similarity to one that stays is at least
    the threshold. Of pairs that are just similar enough, hashing by bands misses some."""
    datasketch = library("datasketch")
    empty = datasketch.MinHash(settings.permutations, _SEED, scheme=_SCHEME)

    def signature(record: Record) -> bytes:
        # With the digest of the images in each n-gram, records with other images have none in common.
        prefix = images_digest(record, limits) if settings.images else b""
        grams = {prefix + encoded(" ".join(gram)) for gram in ngrams(words(part_text(record, settings.part)), settings.ngram)}
        if not grams:
            return b""
        sketch = empty.copy()
        sketch.update_batch(grams)
        return np.asarray(sketch.hashvalues, np.uint32).tobytes()

    def decide(signatures: Iterable[tuple[int, bytes]]) -> dict[int, Removed]:
        # Candidates are compared, so that too many cost time alone, and too few would be missed.
        index = datasketch.MinHashLSH(settings.threshold, settings.permutations, weights=(0.1, 0.9))
        kept: dict[int, np.ndarray] = {}
        removed: dict[int, Removed] = {}
        for number, value in signatures:
            if not value:
                continue
            sketch = datasketch.LeanMinHash(seed=_SEED, hashvalues=np.frombuffer(value, np.uint32), scheme=_SCHEME)
            near = {other: float(np.mean(kept[other] == sketch.hashvalues)) for other in index.query(sketch)}
            first = min((other for other, similarity in near.items() if similarity >= settings.threshold), default=None)
            if first is None:
                index.insert(number, sketch)
                kept[number] = sketch.hashvalues
            else:
                removed[number] = Removed("near duplicate", f"similarity {near[first]:.2f}", first)
        return removed

    return SourceStep(name, signature, decide)


def near_images(name: str, settings: NearImages, limits: ImageLimits) -> SourceStep:
    """A record without images stays."""
    library("imagehash")  # found missing now, not at the first image

    def signature(record: Record) -> bytes:
        if not record.images:
            return b""
        group = digest(encoded(normalise(part_text(record, "record")))) if settings.text else bytes(DIGEST_BYTES)
        hashes = [perceptual_hash(image, limits) for image in record.images]
        return group + struct.pack(f"<{len(hashes)}Q", *hashes)

    def decide(signatures: Iterable[tuple[int, bytes]]) -> dict[int, Removed]:
        index = NearHashes(settings.distance)
        removed: dict[int, Removed] = {}
        for number, value in signatures:
            if not value:
                continue
            group, packed = value[:DIGEST_BYTES], value[DIGEST_BYTES:]
            hashes = struct.unpack(f"<{len(packed) // HASH_BYTES}Q", packed)
            if (first := index.find(hashes, group)) is None:
                index.add(hashes, number, group)
            else:
                removed[number] = Removed("near-duplicate images", like=first)
        return removed

    return SourceStep(name, signature, decide)
