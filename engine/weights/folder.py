"""The safetensors files of a Hugging Face folder, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smalt.parallel.layout import Bounds

from ..errors import UserError

ONE_FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class WeightFolder:
    """An open folder. files: the open file that holds a tensor, by its name. Of the files the headers alone are in memory."""

    path: Path
    files: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def stored_as(self, name: str) -> str:
        """The dtype of a tensor, as safetensors spells it."""
        return self.files[name].get_slice(name).get_dtype()

    def is_readable(self, name: str) -> bool:
        """Whether a tensor is one of plain floating-point numbers."""
        return self.stored_as(name) in _DTYPES

    def read(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a tensor within bounds, in its own dtype, on the CPU. Raises UserError where the disk fails."""
        sizes = [stop - start for start, stop in bounds]
        if 0 in sizes:
            return torch.empty(sizes, dtype=_DTYPES[self.stored_as(name)])
        try:
            return self.files[name].get_slice(name)[tuple(slice(start, stop) for start, stop in bounds)]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}") from error


@contextmanager
def open_folder(path: Path) -> Iterator[WeightFolder]:
    """Open every file of a folder. Raises UserError for a folder without safetensors files, for one that lacks a file or has a damaged
    one, and where a tensor is in two files, or in another one than the index says."""
    with ExitStack() as opened:
        files: dict[str, Any] = {}
        where: dict[str, str] = {}
        names, index = _file_names(path)
        for name in names:
            try:
                file = opened.enter_context(safe_open(path / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path / name} cannot be read: {error}; get the file again") from error
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in where:
                    raise UserError(f"{path}: {key} is both in {where[key]} and in {name}; save the model again with save_pretrained")
                if index.get(key, name) != name:
                    raise UserError(f"{path}: {key} is in {name}, not in {index[key]} as {INDEX} says; get the files again")
                files[key], where[key] = file, name
        yield WeightFolder(path, files)


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON in a file. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a Hugging Face folder has {CONFIG} and safetensors files") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def _file_names(path: Path) -> tuple[list[str], dict[str, str]]:
    """The files of a folder, those of its index or the one, and in which the index says that each tensor is."""
    if not (path / INDEX).exists():
        if not (path / ONE_FILE).exists():
            raise UserError(f"{path} has neither {ONE_FILE} nor {INDEX}; save the model again with save_pretrained, as safetensors")
        return [ONE_FILE], {}
    where = read_json(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{path / INDEX} has no weight_map of names of files")
    names = sorted(set(where.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path / INDEX} names files outside of its folder: {', '.join(outside)}")
    return names, where
