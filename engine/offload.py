"""Optimiser state and arithmetic on the CPU (Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840): the GPU keeps weights and gradients.

Weights and gradients come to the CPU, are stepped there, and the new weights go back. On a GPU a bucket of parameters is stepped while
those after it still come and those before it go back, on streams of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from smalt.parallel.layout import local_gradient, local_part

from .optimizer_state import adamw_state, loss_of

BUCKET = 1 << 25
"""Elements that are moved and stepped at a time."""


class Offloaded(torch.optim.Optimizer):
    """An AdamW that runs on the CPU, for parameters anywhere; DTensors are stepped part by part.

    groups: as an optimiser takes them. make: builds the optimiser of the copies on the CPU from groups of them; called with a second
    argument, a function that gives the parameter of a copy. state_dtype: of the moments; the parameter's when None.

    The result is that of the same optimiser on the device, to the bit where both are the CPU. The state is cut as the parameters are.
    Memory on the CPU: the state, and a copy of weights and gradients, which is pinned where the parameters are on a GPU.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        make: Callable[[list[dict[str, Any]], Callable[[Tensor], Tensor]], torch.optim.Optimizer],
        state_dtype: torch.dtype | None = None,
    ):
        super().__init__(groups, {})
        self.state_dtype = state_dtype
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.weights = {p: _buffer(p) for p in parameters}
        self.gradients = {p: _buffer(p) for p in parameters}
        origin = {copy: p for p, copy in self.weights.items()}
        copies = [{**group, "params": [self.weights[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = make(copies, origin.__getitem__)
        # What the inner optimiser adds to its groups (betas, eps ...) is set through ours.
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in inner.items() if key != "params"})
        on_gpu = any(p.is_cuda for p in parameters)
        self.coming = torch.cuda.Stream() if on_gpu else None
        self.going = torch.cuda.Stream() if on_gpu else None

    def make_state(self, p: Tensor) -> None:
        """The state of a parameter before its first step, on the CPU."""
        if p not in self.state:
            wide = p.dtype == torch.float64
            self.state[p] = adamw_state(p, None if wide else self.state_dtype, on_cpu=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
        buckets = _buckets(p for group in self.param_groups for p in group["params"] if p.grad is not None)
        # All copies are begun at once. The gradients are held here until the end, as streams do not hold what they copy.
        gradients = [[local_gradient(p) for p in bucket] for bucket in buckets]
        arrivals = [self._fetch(bucket, values) for bucket, values in zip(buckets, gradients, strict=True)]
        for bucket, arrived in zip(buckets, arrivals, strict=True):
            if arrived is not None:
                arrived.synchronize()
            self._step(bucket)
            with torch.cuda.stream(self.going):
                for p in bucket:
                    local_part(p).copy_(self.weights[p], non_blocking=True)
        if self.going is not None:
            torch.cuda.current_stream().wait_stream(self.going)
        return loss

    def _fetch(self, bucket: list[Tensor], gradients: list[Tensor]) -> torch.cuda.Event | None:
        """Begin to copy weights and gradients to the CPU; the event says when they are there."""
        if self.coming is not None:
            self.coming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.coming):
            for p, gradient in zip(bucket, gradients, strict=True):
                self.weights[p].copy_(local_part(p), non_blocking=True)
                self.gradients[p].copy_(gradient, non_blocking=True)
            return None if self.coming is None else self.coming.record_event()

    def _step(self, bucket: list[Tensor]) -> None:
        """Only these copies have a gradient, so that the inner optimiser steps them alone."""
        for p in bucket:
            self.make_state(p)
            copy = self.weights[p]
            copy.grad = self.gradients[p]
            self.inner.state[copy] = {key: local_part(value) for key, value in self.state[p].items()}
        self.inner.step()
        for p in bucket:
            self.weights[p].grad = None


def _buffer(p: Tensor) -> Tensor:
    """Room on the CPU for this process's part of a parameter; pinned memory is what a GPU can copy while other work goes on."""
    return torch.empty_like(local_part(p), device="cpu", pin_memory=p.is_cuda, memory_format=torch.contiguous_format)


def _buckets(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = 0
    for p in parameters:
        size = local_part(p).numel()
        if not buckets or filled + size > BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += size
    return buckets
