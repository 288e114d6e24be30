"""The optimiser of a stage over its trainable parameters, and its part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from smalt.kernels import AdamW
from smalt.model import PARTS, MultimodalModel
from smalt.parallel import ParallelModel
from smalt.parallel.deepspeed import ZeroOptimizer
from smalt.parallel.layout import first_index

from .apex_adam import ApexAdam, find_fused_adam
from .errors import UserError
from .muon import Muon
from .offload import Offloaded
from .optimizer_state import adamw_state
from .sections import OptimizerConfig, StageConfig

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Groups = list[dict[str, Any]]


def trainable_parts(stage: StageConfig) -> list[str]:
    """The parts that learn; the others are frozen."""
    return [part for part in PARTS if stage.trainable.get(part, 0.0) > 0]


def build_optimizer(model: MultimodalModel | ParallelModel, stage: StageConfig, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of ``config.kind`` over what is trainable, in the groups of :func:`parameter_groups`.

    Raises UserError where apex is not there or cannot train these parameters.
    """
    groups = parameter_groups(model, stage, config)
    rate = stage.learning_rate or 0.0  # every step sets its own; a continued stage has none
    if config.kind == "muon":
        return Muon(groups, rate, momentum=config.momentum, betas=config.betas, eps=config.eps)
    if config.kind == "apex":
        return _apex(groups, rate, config)

    def make(groups: Groups, origin: Callable[[Tensor], Tensor]) -> torch.optim.Optimizer:
        if config.kind == "adamw":
            return torch.optim.AdamW(groups, rate, config.betas, config.eps, fused=True)
        dtype = STATE_DTYPES[config.state_dtype]
        optimizer = AdamW(groups, rate, config.betas, config.eps, state_dtype=dtype)
        # Rounding then depends on where an element is in the whole model, not in its shard or its pipeline stage: two of these have
        # copies of a tied weight, which must stay alike.
        numbers = _numbers(model)
        optimizer.first_index = lambda p: first_index(origin(p))
        optimizer.number = lambda p: numbers[origin(p)]
        return optimizer

    if config.offload == "cpu":
        return Offloaded(groups, make, STATE_DTYPES[config.state_dtype] if config.kind == "smalt_adamw" else None)
    return make(groups, lambda p: p)


def parameter_groups(model: MultimodalModel | ParallelModel, stage: StageConfig, config: OptimizerConfig) -> Groups:
    """Trainable parameters by ``multiplier`` of the learning rate, ``weight_decay`` (matrices have it, vectors have none) and ``muon``
    (the matrices of blocks and projector, where that is the kind). One empty group where nothing is trainable here, as can be on a
    pipeline stage."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            multiplier = _multiplier(name, stage, model.config.vision.num_layers)
            decay = config.weight_decay if p.ndim > 1 else 0.0
            muon = config.kind == "muon" and p.ndim == 2 and (".blocks." in name or name.startswith("projector."))
            # Which DTensors one fused step takes together changes from torch to torch; those of one mesh always are.
            mesh = p.device_mesh if config.kind == "adamw" and isinstance(p, DTensor) else None
            # FusedAdam counts the steps of a group, and a part may have begun in a later stage than the others.
            part = name.split(".")[0] if config.kind == "apex" else None
            empty = {"params": [], "weight_decay": decay, "multiplier": multiplier, "muon": muon}
            groups.setdefault((multiplier, decay, muon, mesh, part), empty)["params"].append(p)
    return list(groups.values()) or [{"params": [], "weight_decay": 0.0, "multiplier": 1.0, "muon": False}]


def _numbers(model: MultimodalModel | ParallelModel) -> dict[Tensor, int]:
    """The number of each parameter in the whole model, of which a pipeline stage holds a part."""
    with torch.device("meta"):
        numbers = {name: i for i, (name, _) in enumerate(MultimodalModel(model.config).named_parameters())}
    return {p: numbers[name] for name, p in model.named_parameters()}


def _multiplier(name: str, stage: StageConfig, num_layers: int) -> float:
    """Of the learning rate of a parameter: its part's, and in the vision tower less the farther it is from the language model."""
    part, *rest = name.split(".")
    if part != "vision" or rest[0] == "norm":
        return stage.trainable[part]
    depth = num_layers - int(rest[1]) if rest[0] == "blocks" else num_layers + 1
    return stage.trainable[part] * stage.vision_layer_decay**depth


def _apex(groups: Groups, rate: float, config: OptimizerConfig) -> ApexAdam:
    fused_adam = find_fused_adam()
    for p in (p for group in groups for p in group["params"]):
        if not p.is_cuda or p.dtype == torch.float64:
            raise UserError(
                f"optimizer.kind = apex: the parameters are {p.dtype} on {p.device}, and FusedAdam trains float32 on a GPU; set "
                "optimizer.kind to adamw"
            )
    return ApexAdam(groups, fused_adam, rate, config.betas, config.eps)


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state by the name of the parameter, made now where no step was taken yet.

    It is the state itself, and writing into it restores it; DeepSpeed's is a copy, which its model restores. names: of the parameters;
    what it leaves out is left out.
    """
    held = ((group, p) for group in optimizer.param_groups for p in group["params"] if p in names)
    return {names[p]: _state_of(optimizer, group, p) for group, p in held}


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, Tensor]:
    """Every tensor of :func:`optimizer_state`, as ``optimizer.STATE.NAME``."""
    return tensors_of(optimizer_state(optimizer, names))


def tensors_of(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each tensor of states by parameter as ``optimizer.STATE.NAME``."""
    return {f"optimizer.{key}.{name}": tensor for name, state in states.items() for key, tensor in state.items()}


def continue_optimizer(
    optimizer: torch.optim.Optimizer,
    model: ParallelModel,
    before: ParallelModel,
    states: Mapping[str, dict[str, Tensor]],
    parts: Collection[str],
) -> None:
    """Go on with the state of an optimiser of the same kind over another model on this layout; every rank of the world calls it.

    states: what this rank has of it, for ``before``; parts: those that learned there and learn here. The state of parameters that stay
    where they are is taken as it is, without a copy. Raises ValueError as ``restore`` of a DeepSpeedModel does.
    """
    states = {name: state for name, state in states.items() if name.split(".")[0] in parts}
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.model.restore_state(tensors_of(states))
        return
    names = {p: name for name, p in model.named_parameters() if name.split(".")[0] in parts}
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if names.get(p) in states):
            optimizer.state[p] = states[names[p]]
    model.take_moved(before, tensors_of(states), optimizer_tensors(optimizer, names))


def _state_of(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.nn.Parameter) -> dict[str, Tensor]:
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.copy_state(p)
    if isinstance(optimizer, Muon):
        optimizer.make_state(p, group)
    elif isinstance(optimizer, Offloaded | ApexAdam):
        optimizer.make_state(p)
    elif p not in optimizer.state:
        if isinstance(optimizer, AdamW):
            dtype = torch.float64 if p.dtype == torch.float64 else group["state_dtype"]
            optimizer.state[p] = adamw_state(p, dtype, count_on_cpu=True)
        else:
            optimizer.state[p] = adamw_state(p)
    return optimizer.state[p]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
