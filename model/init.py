"""Initial weights as a function of (seed, parameter name): any layout of processes starts from the same numbers."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .multimodal import MultimodalModel


def initialize(model: MultimodalModel, seed: int) -> None:
    """Fill every parameter in place. Matrices: normal(0, init_std); projections that write into the residual stream are scaled by
    1 / sqrt(2 x layers) (GPT-2, Radford et al. 2019, section 2.3); norms 1, biases 0."""
    depth = {"vision": model.config.vision.num_layers, "language": model.config.language.num_layers}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part, leaf = name.split(".")[0], name.split(".")[-2]
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in leaf:
                parameter.fill_(1.0)
            else:
                std = model.config.init_std
                if leaf in ("out", "down") and part in depth:
                    std /= math.sqrt(2 * depth[part])
                elif part == "projector" or leaf == "patch_embed":
                    # Inputs of unit scale: keep them so.
                    std = parameter.shape[-1] ** -0.5
                parameter.copy_(seeded_normal(parameter.shape, name, seed) * std)


def seeded_normal(shape: torch.Size, name: str, seed: int) -> Tensor:
    """Standard normal numbers in float32, from a generator keyed by the seed and the name.

    numpy's, since torch's CPU generator keeps 32 bits of its seed, and two names could share their numbers.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest(), "little")
    return torch.from_numpy(np.random.default_rng(key).standard_normal(tuple(shape), np.float32))


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
