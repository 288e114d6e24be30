"""Images of records as the steps compare them: their bytes, and hashes that are near each other where they look alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..images import ImageLimits, decode_grey, image_bytes
from ..records import Image, Record
from .libraries import library
from .text import digest

HASH_BYTES = 8
_BITS = 8 * HASH_BYTES


def images_digest(record: Record, limits: ImageLimits) -> bytes:
    """16 bytes that stand for the bytes of all images of a record. Raises BadRecord."""
    return digest(*(digest(image_bytes(image, limits)) for image in record.images))


# Two steps that ask for the hashes of a record's images decode them once.
@lru_cache(maxsize=32)
def perceptual_hash(image: Image, limits: ImageLimits) -> int:
    """64 bits that images which look alike have nearly in common (pHash: signs of the lowest frequencies). Raises BadRecord."""
    bits = library("imagehash").phash(decode_grey(image, limits)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class NearHashes:
    """Finds hashes that differ in at most ``distance`` bits: of their distance + 1 pieces, two such hashes have one in common."""

    def __init__(self, distance: int):
        self.distance = distance
        edges = [i * _BITS // (distance + 1) for i in range(distance + 2)]
        self._pieces = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
        self._owners: dict[tuple[bytes, int, int], list[tuple[tuple[int, ...], int]]] = {}

    def add(self, hashes: tuple[int, ...], owner: int, group: bytes = b"") -> None:
        """Remember the hashes of the images of ``owner``; it is compared with others of its group alone."""
        for key in self._keys(hashes[0], group):
            self._owners.setdefault(key, []).append((hashes, owner))

    def find(self, hashes: tuple[int, ...], group: bytes = b"") -> int | None:
        """The first owner, by number, with as many images, each near the one at the same place; None where there is none."""
        near = (
            owner for key in self._keys(hashes[0], group) for other, owner in self._owners.get(key, ()) if self._near(hashes, other)
        )
        return min(near, default=None)

    def _near(self, hashes: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return len(hashes) == len(other) and all((a ^ b).bit_count() <= self.distance for a, b in zip(hashes, other, strict=True))

    def _keys(self, value: int, group: bytes) -> Iterator[tuple[bytes, int, int]]:
        for low, mask in self._pieces:
            yield group, low, (value >> low) & mask
