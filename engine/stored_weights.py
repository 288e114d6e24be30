"""The weights of a checkpoint, whatever layout of processes wrote it, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from smalt.model import ModelConfig, build_model
from smalt.parallel.compat import OFFSETS_KEY, PIECES_KEY

from .checkpoints import Checkpoint
from .errors import UserError
from .tensor_files import SUFFIX

_PREFIX = "model."


class StoredWeights:
    """The weights in the open shards of a checkpoint; each is put together when it is asked for."""

    def __init__(self, shards: list[Any]):
        self.pieces: dict[str, list[_Piece]] = {}
        for file in shards:
            offsets = json.loads(file.metadata()[PIECES_KEY])
            for key in (key for key in file.keys() if key.startswith(_PREFIX)):  # noqa: SIM118 - not a dict
                piece = _Piece(file, tuple(offsets[key][OFFSETS_KEY]), tuple(file.get_slice(key).get_shape()))
                self.pieces.setdefault(key.removeprefix(_PREFIX), []).append(piece)

    def tensor(self, name: str) -> Tensor:
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for piece in self.pieces[name]:
            whole[piece.place] = piece.file.get_tensor(_PREFIX + name)
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        ends = [[part.stop for part in piece.place] for piece in self.pieces[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def dtype(self, name: str) -> torch.dtype:
        piece = self.pieces[name][0]
        return piece.file.get_slice(_PREFIX + name)[tuple(slice(0, 0) for _ in piece.shape)].dtype

    def is_complete(self, name: str) -> bool:
        return sum(math.prod(piece.shape) for piece in self.pieces[name]) == math.prod(self.shape(name))


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor in an open shard. offsets: where in the whole it begins."""

    file: Any
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(low, low + size) for low, size in zip(self.offsets, self.shape, strict=True))


@contextmanager
def open_weights(checkpoint: Checkpoint) -> Iterator[StoredWeights]:
    """The weights of a checkpoint, its files open as long as the context. Raises UserError with every way in which they are not those
    of its model."""
    with ExitStack() as opened:
        paths = sorted(checkpoint.path.glob(f"*{SUFFIX}"))
        weights = StoredWeights([opened.enter_context(safe_open(path, framework="pt")) for path in paths])
        _check(weights, ModelConfig.model_validate(checkpoint.state["model"]), checkpoint)
        yield weights


def _check(weights: StoredWeights, config: ModelConfig, checkpoint: Checkpoint) -> None:
    shapes = {name: tuple(p.shape) for name, p in build_model(config, 0, "meta").named_parameters()}
    wrong = [f"missing: {name}" for name in shapes if name not in weights.pieces]
    wrong += [f"unexpected: {name}" for name in weights.pieces if name not in shapes]
    for name in (name for name in shapes if name in weights.pieces):
        if (found := weights.shape(name)) != shapes[name]:
            wrong.append(f"of another shape: {name} is {list(found)} in the checkpoint, {list(shapes[name])} in the model")
        elif not weights.is_complete(name):
            wrong.append(f"incomplete: {name}")
    if wrong:
        raise UserError("\n  ".join([f"checkpoint {checkpoint.path} does not hold the weights of its model:", *wrong]))
