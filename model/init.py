"""Initial weights as a function of (seed, parameter name, index): any layout of processes starts from the same numbers."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .multimodal import MultimodalModel

# Numbers that come from one generator. A shard makes the blocks that it overlaps, and no others.
BLOCK = 1 << 16


def initialize(model: MultimodalModel, seed: int) -> None:
    """Fill every parameter in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_rows(model.config, name, parameter.shape, seed, 0, len(parameter)))


def initial_rows(config: ModelConfig, name: str, shape: torch.Size, seed: int, first: int, last: int) -> Tensor:
    """Rows first .. last - 1 of a parameter of that name and whole shape, float32.

    Matrices: normal(0, init_std); projections that write into the residual stream are scaled by 1 / sqrt(2 x layers) (GPT-2,
    Radford et al. 2019, section 2.3); norms 1, biases 0.
    """
    part, leaf = name.split(".")[0], name.split(".")[-2]
    rows = (last - first, *shape[1:])
    if name.endswith("bias"):
        return torch.zeros(rows)
    if "norm" in leaf:
        return torch.ones(rows)
    std = config.init_std
    depth = {"vision": config.vision.num_layers, "language": config.language.num_layers}
    if leaf in ("out", "down") and part in depth:
        std /= math.sqrt(2 * depth[part])
    elif part == "projector" or leaf == "patch_embed":
        # Inputs of unit scale: keep them so.
        std = shape[-1] ** -0.5
    row = math.prod(shape[1:])
    return seeded_normal(name, seed, first * row, last * row).view(rows) * std


def seeded_normal(name: str, seed: int, first: int, last: int) -> Tensor:
    """Numbers first .. last - 1 of an endless row of standard normal ones, float32, that the seed and the name fix.

    numpy's, since torch's CPU generator keeps 32 bits of its seed, and two names could share their numbers.
    """
    blocks = range(first // BLOCK, -(-last // BLOCK))
    parts = [_block(name, seed, b, min(last - b * BLOCK, BLOCK))[max(first - b * BLOCK, 0) :] for b in blocks]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.float32))


def _block(name: str, seed: int, number: int, size: int) -> np.ndarray:
    identity = f"{seed}:{name}:{number}" if number else f"{seed}:{name}"
    key = int.from_bytes(hashlib.sha256(identity.encode()).digest(), "little")
    return np.random.default_rng(key).standard_normal(size, np.float32)


def build_model(
    config: ModelConfig, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MultimodalModel:
    """A model with its initial weights."""
    with torch.device("meta"):
        model = MultimodalModel(config)
    model.to(dtype).to_empty(device=device)
    if model.language.embedding.weight.device.type != "meta":
        initialize(model, seed)
    return model
