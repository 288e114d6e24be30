"""Out of memory, explained: what held it, and which settings would help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from smalt.parallel.layout import local_part

from .errors import UserError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate, on a GPU or on the CPU."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)


@contextmanager
def explain_out_of_memory(
    parameters: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer | None, doing: str, advice: str
) -> Iterator[None]:
    """Turn an allocation failure inside the ``with`` block into a UserError. ``advice``: the settings that would help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parameters = list(parameters)
        states = optimizer.state.values() if optimizer is not None else ()
        held = {
            "weights": sum(map(_bytes, parameters)),
            "gradients": sum(_bytes(p.grad) for p in parameters if p.grad is not None),
            "optimiser state": sum(_bytes(t) for s in states for t in s.values() if isinstance(t, torch.Tensor)),
        }
        parts = ", ".join(f"{part} {size / 2**20:,.1f} MiB" for part, size in held.items())
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"out of memory in {doing}: {first_line}\n"
            f"  held by {parts}; the rest are activations\n"
            f"  what helps: {advice}; more processes, which share weights, gradients and optimiser state"
        ) from error


def _bytes(tensor: torch.Tensor) -> int:
    local = local_part(tensor)
    return local.numel() * local.element_size()
