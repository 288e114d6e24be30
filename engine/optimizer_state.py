"""What the optimisers of the engine share: the state of AdamW before its first step, as all of them name it, and the closure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What an optimiser's ``step`` returns: the loss of the closure that it was given, whose backward pass wants gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def adamw_state(p: Tensor, dtype: torch.dtype | None = None, *, on_cpu: bool = False, count_on_cpu: bool = False) -> dict[str, Tensor]:
    """``step`` (float32, without dims), ``exp_avg`` and ``exp_avg_sq`` (like the parameter, cut as it is if it is a DTensor).

    dtype: of the moments; that of the parameter when not given. on_cpu: keep all of it on the CPU, whatever the parameter's device;
    count_on_cpu: keep ``step`` there.
    """
    device = torch.device("cpu") if on_cpu else p.device
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu" if count_on_cpu else device),
        "exp_avg": torch.zeros_like(p, dtype=dtype, device=device),
        "exp_avg_sq": torch.zeros_like(p, dtype=dtype, device=device),
    }
