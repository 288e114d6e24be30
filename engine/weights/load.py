"""A Hugging Face folder's weights as those of a part of the model: every tensor accounted for, and read slice by slice when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smalt.model import ModelConfig, build_model
from smalt.model.init import initial_rows
from smalt.model.transformers_names import HEAD, TRANSFORMERS_HEAD, decoder_name, vision_name
from smalt.parallel.layout import Bounds

from ..errors import UserError
from .folder import CONFIG, WeightFolder, open_folder, read_json
from .settings import is_naflex, language_config, language_differences, vision_config, vision_differences

Part = Literal["language", "vision"]
Values = dict[str, Callable[[Bounds], Tensor]]
PREFIXES: dict[Part, str] = {"language": "model.", "vision": "vision_model."}
# What Smalt has no use for: the pooling head of a tower, the text part of a whole SigLIP, tables that are computed.
IGNORED: dict[Part, tuple[str, ...]] = {
    "language": ("*.rotary_emb.inv_freq",),
    "vision": ("head.*", "vision_model.head.*", "*embeddings.position_ids", "text_model.*", "logit_scale", "logit_bias"),
}
EMBEDDING = "language.embedding.weight"
_ROWS_AT_A_TIME = 1 << 12


@dataclass(frozen=True)
class Twin:
    """A tensor of a folder. own: the name of the parameter that it is; shape: of the tensor, which may have other dims."""

    own: str
    shape: tuple[int, ...]


def transformers_layout(config: ModelConfig, part: Part, prefix: str, naflex: bool = False) -> dict[str, Twin]:
    """The tensors of a folder that holds a part of the model, by their names there. prefix: of all names but the head's."""
    rename, patch = (decoder_name if part == "language" else vision_name), config.vision.patch
    layout = {}
    for own, p in build_model(config, 0, "meta").named_parameters():
        if own.split(".")[0] == part:
            # The patch embedding is a convolution there, whose kernel is a patch; for images of any shape a linear map as here.
            shape = (len(p), 3, patch, patch) if own == "vision.patch_embed.weight" and not naflex else tuple(p.shape)
            layout[TRANSFORMERS_HEAD if own == HEAD else prefix + rename(own)] = Twin(own, shape)
    return layout


def whole_layout(config: ModelConfig) -> dict[str, Twin]:
    """The tensors of a folder that holds the whole model, by their names in remote/modeling_smalt.py."""
    projector = {
        own: Twin(own, tuple(p.shape)) for own, p in build_model(config, 0, "meta").named_parameters() if own.startswith("projector.")
    }
    parts = [transformers_layout(config, "vision", "vision_tower."), transformers_layout(config, "language", "language_model.")]
    return {**parts[0], **projector, **parts[1]}


@contextmanager
def open_weights(folder: Path, part: Part, config: ModelConfig, seed: int) -> Iterator[Values]:
    """By the name of each parameter of a part what gives the share of it within bounds, while the folder is open.

    Rows of the vocabulary beyond the folder's are the mean of its rows plus the initial numbers that seed and place give. Raises
    UserError that lists in what the config differs from the folder's, or every tensor that is missing, unexpected, of another shape
    or of a dtype that is none of floating-point numbers.
    """
    raw = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}"
    config_there = language_config(raw, where) if part == "language" else vision_config(raw, where)
    check_config(folder, part, config, config_there)
    naflex = part == "vision" and is_naflex(raw)
    there = config.model_copy(update={part: _as_stored(config, part, config_there)})
    with open_folder(folder) as files:
        prefix = PREFIXES[part] if any(name.startswith(PREFIXES[part]) for name in files.files) else ""
        layout = transformers_layout(there, part, prefix, naflex)
        check_tensors(files, part, layout, there)
        values = {twin.own: _reader(files, name, twin, naflex) for name, twin in layout.items()}
        for name in {EMBEDDING, HEAD} & values.keys():
            values[name] = with_new_rows(values[name], name, there.language.vocabulary, config, seed)
        yield values


def check_config(folder: Path, part: Part, config: ModelConfig, there: Any) -> None:
    """Raise UserError with everything in which a part of the model differs from that of a folder."""
    compare: Callable[[Any, Any], list[str]] = language_differences if part == "language" else vision_differences
    if wrong := compare(getattr(config, part), there):
        advice = f"`smalt model {folder}` prints the section that fits"
        raise UserError("\n  ".join([f"init.{part} = {folder} holds another model than the config; {advice}:", *wrong]))


def check_tensors(files: WeightFolder, part: Part, layout: Mapping[str, Twin], config: ModelConfig) -> None:
    """Raise UserError with every tensor that is not as it should be."""
    ignored = {name for name in files.files if any(fnmatchcase(name, pattern) for pattern in IGNORED[part])}
    wrong = [f"missing: {name}" for name in layout if name not in files.files]
    for name in sorted(files.files.keys() - ignored):
        if part == "language" and name == TRANSFORMERS_HEAD and config.language.tie_embeddings:
            wrong += _differing_head(files, layout)
        elif name not in layout:
            wrong.append(f"unexpected: {name}")
        elif (shape := files.shape(name)) != layout[name].shape:
            wrong.append(f"of another shape: {name} is {list(shape)}, and should be {list(layout[name].shape)}")
        elif not files.is_readable(name):
            wrong.append(f"of another type: {name} is {files.stored_as(name)}; only floating-point numbers are read")
    if wrong:
        raise UserError("\n  ".join([f"{files.path} does not hold the weights that its {CONFIG} describes:", *wrong]))


def with_new_rows(
    read: Callable[[Bounds], Tensor], name: str, num_rows: int, config: ModelConfig, seed: int
) -> Callable[[Bounds], Tensor]:
    """The rows of a matrix [num_rows, width] and, where more are asked for, new ones: the mean of those that are there, so that no
    token begins likelier than all others (Hewitt 2021), plus the numbers of a fresh model, so that they differ."""
    width = config.language.width
    whole = torch.Size((config.language.vocabulary, width))

    @cache
    def mean() -> Tensor:
        total = torch.zeros(width, dtype=torch.float64)
        for low in range(0, num_rows, _ROWS_AT_A_TIME):
            total += read(((low, min(low + _ROWS_AT_A_TIME, num_rows)), (0, width))).double().sum(0)
        return total / num_rows

    def rows(bounds: Bounds) -> Tensor:
        (first, last), columns = bounds
        start = max(first, num_rows)
        if last <= start:
            return read(bounds)
        old = read(((min(first, num_rows), num_rows), columns))
        new = (mean() + initial_rows(config, name, whole, seed, start, last))[:, slice(*columns)]
        return torch.cat(
            [old.to(torch.promote_types(old.dtype, torch.float32)), new.to(torch.promote_types(old.dtype, torch.float32))]
        )

    return rows


def _as_stored(config: ModelConfig, part: Part, there: Any) -> Any:
    """The section of the config with what the folder may have otherwise."""
    return config.language.model_copy(update={"vocabulary": there.vocabulary}) if part == "language" else config.vision


def _reader(files: WeightFolder, name: str, twin: Twin, naflex: bool) -> Callable[[Bounds], Tensor]:
    if twin.own != "vision.patch_embed.weight":
        return lambda bounds: files.read(name, bounds)

    def patches(bounds: Bounds) -> Tensor:
        """[C, 3 p p] with the pixels of a patch in the order channel, row, column."""
        rows, columns = bounds
        kernel = files.read(name, (rows, *((0, size) for size in twin.shape[1:])))
        if naflex:
            side = round((twin.shape[1] / 3) ** 0.5)
            kernel = kernel.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
        return kernel.flatten(1)[:, slice(*columns)]

    return patches


def _differing_head(files: WeightFolder, layout: Mapping[str, Twin]) -> list[str]:
    """A tied head that is there all the same must be the embedding."""
    embedding = next(name for name, twin in layout.items() if twin.own == EMBEDDING)
    shape = layout[embedding].shape
    if embedding not in files.files or files.shape(embedding) != shape:
        return []  # which is said of it
    blocks = (((low, min(low + _ROWS_AT_A_TIME, shape[0])), (0, shape[1])) for low in range(0, shape[0], _ROWS_AT_A_TIME))
    same = files.shape(TRANSFORMERS_HEAD) == shape and all(
        torch.equal(files.read(embedding, bounds), files.read(TRANSFORMERS_HEAD, bounds)) for bounds in blocks
    )
    return [] if same else [f"unexpected: {TRANSFORMERS_HEAD}, which is not {embedding}, though tie_word_embeddings is true"]
