"""FusedAdam of NVIDIA's apex (https://github.com/NVIDIA/apex), in AdamW mode, for parameters that may be DTensors."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalt.parallel.layout import local_gradient, local_part

from .errors import UserError
from .optimizer_state import adamw_state, loss_of

_INSTALL = (
    "build NVIDIA's from https://github.com/NVIDIA/apex with its C++ and CUDA extensions (not `pip install apex`, which is another "
    "project), or set optimizer.kind to adamw or smalt_adamw"
)


def find_fused_adam() -> Callable[..., torch.optim.Optimizer]:
    """The class. Raises UserError that says what is installed instead and what to install."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"optimizer.kind = apex: apex is not installed; {_INSTALL}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        where = folders[0] if folders else spec.origin
        raise UserError(
            f"optimizer.kind = apex: apex {_version()} in {where} is another project than NVIDIA's; uninstall it and {_INSTALL}"
        )
    if importlib.util.find_spec("amp_C") is None:
        raise UserError(f"optimizer.kind = apex: NVIDIA's apex in {folders[0]} is built without its CUDA extension amp_C; {_INSTALL}")
    from apex.optimizers import FusedAdam

    return FusedAdam


def _version() -> str:
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


class ApexAdam(torch.optim.Optimizer):
    """FusedAdam over this process's parts: its kernel reads addresses, which a DTensor does not have.

    fused_adam: the class. The moments are float32, and the step, which FusedAdam counts by group, is in the state of each parameter.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        fused_adam: Callable[..., torch.optim.Optimizer],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.parts = {p: local_part(p).detach() for group in self.param_groups for p in group["params"]}
        parts = [{**group, "params": [self.parts[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = fused_adam(parts, lr=lr, betas=betas, eps=eps, adam_w_mode=True)

    def make_state(self, p: Tensor) -> None:
        """The state of a parameter before its first step."""
        if p not in self.state:
            self.state[p] = adamw_state(p, torch.float32, count_on_cpu=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = loss_of(closure)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
            members = [p for p in group["params"] if p.grad is not None]
            for p in members:
                self.make_state(p)
                state, part = self.state[p], self.parts[p]
                part.data, part.grad = local_part(p).detach(), local_gradient(p)
                self.inner.state[part] = {key: local_part(state[key]) for key in ("exp_avg", "exp_avg_sq")}
                inner["step"] = int(state["step"])  # FusedAdam adds one
        stepped = [p for p, part in self.parts.items() if part.grad is not None]
        if stepped:
            self.inner.step()
        for p in stepped:
            self.state[p]["step"] += 1
            self.parts[p].grad = None
        return loss
