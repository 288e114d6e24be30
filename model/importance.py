"""How much each unit of a model matters on calibration packs, from its activations (Muralidharan et al. 2024, arXiv 2407.14679).

The importance of a unit is the L2 norm, over documents, of the mean over a document's rows of a magnitude: of a neuron and a channel
of the residual stream |x|, a channel's after each norm and summed over these; of a query head the L2 norm of its output. A block's is
its influence, 1 - cosine between what goes into it and what comes out (Men et al. 2024, arXiv 2403.03853). In the vision tower a
document is a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import PackedBatch
from .language import RMSNorm
from .multimodal import MultimodalModel


@dataclass(frozen=True)
class BlockImportance:
    """heads: [H], of query heads; neurons: [F]; influence: mean over documents."""

    heads: Tensor
    neurons: Tensor
    influence: float


@dataclass(frozen=True)
class TowerImportance:
    """channels: [C]; blocks: in order; energies: of each norm, by its name in the tower, the mean square [C] of what goes into it, in
    the vision tower less the mean over channels."""

    channels: Tensor
    blocks: list[BlockImportance]
    energies: dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """All tensors are float64 on the CPU. projector: [hidden units]."""

    vision: TowerImportance
    language: TowerImportance
    projector: Tensor


@torch.no_grad()
def measure_importance(model: MultimodalModel, packs: Iterable[PackedBatch]) -> Importance:
    """The importance of all units over packs on the model's device. Packs without a tile say nothing of vision tower and projector,
    whose importance is 0 if there is no other."""
    vision, projector, language = _Meter(), _Meter(), _Meter()
    with _watching(model, vision, projector, language):
        for pack in packs:
            used = pack.kv_end > pack.kv_start
            document = torch.where(used, (used & (pack.positions == 0)).cumsum(0) - 1, -1)
            tile = torch.arange(len(pack.tiles), device=pack.tokens.device)
            language.begin(document)
            vision.begin(tile.repeat_interleave(model.config.vision.grid**2))
            projector.begin(tile.repeat_interleave(model.config.vision.tokens_per_tile))
            model.hidden(pack)
    text, tower = model.config.language, model.config.vision
    return Importance(
        _tower(vision, [(tower.num_heads, tower.ffn)] * tower.num_layers, tower.width),
        _tower(language, [(text.num_heads, text.ffn)] * text.num_layers, text.width),
        projector.importance("neurons", model.projector.up.out_features),
    )


class _Meter:
    """Sums over documents of what hooks see of rows. Rows of no document, and the blank tile of a pack without one, are left out."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.count = 0
        self.shares = torch.zeros(0, 0)

    def begin(self, document: Tensor) -> None:
        """document: int64 [rows], the number of each row's document, -1 for a row of none."""
        number = int(document.max()) + 1 if len(document) else 0
        member = (document == torch.arange(number, device=document.device)[:, None]).double()
        # A product, not index_add: that adds in no fixed order on a GPU.
        self.shares = member / member.sum(1, keepdim=True)
        self.count += number

    def add(self, key: str, values: Tensor) -> None:
        """values: [rows, units]."""
        if not len(self.shares):
            return
        means = self.shares @ values.double()
        for totals, new in ((self.sums, means), (self.squares, means.square())):
            totals[key] = totals.get(key, 0) + new.sum(0)

    def importance(self, key: str, units: int) -> Tensor:
        return self.squares[key].sqrt().cpu() if key in self.squares else torch.zeros(units, dtype=torch.float64)

    def mean(self, key: str, units: int) -> Tensor:
        return self.sums[key].cpu() / self.count if key in self.sums else torch.zeros(units, dtype=torch.float64)


@contextmanager
def _watching(model: MultimodalModel, vision: _Meter, projector: _Meter, language: _Meter) -> Iterator[None]:
    hooks = [*_watch_tower(model.vision, vision), *_watch_tower(model.language, language)]
    hooks.append(_before(model.projector.down, _see_neurons(projector, "neurons")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watch_tower(tower: nn.Module, meter: _Meter) -> Iterator[torch.utils.hooks.RemovableHandle]:
    for name, module in tower.named_modules():
        leaf = name.split(".")[-1]
        if leaf in ("norm", "norm1", "norm2"):
            yield module.register_forward_hook(_see_norm(meter, name))
        elif leaf == "out":
            block = ".".join(name.split(".")[:2])
            yield _before(module, _see_heads(meter, f"{block}.heads", tower.config))  # type: ignore[arg-type]
        elif leaf == "down":
            yield _before(module, _see_neurons(meter, f"{name.removesuffix('.down')}.neurons"))
        elif name.startswith("blocks.") and name.count(".") == 1:
            yield module.register_forward_hook(_see_block(meter, f"{name}.influence"))


def _before(module: nn.Module, see) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_pre_hook(lambda module, args: see(args[0]))


def _see_neurons(meter: _Meter, key: str):
    return lambda x: meter.add(key, x.abs())


def _see_heads(meter: _Meter, key: str, config):
    return lambda x: meter.add(key, x.unflatten(-1, (config.num_heads, -1)).norm(dim=-1))


def _see_norm(meter: _Meter, name: str):
    def see(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        # A norm with a residual gives their sum too.
        normed, x = output if isinstance(output, tuple) else (output, args[0])
        meter.add(f"channels.{name}", normed.abs())
        x = x.double()
        centred = x if isinstance(module, RMSNorm) else x - x.mean(-1, keepdim=True)
        meter.add(f"energy.{name}", centred.square())

    return see


def _see_block(meter: _Meter, key: str):
    return lambda module, args, output: meter.add(key, 1 - F.cosine_similarity(args[0].double(), output.double(), dim=-1)[:, None])


def _tower(meter: _Meter, blocks: list[tuple[int, int]], width: int) -> TowerImportance:
    names = [f"blocks.{i}.norm{n}" for i in range(len(blocks)) for n in (1, 2)] + ["norm"]
    return TowerImportance(
        torch.stack([meter.importance(f"channels.{name}", width) for name in names]).sum(0),
        [
            BlockImportance(
                meter.importance(f"blocks.{i}.heads", heads),
                meter.importance(f"blocks.{i}.neurons", neurons),
                float(meter.mean(f"blocks.{i}.influence", 1)),
            )
            for i, (heads, neurons) in enumerate(blocks)
        ],
        {name: meter.mean(f"energy.{name}", width) for name in names},
    )
