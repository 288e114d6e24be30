"""A checkpoint's weights as Hugging Face style safetensors files, whatever layout of processes wrote it.

The names are Smalt's own: those of ``named_parameters``. A tied head is the embedding and is written once, under that name.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from smalt.model import ModelConfig, build_model
from smalt.parallel.compat import OFFSETS_KEY, PIECES_KEY

from .checkpoints import Checkpoint, checkpoint_of_step, latest_checkpoint
from .errors import UserError
from .run_folder import CHECKPOINTS, CONFIG, read_config
from .tensor_files import SUFFIX, Layout, num_bytes, sync_folder, write_file, write_tensors

INDEX, TOKENIZER = f"model{SUFFIX}.index.json", "tokenizer.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PREFIX, _PARTIAL = "model.", ".partial"


@dataclass(frozen=True)
class Exported:
    """What was written. size: bytes of the tensors."""

    checkpoint: Checkpoint
    files: tuple[str, ...]
    num_tensors: int
    size: int


def export_run(run: Path, out: Path, step: int | None = None, dtype: str | None = None, shard_size: float = 5.0) -> Exported:
    """Write the weights of a run's checkpoint to the new folder ``out``, with config.json and tokenizer.json beside them.

    step: of the checkpoint, the newest whole one when None; dtype: "bfloat16", "float32", or as in the checkpoint when None;
    shard_size: gigabytes (1e9 bytes) that a file holds at most, unless one tensor alone is larger. One tensor is in memory at a time.
    ``out`` appears when all of it is on disk. Raises UserError for an ``out`` that holds something, for a checkpoint that is not there
    or is damaged, with a list for tensors that are missing, unexpected or of another shape, and for a disk that cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another folder with --out")
    if not shard_size > 0:
        raise UserError(f"a file cannot hold {shard_size} GB; choose a --shard-size above 0")
    tokenizer = _read_tokenizer(run)
    checkpoint = latest_checkpoint(run / CHECKPOINTS, set_aside=False) if step is None else checkpoint_of_step(run / CHECKPOINTS, step)
    config = ModelConfig.model_validate(checkpoint.state["model"])
    partial = out.with_name(out.name + _PARTIAL)
    with ExitStack() as opened:
        weights = _Weights([opened.enter_context(safe_open(p, framework="pt")) for p in sorted(checkpoint.path.glob(f"*{SUFFIX}"))])
        _check(weights, config, checkpoint)
        layout = {name: (DTYPES[dtype] if dtype else weights.dtype(name), weights.shape(name)) for name in weights.pieces}
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            index = _write_weights(partial, weights, layout, int(shard_size * 1e9))
            write_file(partial / INDEX, [json.dumps(index, indent=2).encode()])
            write_file(partial / CONFIG, [config.model_dump_json(indent=1).encode()])
            write_file(partial / TOKENIZER, [tokenizer])
            sync_folder(partial)
            partial.rename(out)
            sync_folder(out.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{out} cannot be written: {error}") from error
    files = tuple(sorted(set(index["weight_map"].values())))
    return Exported(checkpoint, files, len(layout), index["metadata"]["total_size"])


def _read_tokenizer(run: Path) -> bytes:
    path = read_config(run).data.tokenizer
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer of {run} cannot be read: {error}; put it back, or set data.tokenizer in {run / CONFIG}"
        ) from error


class _Weights:
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


def _check(weights: _Weights, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise UserError with every way in which the weights are not those of the model."""
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


def _write_weights(folder: Path, weights: _Weights, layout: Mapping[str, Layout], limit: int) -> dict[str, Any]:
    """Write the files; returns the index that says where each tensor is."""
    groups, where = _split(layout, limit), {}
    for number, names in enumerate(groups, 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}{SUFFIX}"
        write_tensors(
            path, {name: layout[name] for name in names}, lambda name: weights.tensor(name).to(layout[name][0]), {"format": "pt"}
        )
        where.update(dict.fromkeys(names, path.name))
    return {"metadata": {"total_size": sum(map(num_bytes, layout.values()))}, "weight_map": where}


def _split(layout: Mapping[str, Layout], limit: int) -> list[list[str]]:
    """The names of each file, in order: as many as fit, and at least one."""
    groups: list[list[str]] = []
    room = 0
    for name, of_it in layout.items():
        if not groups or num_bytes(of_it) > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= num_bytes(of_it)
    return groups
