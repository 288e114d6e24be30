"""A smaller model out of a larger one: which units are kept, and which part of which weight each weight of the smaller one is.

Depth, query heads and groups of them, neurons and channels of the residual stream are removed whole, the least important first; what
is kept stays in its order. A norm divides by the size of all channels: its weight is scaled by the root of the ratio of the mean
squares, measured on the calibration packs, of those that are kept and of all, so that what it gives keeps its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LanguageConfig, ModelConfig, VisionConfig
from .importance import Importance, TowerImportance

SIZES = {
    "vision": ("num_layers", "width", "num_heads", "ffn"),
    "language": ("num_layers", "width", "num_heads", "num_kv_heads", "ffn"),
}
"""What may be smaller; everything else must be the same."""

# The dims of weights by the last part of their names: c channels, q rows of query heads, k of key and value heads, f neurons.
DIMS = {
    "q": "qc", "k": "kc", "v": "kc", "out": "cq", "gate": "fc", "up": "fc", "down": "cf", "norm": "c", "norm1": "c", "norm2": "c",
    "patch_embed": "c-", "position": "-c", "embedding": "-c", "head": "-c", "q_norm": "-", "k_norm": "-",
}  # fmt: skip


@dataclass(frozen=True)
class KeptBlock:
    """A block of the larger model. heads: query heads; kv_heads: in the vision tower the same."""

    number: int
    heads: list[int]
    kv_heads: list[int]
    neurons: list[int]


@dataclass(frozen=True)
class KeptTower:
    """scales: of the weight of each norm, by the norm's name in the larger tower."""

    channels: list[int]
    blocks: list[KeptBlock]
    scales: dict[str, float]


@dataclass(frozen=True)
class Kept:
    """projector: hidden units."""

    vision: KeptTower
    language: KeptTower
    projector: list[int]


@dataclass(frozen=True)
class Origin:
    """Where a weight of the smaller model comes from: the name there, what is kept along each dim (None: all), a factor."""

    name: str
    index: tuple[Tensor | None, ...]
    scale: float = 1.0

    def take(self, whole: Tensor, bounds: tuple[tuple[int, int], ...]) -> Tensor:
        """The part [start, stop) along each dim of the smaller weight. whole: the larger one."""
        for dim, (start, stop) in enumerate(bounds):
            index = self.index[dim]
            whole = whole.narrow(dim, start, stop - start) if index is None else whole.index_select(dim, index[start:stop])
        return whole if self.scale == 1.0 else whole * self.scale


def differences(larger: ModelConfig, smaller: ModelConfig) -> list[str]:
    """Every reason why the one cannot be pruned to the other."""
    wrong = []
    for section, sizes in SIZES.items():
        a, b = getattr(larger, section), getattr(smaller, section)
        for key in type(a).model_fields:
            old, new = getattr(a, key), getattr(b, key)
            if key in sizes and new > old:
                wrong.append(f"model.{section}.{key}: {new} is more than the {old} that there are")
            elif key not in sizes and new != old:
                wrong.append(f"model.{section}.{key}: {new}, where it is {old}; pruning does not change it")
    wrong += _differences_of_heads(larger, smaller)
    if (new := _hidden(smaller)) > (old := _hidden(larger)):
        wrong.append(f"model.projector_width: {new} is more than the {old} that there are")
    if larger.image_attention != smaller.image_attention:
        wrong.append(
            f"model.image_attention: {smaller.image_attention}, where it is {larger.image_attention}; pruning does not change it"
        )
    return wrong


def _differences_of_heads(larger: ModelConfig, smaller: ModelConfig) -> list[str]:
    wrong = []
    old, new = larger.vision.width // larger.vision.num_heads, smaller.vision.width // smaller.vision.num_heads
    if old != new:
        wrong.append(f"model.vision: width / num_heads is {new}, where it is {old}; a head is kept or removed whole")
    old, new = _group(larger), _group(smaller)
    if new > old:
        wrong.append(
            f"model.language: {new} query heads (num_heads / num_kv_heads) share a key and value head, where {old} do; none can be "
            "given to another"
        )
    return wrong


def choose(importance: Importance, larger: ModelConfig, smaller: ModelConfig) -> Kept:
    """What to keep. The configs are such that :func:`differences` finds none."""
    return Kept(
        _choose_tower(importance.vision, smaller.vision, larger.vision.num_heads, smaller.vision.num_heads),
        _choose_tower(importance.language, smaller.language, larger.language.num_kv_heads, smaller.language.num_kv_heads),
        _most(importance.projector, _hidden(smaller)),
    )


def origins(kept: Kept, larger: ModelConfig, smaller: ModelConfig, names: list[str]) -> dict[str, Origin]:
    """Of weights of the smaller model by name."""
    return {name: _origin(name, kept, larger, smaller) for name in names}


def _choose_tower(importance: TowerImportance, size: VisionConfig | LanguageConfig, num_groups: int, kept_groups: int) -> KeptTower:
    """size: of the smaller tower."""
    channels = _most(importance.channels, size.width)
    blocks = []
    for number in _most(torch.tensor([block.influence for block in importance.blocks]), size.num_layers):
        block = importance.blocks[number]
        groups, heads = _choose_heads(block.heads.view(num_groups, -1), kept_groups, size.num_heads // kept_groups)
        blocks.append(KeptBlock(number, heads, groups, _most(block.neurons, size.ffn)))
    scales = {name: _scale(energy, channels) for name, energy in importance.energies.items()}
    return KeptTower(channels, blocks, scales)


def _choose_heads(importance: Tensor, num_groups: int, group: int) -> tuple[list[int], list[int]]:
    """Groups, and query heads of these. importance: [groups, heads of a group]. A group is worth what its heads that stay are."""
    best = importance.sort(dim=1, descending=True, stable=True)
    groups = _most(best.values[:, :group].sum(1), num_groups)
    heads = [g * importance.shape[1] + head for g in groups for head in sorted(best.indices[g, :group].tolist())]
    return groups, heads


def _most(importance: Tensor, count: int) -> list[int]:
    """The most important units, in their order; of equals the first."""
    return sorted(importance.sort(dim=0, descending=True, stable=True).indices[:count].tolist())


def _scale(energy: Tensor, channels: list[int]) -> float:
    if len(channels) == len(energy) or not energy.any():
        return 1.0
    return float((energy[channels].mean() / energy.mean()).sqrt())


def _origin(name: str, kept: Kept, larger: ModelConfig, smaller: ModelConfig) -> Origin:
    part, *rest = name.split(".")
    if part == "projector":
        return _origin_of_projector(name, kept, larger, smaller)
    tower = kept.vision if part == "vision" else kept.language
    config = larger.vision if part == "vision" else larger.language
    leaf = rest[-1] if rest[-1] == "position" else rest[-2]
    units: dict[str, list[int] | None] = {"-": None, "c": _unless_all(tower.channels, config.width)}
    if rest[0] == "blocks":
        block = tower.blocks[int(rest[1])]
        rest[1] = str(block.number)
        units |= _units_of_block(block, config)
    index = tuple(_tensor(units[dim]) for dim in DIMS[leaf])
    source = ".".join([part, *rest])
    scaled = leaf in ("norm", "norm1", "norm2") and name.endswith("weight")
    scale = tower.scales[source.removeprefix(f"{part}.").rpartition(".")[0]] if scaled else 1.0
    return Origin(source, index[:1] if name.endswith("bias") else index, scale)


def _units_of_block(block: KeptBlock, config: VisionConfig | LanguageConfig) -> dict[str, list[int] | None]:
    if isinstance(config, LanguageConfig):
        size, num_kv = config.head_dim, config.num_kv_heads
    else:
        size, num_kv = config.width // config.num_heads, config.num_heads
    return {
        "q": _unless_all(_rows(block.heads, size), config.num_heads * size),
        "k": _unless_all(_rows(block.kv_heads, size), num_kv * size),
        "f": _unless_all(block.neurons, config.ffn),
    }


def _origin_of_projector(name: str, kept: Kept, larger: ModelConfig, smaller: ModelConfig) -> Origin:
    width, merge = larger.vision.width, larger.vision.merge
    seen = [place * width + channel for place in range(merge**2) for channel in kept.vision.channels]
    hidden = _unless_all(kept.projector, _hidden(larger))
    dims = {
        "up": (hidden, _unless_all(seen, width * merge**2)),
        "down": (_unless_all(kept.language.channels, larger.language.width), hidden),
    }[name.split(".")[1]]
    return Origin(name, tuple(map(_tensor, dims[:1] if name.endswith("bias") else dims)))


def _rows(heads: list[int], size: int) -> list[int]:
    return [head * size + i for head in heads for i in range(size)]


def _unless_all(units: list[int], count: int) -> list[int] | None:
    return None if len(units) == count else units


def _tensor(units: list[int] | None) -> Tensor | None:
    return None if units is None else torch.tensor(units)


def _hidden(config: ModelConfig) -> int:
    return config.projector_width or config.language.width


def _group(config: ModelConfig) -> int:
    return config.language.num_heads // config.language.num_kv_heads
