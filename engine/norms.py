"""L2 norms by module: of weights, of gradients, of the optimiser's state."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from smalt.parallel.norms import squared_norms

from .optimizers import optimizer_tensors


def module_of(name: str) -> str:
    """The module that a parameter is counted under: ``language.blocks.0``, ``language.embedding``, ``projector``."""
    parts = name.split(".")
    if parts[0] == "projector":
        return parts[0]
    return ".".join(parts[: 3 if parts[1] == "blocks" else 2])


def module_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each module's tensors, given by the parameters' names; summed in float64, each element counted once.

    Tensors may be DTensors on any meshes. A collective: the processes of a mesh pass the same names in the same order, and get the
    same norms; a pipeline stage knows those of its own modules.
    """
    return _norms({name: module_of(name) for name in tensors}, tensors)


def optimizer_norms(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, float]:
    """The norm of each state by module, as ``STATE/MODULE`` (``exp_avg/language.blocks.0``), otherwise as :func:`module_norms`.

    names: of the parameters.
    """
    tensors = {key.removeprefix("optimizer."): tensor for key, tensor in optimizer_tensors(optimizer, names).items()}
    keys = {}
    for key in tensors:
        state, name = key.split(".", 1)
        if state != "step":
            keys[key] = f"{state}/{module_of(name)}"
    return _norms(keys, tensors)


def _norms(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for key, square in zip(keys.values(), squared_norms([tensors[name].detach() for name in keys]), strict=True):
        squares[key] = squares.get(key, 0.0) + square
    return {key: math.sqrt(square) for key, square in squares.items()}
