"""The packed batch: every document of a microbatch in one row of fixed length, and one interval of keys for each token."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalt.kernels import IGNORE


@dataclass(frozen=True)
class Document:
    """One sample, ready for the model; numpy, because it is made in worker threads.

    tokens: int64 [L]; targets: bool [L], whether token i is to be predicted (from token i - 1); image_index: int64 [V], the rows
    that vision embeddings replace, in order; tiles: [N, 3, S, S], uint8 or as the vision tower sees them (see_as); spans: int64
    [M, 2], start and end row of each image;
    source, record: where the sample came from.
    """

    tokens: np.ndarray
    targets: np.ndarray
    image_index: np.ndarray
    tiles: np.ndarray
    spans: np.ndarray
    source: str = ""
    record: int = -1

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PackedBatch:
    """A pack of T tokens with N tiles and V vision tokens; everything in the order of the pack.

    Row t attends to keys ``kv_start[t] <= k < kv_end[t]``; both bounds are non-decreasing. The tail that no document fills has
    kv_start = kv_end = T and label IGNORE.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int32 [T], position in the document
    kv_start: Tensor  # int32 [T]
    kv_end: Tensor  # int32 [T]
    labels: Tensor  # int64 [T], the next token or IGNORE
    loss_weight: Tensor  # float32 [T]
    image_index: Tensor  # int64 [V], rows of tokens
    tiles: Tensor  # [N, 3, S, S], uint8 as they were decoded (see_as), or float in [-1, 1]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """The batch on a device, its tiles as a model of that dtype sees them."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        if dtype is not None:
            moved["tiles"] = see_as(moved["tiles"], dtype)
        return PackedBatch(**moved)


def see_as(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles as the vision tower sees them. Decoded ones stay uint8 until they are where they are used, a quarter of the bytes; they
    become [-1, 1], SigLIP's normalisation."""
    return tiles.to(dtype) / 127.5 - 1.0 if tiles.dtype == torch.uint8 else tiles.to(dtype)


def intervals(length: int, spans: np.ndarray, image_attention: Literal["bidirectional", "causal"]) -> tuple[np.ndarray, np.ndarray]:
    """kv_start and kv_end, int32 [length], of one document: causal, and within an image span bidirectional if so asked."""
    start = np.zeros(length, np.int32)
    end = np.arange(1, length + 1, dtype=np.int32)
    if image_attention == "bidirectional":
        for low, high in spans:
            end[low:high] = high
    return start, end


def pack(
    documents: list[Document],
    length: int,
    image_attention: Literal["bidirectional", "causal"] = "bidirectional",
    tile: int | None = None,
) -> PackedBatch:
    """Lay documents end to end in a pack of ``length`` tokens.

    ``tile``: side of a tile in pixels, needed where no document has an image. Raises ValueError if they do not fit.
    """
    total = sum(map(len, documents))
    if total > length:
        raise ValueError(f"{len(documents)} documents hold {total} tokens, the pack only {length}")
    tokens = np.zeros(length, np.int64)
    positions = np.zeros(length, np.int32)
    kv_start = np.full(length, length, np.int32)
    kv_end = np.full(length, length, np.int32)
    labels = np.full(length, IGNORE, np.int64)
    image_index, at = [np.zeros(0, np.int64)], 0
    for document in documents:
        n = len(document)
        rows = slice(at, at + n)
        tokens[rows] = document.tokens
        positions[rows] = np.arange(n)
        start, end = intervals(n, document.spans, image_attention)
        kv_start[rows], kv_end[rows] = start + at, end + at
        labels[rows][:-1] = np.where(document.targets[1:], document.tokens[1:], IGNORE)
        image_index.append(document.image_index + at)
        at += n
    tiles = [d.tiles for d in documents if len(d.tiles)]
    side = tiles[0].shape[-1] if tiles else (tile or 0)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        kv_start=torch.from_numpy(kv_start),
        kv_end=torch.from_numpy(kv_end),
        labels=torch.from_numpy(labels),
        loss_weight=torch.from_numpy((labels != IGNORE).astype(np.float32)),
        image_index=torch.from_numpy(np.concatenate(image_index)),
        tiles=torch.from_numpy(np.concatenate(tiles)) if tiles else torch.zeros(0, 3, side, side, dtype=torch.uint8),
    )
