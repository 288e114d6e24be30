"""What ``smalt bench kernels`` measures: operations, their shapes, and who computes them.

An :class:`Operation` has shapes and contestants, Smalt's first. For a shape ``inputs`` makes what all contestants are given; a
contestant's ``prepare`` makes a :class:`Call` of it, ready to be timed, or raises :class:`Absent` with the reason. Whatever a
library needs beforehand (a block mask, expanded keys) is made there, outside the timing, and said in the note.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# model/config.py, PRESETS["bluelm_3b"]; not imported, since that needs pydantic. A test compares.
WIDTH, FFN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 2560, 8192, 20, 4, 128, 100_096
VISION_WIDTH, VISION_FFN, VISION_HEADS, PATCHES, TILE_TOKENS = 1152, 4304, 16, 729, 196
LARGE_VOCABULARY = 151_936  # Qwen's
EPS = 1e-6
PACKS = {"8k": 8192, "32k": 32_768}
TILES = {"16 tiles": 16, "64 tiles": 64}  # 38% of the tokens of such a pack

Given = dict[str, Any]  # what all contestants of an operation are given; "args": the arguments, leaves among them


class Absent(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass
class Call:
    """run: computes, and returns one tensor or a tuple of them; leaves: of which gradients are taken; restore: puts back what a
    run spoils, outside the timing; note: what a reader of its figures must know."""

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    restore: Callable[[], object] | None = None
    note: str = ""


@dataclass(frozen=True)
class Contestant:
    name: str
    prepare: Callable[[Given], Call]


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.sizes[key]


@dataclass(frozen=True)
class Operation:
    """roofline: "copy", then work is in bytes, each input read once and each output written once; or "matmul", then it is in FLOP.

    work: of each part by the inputs; parts: what is timed, of "forward", "backward", "both", "step"; quick: shapes with ``--quick``.
    """

    name: str
    roofline: str
    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape, str], Given]
    work: Callable[[Given], dict[str, float]]
    contestants: tuple[Contestant, ...]
    parts: tuple[str, ...] = ("forward", "backward", "both")
    quick: int = 1


# Contestants


def call(function: Callable, args: tuple, note: str = "", spoils: bool = False) -> Call:
    """function(*args), to be differentiated in those that require a gradient; where it ``spoils`` these, they are put back."""
    leaves = tuple(x for x in args if torch.is_tensor(x) and x.requires_grad)
    restore = None
    if spoils:
        kept = [x.detach().clone() for x in leaves]

        def restore() -> None:
            for x, original in zip(leaves, kept, strict=True):
                x.data.copy_(original)

        note = note or "writes over its inputs, which are put back outside the timing"
    return Call(lambda: function(*args), leaves, restore, note)


def smalt(function: Callable, note: str = "") -> Contestant:
    return Contestant("smalt", lambda given: call(function, given["args"], note))


def eager(function: Callable, note: str = "") -> Contestant:
    return Contestant("torch eager", lambda given: call(function, given["args"], note))


def compiled(function: Callable, note: str = "") -> Contestant:
    return Contestant("torch.compile", lambda given: call(compile_static(function), given["args"], note))


def compile_static(function: Callable) -> Callable:
    """Compiled for this very shape."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def absent(name: str, reason: str) -> Contestant:
    def prepare(given: Given) -> Call:
        raise Absent(reason)

    return Contestant(name, prepare)


def liger(function: Callable, note: str = "", spoils: bool = False) -> Contestant:
    """function(ops, *args), of liger_kernel.ops."""

    def prepare(given: Given) -> Call:
        require("liger_kernel")
        import liger_kernel.ops as ops

        return call(lambda *args: function(ops, *args), given["args"], note, spoils)

    return Contestant("Liger", prepare)


def apex(function: Callable[..., Any], module: str, extension: str) -> Contestant:
    """function(module, *args), of a module of NVIDIA's apex that needs a compiled extension."""

    def prepare(given: Given) -> Call:
        found = require_apex(module, extension)
        return call(lambda *args: function(found, *args), given["args"])

    return Contestant("apex", prepare)


def require(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise Absent("not installed")


def require_apex(module: str, extension: str) -> Any:
    """A module of NVIDIA's apex; PyPI's project of that name is another one."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise Absent("not installed")
    if not any((Path(folder) / "normalization").is_dir() for folder in spec.submodule_search_locations or ()):
        raise Absent("the installed apex is another project than NVIDIA's")
    if importlib.util.find_spec(extension) is None:
        raise Absent(f"installed without its CUDA extension {extension}")
    return importlib.import_module(module)


# Inputs


def leaf(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random normal numbers; gradients are taken of it."""
    return (torch.randn(*shape, device=device, dtype=dtype) * scale).requires_grad_()


def document_lengths(num_tokens: int) -> list[int]:
    """Lengths of documents that fill a pack: log-normal around 700 tokens, at most half a pack; always the same."""
    rng = random.Random(0)
    lengths: list[int] = []
    while (room := num_tokens - sum(lengths)) > 0:
        lengths.append(min(max(16, int(rng.lognormvariate(6.5, 1.0))), num_tokens // 2, room))
    return lengths


@dataclass(frozen=True)
class Bounds:
    """The intervals of a pack: as lists, one number a row; and the kind of mask that they are."""

    start: list[int]
    end: list[int]
    lengths: list[int]
    causal: bool
    images: bool

    @property
    def pairs(self) -> int:
        """Pairs of a query row and a key that it sees."""
        return sum(self.end) - sum(self.start)


def bounds(lengths: list[int], causal: bool = True, image: int = 0) -> Bounds:
    """Documents of these lengths. image: tokens of an image at the start of each document that has room, which see each other."""
    start: list[int] = []
    end: list[int] = []
    for length in lengths:
        first = len(start)
        span = image if length > image else 0
        start += [first] * length
        end += [first + (max(q + 1, span) if causal else length) for q in range(length)]
    return Bounds(start, end, lengths, causal, image > 0)


# Other helpers of contestants


@contextmanager
def on_backend(name: str) -> Iterator[None]:
    from smalt.kernels import backend

    with backend(name):
        yield


def cumulative(lengths: list[int], device: str) -> Tensor:
    """int32 [N + 1]: where documents begin, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
