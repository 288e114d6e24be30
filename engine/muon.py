"""Muon for the matrices inside the model (Jordan 2024, https://kellerjordan.github.io/posts/muon/), AdamW for everything else.

    m = momentum m + g,   U = orthogonalised (g + momentum m)
    w = (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) U

The scale gives the step the root mean square that AdamW's steps have, so that AdamW's learning rates and decay carry over, and one
schedule serves both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from smalt.parallel.layout import local_gradient, local_part
from smalt.parallel.whole import rounds

from .optimizer_state import adamw_state, loss_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def newton_schulz(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, nearly: singular values come out between about 0.7 and 1.2, save tiny ones.

    Five steps of the quintic iteration of Jordan 2024 in the dtype of the matrix [rows, columns]. Zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the groups with ``muon`` true, whose parameters are matrices; torch's fused AdamW for the others.

    lr, weight_decay: of both. momentum: Muon's. betas, eps: AdamW's. All may differ by group and change from step to step.

    Parameters may be DTensors. The momentum is cut as they are; each whole matrix is orthogonalised by one process of those that share
    it, in bfloat16 on a GPU, else in the weights' dtype (float64 in float64). On a mesh ``step`` is a collective: a parameter has a
    gradient on all processes that share it or on none. Raises ValueError for a ``muon`` parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        wrong = [tuple(p.shape) for p in self.param_groups[-1]["params"] if p.ndim != 2]
        if self.param_groups[-1]["muon"] and wrong:
            self.param_groups.pop()
            raise ValueError(f"Muon: parameters of shapes {wrong} are no matrices; put them in a group with muon = False")

    def make_state(self, p: Tensor, group: dict[str, Any]) -> None:
        """The state of a parameter before its first step."""
        if p not in self.state:
            self.state[p] = {"momentum": torch.zeros_like(p)} if group["muon"] else adamw_state(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = loss_of(closure)
        group_of = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        for p, group in group_of.items():
            self.make_state(p, group)
        # Rounds are dealt over all groups: one of few matrices would leave most processes idle.
        for dealt in rounds(p for p, group in group_of.items() if group["muon"]):
            directions = [self._direction(p, group_of[p]) for p in dealt.matrices]
            for p, direction in zip(dealt.matrices, dealt.map(directions, newton_schulz), strict=True):
                lr, weight = group_of[p]["lr"], local_part(p)
                weight.mul_(1 - lr * group_of[p]["weight_decay"])
                weight.add_(direction.to(weight.dtype), alpha=-lr * 0.2 * math.sqrt(max(p.shape)))
        for group in self.param_groups:
            if not group["muon"]:
                self._adamw([p for p in group["params"] if p in group_of], group)
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """This process's part of what is orthogonalised; the momentum is updated here."""
        gradient, momentum = local_gradient(p), local_part(self.state[p]["momentum"])
        momentum.mul_(group["momentum"]).add_(gradient)
        direction = gradient.add(momentum, alpha=group["momentum"])
        return direction.bfloat16() if p.is_cuda and p.dtype != torch.float64 else direction

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        averages, squares = ([local_part(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), steps = group["betas"], [state["step"] for state in states]
        # An element's step needs nothing of the others, so that the parts will do.
        adamw(
            [local_part(p) for p in parameters], [local_gradient(p) for p in parameters], averages, squares, [], steps, fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip
