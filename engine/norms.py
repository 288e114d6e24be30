"""L2 norms by module: of weights, of gradients, of the optimiser's state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from smalt.parallel import World
from smalt.parallel.gradients import squared_norms

from .optimizers import optimizer_tensors


def module_of(name: str) -> str:
    """The module that a parameter is counted under: ``language.blocks.0``, ``language.embedding``, ``projector``."""
    parts = name.split(".")
    if parts[0] == "projector":
        return parts[0]
    return ".".join(parts[: 3 if parts[1] == "blocks" else 2])


def module_norms(tensors: Mapping[str, Tensor], world: World) -> dict[str, float]:
    """The norm of each module's tensors, given by the parameters' names; summed in float64, each element counted once.

    Tensors may be DTensors. Every rank of the world calls it with those it holds, and gets the norms of all modules.
    """
    return _norms({name: module_of(name) for name in tensors}, tensors, world)


def optimizer_norms(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str], world: World) -> dict[str, float]:
    """The norm of each state by module, as ``STATE/MODULE`` (``exp_avg/language.blocks.0``), otherwise as :func:`module_norms`.

    names: of the parameters; one that is left out is not counted.
    """
    tensors = {key.removeprefix("optimizer."): tensor for key, tensor in optimizer_tensors(optimizer, names).items()}
    keys = {}
    for key in tensors:
        state, name = key.split(".", 1)
        if state != "step":
            keys[key] = f"{state}/{module_of(name)}"
    return _norms(keys, tensors, world)


def _norms(keys: Mapping[str, str], tensors: Mapping[str, Tensor], world: World) -> dict[str, float]:
    groups: dict[str, list[Tensor]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(tensors[name].detach())
    return {key: math.sqrt(square) for key, square in sorted(squared_norms(groups, world).items())}
