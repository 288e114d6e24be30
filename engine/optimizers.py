"""AdamW over the trainable parts of a stage, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from smalt.model import PARTS

from .config import OptimizerConfig, StageConfig


def trainable_parts(stage: StageConfig) -> list[str]:
    """The parts that learn; the others are frozen."""
    return [part for part in PARTS if stage.trainable.get(part, 0.0) > 0]


def build_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], stage: StageConfig, config: OptimizerConfig) -> torch.optim.AdamW:
    """One group for each part and kind: matrices decay, vectors (norms, biases) do not; ``multiplier`` scales the rate."""
    groups, everything = [], list(named)
    for name in PARTS:
        parameters = [p for n, p in everything if n.startswith(f"{name}.") and p.requires_grad]
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            decay = config.weight_decay if matrices else 0.0
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "multiplier": stage.trainable[name]})
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Learning rate of step 0 .. steps - 1 of a stage, before the multipliers."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    decayed = {
        "constant": 0.0,
        "cosine": 0.5 * (1 - math.cos(math.pi * done)),
        "wsd": max(0.0, (done - 0.8) / 0.2),
    }[stage.schedule]
    return stage.learning_rate * (1 - (1 - stage.final_share) * decayed)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
