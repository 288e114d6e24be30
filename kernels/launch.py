"""How a Triton kernel is launched: for which chip, with which tiles, and by which one function.

Every launch goes through :func:`launch`, so that ``smalt kernels check`` can record the launches of an operation on a machine
without a GPU and compile exactly those, and so that options which change results are stated in one place.

The module also stands between Smalt and a machine without Triton: ``triton`` and ``tl`` are then None, and :func:`jit` returns
the function as it is, never to be called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Triton reads the variable when a kernel is defined; so do we. Interpreter and compiler cannot share a process.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
TABLES = Path(__file__).with_name("launch_tables")


def jit(function: Callable | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """``triton.jit``; ``varying``: integers that change from step to step, for whose special values nothing is recompiled."""
    if function is None:
        return lambda f: jit(f, varying=varying)
    return triton.jit(function, do_not_specialize=list(varying)) if triton else function


def constexpr(value: Any) -> Any:
    """A constant of a module that kernels may read."""
    return tl.constexpr(value) if triton else value


_INTERPRET = constexpr(INTERPRET)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in fp32. The interpreter would multiply the bit patterns of bf16, so there the operands are widened."""
    if _INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def convert(x, DTYPE: tl.constexpr):
    """fp32 x in another dtype, rounded to nearest even. The interpreter would cut bf16 off, so there it is rounded by hand."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@jit
def tanh(x):
    """Core Triton has none. Near 0 the quotient would lose its digits, the series (to x^9) has them all."""
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    s = x * x
    series = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(s < 0.0625, series, quotient)


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are formed: exactly, unless torch was told that TF32 is good enough, and the chip has it."""
    told = torch.backends.cuda.matmul.fp32_precision == "tf32"  # whichever of torch's ways it was told by
    return "tf32" if dtype == torch.float32 and told and not torch.version.hip else "ieee"


@dataclass(frozen=True)
class Config:
    """Tiles (the constexpr block sizes of a kernel) and the two numbers that the compiler wants to be told."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what was launched, on what, and how."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    name: str
    target: str


@dataclass
class _State:
    target: str | None = None
    table: dict[tuple[str, str, int], list[tuple[int, Config]]] | None = None
    record: list[Launch] | None = field(default=None)
    observers: tuple[Callable[[str, Config], None], ...] = ()


_state = _State()


def configuration(kernel: str, size: int, x: Tensor) -> Config:
    """The launch configuration of a kernel for the chip and the dtype of x.

    ``size`` is what its tiles depend on (a head dim, a width): the row of the table with the smallest size that is not less
    counts, else its largest: kernels whose tiles must hold all of ``size`` take none beyond their largest row. Raises KeyError where
    the table has no row at all.
    """
    rows = (_state.table or _read_table())[kernel, target(x), x.element_size() * 8]
    return next((config for limit, config in rows if size <= limit), rows[-1][1])


def target(x: Tensor) -> str:
    """The chip of a tensor as the table names it: one of TARGETS, or ``interpreter``."""
    if _state.target:
        return _state.target
    return "interpreter" if x.device.type != "cuda" else _chip(x.device.index)


@cache
def _chip(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx950" if properties.gcnArchName.startswith("gfx95") else "gfx942"
    # Chips between those of the table take the tiles of the one with their shared memory: 8.6 and 8.9 have that of 12.0.
    major, minor = properties.major, properties.minor
    if major < 8:
        raise RuntimeError(
            f"{properties.name} has compute capability {major}.{minor}, and the kernels need 8.0 or more; "
            "use smalt.kernels.backend('torch')"
        )
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get((major, minor), "sm_100" if major in (10, 11) else "sm_120")


@cache
def _read_table() -> dict[tuple[str, str, int], list[tuple[int, Config]]]:
    return index_table([row for path in sorted(TABLES.glob("*.json")) for row in json.loads(path.read_text())])


def index_table(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[tuple[int, Config]]]:
    """The rows of a launch table by (kernel, target, bits), each a list of (size, Config) with rising size."""
    table: dict[tuple[str, str, int], list[tuple[int, Config]]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        config = Config(row["tiles"], row["num_warps"], row["num_stages"])
        table.setdefault((row["kernel"], row["target"], row["bits"]), []).append((row["size"], config))
    return table


def launch(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run ``kernel[grid](*args)`` on the device of the first argument.

    The tiles of ``config`` are constants too. Multiply and add are fused into one rounding: stated, since Triton's default
    differs between versions and results with it.
    """
    constants = {**config.tiles, **constants}
    if _state.record is not None:
        _state.record.append(Launch(kernel, grid, args, constants, config, name, target(args[0])))
        return
    if 0 in grid:
        return
    for observer in _state.observers:
        observer(name, config)
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        kernel[grid](*args, **constants, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


@contextmanager
def recording(target: str, table: list[dict[str, Any]] | None = None) -> Iterator[list[Launch]]:
    """Inside the block launches are appended to the list instead of run, configured for ``target`` (one of TARGETS).

    The launchers then take meta tensors. ``table``: rows that stand in for the committed launch table.
    """
    before = (_state.target, _state.table, _state.record)
    record: list[Launch] = []
    _state.target, _state.record, _state.table = target, record, index_table(table) if table else None
    try:
        yield record
    finally:
        _state.target, _state.table, _state.record = before


@contextmanager
def configured_for(target: str, table: list[dict[str, Any]] | None = None) -> Iterator[None]:
    """Inside the block launches run here, with the tiles of another target. ``table``: as for :func:`recording`."""
    before = (_state.target, _state.table)
    _state.target, _state.table = target, index_table(table) if table else None
    try:
        yield
    finally:
        _state.target, _state.table = before


@contextmanager
def observing(observer: Callable[[str, Config], None]) -> Iterator[None]:
    """Inside the block ``observer`` is told the name and the configuration of each launch before it runs."""
    before = _state.observers
    _state.observers = (*before, observer)
    try:
        yield
    finally:
        _state.observers = before


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as a matrix [rows, D] whose rows are contiguous each; a view where the strides allow one."""
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def unit_stride(x: Tensor) -> Tensor:
    """x, copied if its last dim does not lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()
