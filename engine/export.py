"""A checkpoint's weights as Hugging Face style safetensors files, whatever layout of processes wrote it.

Names are those that transformers gives, of the whole model those of weights/remote/modeling_smalt.py; in Smalt's own form they are
those of ``named_parameters``. A tied head is the embedding and is written once, under that name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smalt.model import ModelConfig

from .checkpoints import Checkpoint, checkpoint_of_step, latest_checkpoint
from .errors import UserError
from .lineage import check_tokenizer
from .run_folder import CHECKPOINTS, CONFIG, read_config
from .stored_weights import StoredWeights, open_weights
from .tensor_files import SUFFIX, Layout, num_bytes, sync_folder, write_file, write_tensors
from .weights.beside import TOKENIZER, files_beside
from .weights.folder import INDEX
from .weights.load import PREFIXES, Part, Twin, transformers_layout, whole_layout

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PARTIAL = ".partial"
Form = Literal["transformers", "smalt"]


@dataclass(frozen=True)
class Exported:
    """What was written. size: bytes of the tensors."""

    checkpoint: Checkpoint
    files: tuple[str, ...]
    num_tensors: int
    size: int


def export_run(
    run: Path,
    out: Path,
    step: int | None = None,
    dtype: str | None = None,
    shard_size: float = 5.0,
    part: Part | None = None,
    form: Form = "transformers",
) -> Exported:
    """Write the weights of a run's checkpoint to the new folder ``out``, with what is needed to load them beside them.

    step: of the checkpoint, the newest whole one when None; dtype: "bfloat16", "float32", or as in the checkpoint when None;
    shard_size: gigabytes (1e9 bytes) that a file holds at most, unless one tensor alone is larger; part: the one that is written, the
    whole model when None; form: "transformers", as a folder that it loads, or "smalt", the whole model under Smalt's own names, with
    its config and tokenizer. One tensor is in memory at a time.
    ``out`` appears when all of it is on disk. Raises UserError for an ``out`` that holds something, for a checkpoint that is not there
    or is damaged, for a tokenizer that is not the one of its training, with a list for tensors that are missing, unexpected or of
    another shape, and for a disk that cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another folder with --out")
    if part and form == "smalt":
        raise UserError(f"the {part} part alone is written for transformers; leave out --part, or --format smalt")
    if not shard_size > 0:
        raise UserError(f"a file cannot hold {shard_size} GB; choose a --shard-size above 0")
    source = read_source(run, step)
    checkpoint, config, tokenizer = source.checkpoint, source.config, source.tokenizer
    partial = out.with_name(out.name + PARTIAL)
    with open_weights(checkpoint) as weights:
        twins = _twins(config, part, form, weights)
        layout = {name: (DTYPES[dtype] if dtype else weights.dtype(twin.own), twin.shape) for name, twin in twins.items()}
        beside = {CONFIG: config.model_dump_json(indent=1).encode(), TOKENIZER: tokenizer}
        if form == "transformers":
            (kind,) = {str(kind).removeprefix("torch.") for kind, _ in layout.values()}
            beside = files_beside(config, part, tokenizer, source.longest, kind)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            index = _write_weights(partial, weights, twins, layout, int(shard_size * 1e9))
            write_file(partial / INDEX, [json.dumps(index, indent=2).encode()])
            for name, content in beside.items():
                write_file(partial / name, [content])
            sync_folder(partial)
            partial.rename(out)
            sync_folder(out.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{out} cannot be written: {error}") from error
    files = tuple(sorted(set(index["weight_map"].values())))
    return Exported(checkpoint, files, len(layout), index["metadata"]["total_size"])


@dataclass(frozen=True)
class Source:
    """name: of the run; config: of the checkpoint's model; tokenizer: contents of its tokenizer.json; longest: tokens that it was
    trained on at once."""

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: bytes
    longest: int


def read_source(run: Path, step: int | None) -> Source:
    """What is exported of a run: the checkpoint of a step, the newest whole one when None. Raises UserError where there is none, or it
    is damaged, or the tokenizer is not the one of its training."""
    config = read_config(run)
    tokenizer = _read_tokenizer(run, config.data.tokenizer)
    checkpoints = run / CHECKPOINTS
    checkpoint = latest_checkpoint(checkpoints, set_aside=False) if step is None else checkpoint_of_step(checkpoints, step)
    check_tokenizer(str(run), checkpoint, config)
    longest = max(stage.sequence_length for stage in config.stages.values())
    return Source(config.name, checkpoint, ModelConfig.model_validate(checkpoint.state["model"]), tokenizer, longest)


def _read_tokenizer(run: Path, path: Path) -> bytes:
    """The contents of a run's tokenizer.json. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the tokenizer of {run} cannot be read: {error}; put it back, or set data.tokenizer in {run / CONFIG}"
        ) from error


def _twins(config: ModelConfig, part: Part | None, form: Form, weights: StoredWeights) -> dict[str, Twin]:
    """The tensors that are written, by the names that they get."""
    if form == "smalt":
        return {name: Twin(name, weights.shape(name)) for name in weights.pieces}
    return transformers_layout(config, part, PREFIXES[part]) if part else whole_layout(config)


def _write_weights(
    folder: Path, weights: StoredWeights, twins: Mapping[str, Twin], layout: Mapping[str, Layout], limit: int
) -> dict[str, Any]:
    """Write the files; returns the index that says where each tensor is."""
    groups, where = _split(layout, limit), {}

    def tensor(name: str) -> Tensor:
        return weights.tensor(twins[name].own).to(layout[name][0]).view(twins[name].shape)

    for number, names in enumerate(groups, 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}{SUFFIX}"
        write_tensors(path, {name: layout[name] for name in names}, tensor, {"format": "pt"})
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
