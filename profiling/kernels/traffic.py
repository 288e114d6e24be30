"""Counts the bytes that Triton kernels move to and from global memory, in Triton's interpreter.

A load or a store counts for the lanes that its mask leaves in, whether or not a cache would have served it. Two questions are put:

- Row kernels: bytes moved / least, where the least is each input once and each output once. A program takes a fixed number
  of rows, so the bytes are affine in the number of rows at its multiples: they are counted at three, the third must lie on the
  line through the other two, and the line gives what 8192 rows move with the tiles of a GPU.
- Products (attention, the head, matmul): bytes moved are what the closed formula in the kernel's file says, at each shape.

A kernel joins by one function: the entries of ``ROW_OPERATIONS`` and ``FORMULAS`` below.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smalt.kernels.adamw import Hyperparameters, Member, Table, launch_step
from smalt.kernels.head import chunk_of_words
from smalt.kernels.launch import INTERPRET, TARGETS, Config, cdiv, configuration, configured_for, observing
from smalt.kernels.policy_loss_kernels import launch_policy_loss

# Of most operations the package exports a function of the module's name, so that only this finds the modules.
attention, attention_kernels, gated, layer_norm, linear_distillation, linear_statistics_kernels, matmul, rms_norm, rotary = (
    import_module(f"smalt.kernels.{name}")
    for name in (
        "attention",
        "attention_kernels",
        "gated",
        "layer_norm",
        "linear_distillation",
        "linear_statistics_kernels",
        "matmul",
        "rms_norm",
        "rotary",
    )
)

ROWS = 8192
LIMIT = 1.05  # of a row kernel: bytes moved / least
HEAD_DIM = 128


@dataclass
class Traffic:
    """Bytes loaded and stored, and the configuration, of each kernel by the name of its launches."""

    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    configs: dict[str, Config] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.loads.total() + self.stores.total()


@contextmanager
def counting() -> Iterator[Traffic]:
    """Inside the block every launch adds to the yielded counts. An atomic operation counts as a load and a store.

    Raises RuntimeError where the kernels do not run in the interpreter.
    """
    if not INTERPRET:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic, current = Traffic(), ""

    def observe(name: str, config: Config) -> None:
        nonlocal current
        current, traffic.configs[name] = name, config

    def count(kinds: Sequence[Counter[str]], pointers: Any, mask: Any, itemsize: int) -> None:
        lanes = pointers.data.size if mask is None else np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
        for kind in kinds:
            kind[current] += int(lanes) * itemsize

    load, store, update, swap = (
        getattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")
    )

    def counted_load(pointers, mask, *rest):
        value = load(pointers, mask, *rest)
        count([traffic.loads], pointers, mask, value.data.itemsize)
        return value

    def counted_store(pointers, value, mask, *rest):
        count([traffic.stores], pointers, mask, value.data.itemsize)
        return store(pointers, value, mask, *rest)

    def counted_update(operation, pointers, value, mask, *rest):
        count([traffic.loads, traffic.stores], pointers, mask, value.data.itemsize)
        return update(operation, pointers, value, mask, *rest)

    def counted_swap(pointers, compared, value, *rest):
        count([traffic.loads, traffic.stores], pointers, None, value.data.itemsize)
        return swap(pointers, compared, value, *rest)

    wrapped = {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_update,
        "create_atomic_cas": counted_swap,
    }
    before = {name: value for name, value in vars(builder).items() if name in wrapped}
    vars(builder).update(wrapped)
    try:
        with observing(observe):
            yield traffic
    finally:
        for name in wrapped:
            del vars(builder)[name]
        vars(builder).update(before)


Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class RowOperation:
    """run(rows, width, dtype) runs the kernels of one operation and returns its inputs and its outputs.

    kernel: a launch of it, by which it is looked for in a launch table; width: of a row, in the 3B model.
    """

    name: str
    kernel: str
    run: Callable[[int, int, torch.dtype], tuple[Tensors, Tensors]]
    width: int = 2560


@dataclass(frozen=True)
class RowTraffic:
    """Bytes that an operation moves over ``rows`` rows, and the least that it could."""

    name: str
    target: str
    dtype: str
    rows: int
    moved: int
    least: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def row_traffic(
    operation: RowOperation, width: int, dtype: torch.dtype, rows: int | None = None, target: str = "interpreter"
) -> RowTraffic:
    """The traffic of an operation under the launch configuration in force (``target`` only names it).

    rows: when not given, the first multiple from 8192 on of what a program takes. Raises ValueError where ``rows`` is no multiple of
    that, or where the bytes are not affine in the rows.
    """

    def measure(n: int) -> tuple[int, int, int]:
        with counting() as traffic:
            inputs, outputs = operation.run(n, width, dtype)
        least = sum(t.numel() * t.element_size() for t in (*inputs, *outputs) if t is not None)
        return traffic.total, least, max(_rows_of_a_program(c.tiles) for c in traffic.configs.values())

    step = measure(1)[2]
    rows = cdiv(ROWS, step) * step if rows is None else rows
    if rows % step:
        raise ValueError(f"{operation.name}: {rows} rows are no multiple of the {step} that a program takes")
    (moved, least, _), second, third = (measure(i * step) for i in (1, 2, 3))
    slope, least_slope = second[0] - moved, second[1] - least
    if (third[0] - second[0], third[1] - second[1]) != (slope, least_slope):
        raise ValueError(f"{operation.name}: {moved}, {second[0]} and {third[0]} bytes at 1, 2 and 3 times {step} rows: not affine")
    further = rows // step - 1
    return RowTraffic(
        operation.name, target, str(dtype).removeprefix("torch."), rows, moved + further * slope, least + further * least_slope
    )


def _rows_of_a_program(tiles: dict[str, int]) -> int:
    return next((tiles[name] for name in ("ROWS", "BLOCK_T", "BLOCK") if name in tiles), 1)


def traffic_report(
    targets: Sequence[str] = TARGETS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    table: list[dict[str, Any]] | None = None,
    width: int | None = None,
) -> list[RowTraffic]:
    """The traffic of every row operation at 8192 rows or a few more, for each target that the launch table has it for.

    table: rows that stand in for the committed launch table; width: of all operations, in place of that of the 3B model.
    """
    report = []
    for target in targets:
        with configured_for(target, table):
            for operation in ROW_OPERATIONS:
                for dtype in dtypes:
                    if _is_configured(operation.kernel, dtype):
                        report.append(row_traffic(operation, width or operation.width, dtype, target=target))
    return report


def _is_configured(kernel: str, dtype: torch.dtype) -> bool:
    try:
        configuration(kernel, 1, torch.empty(0, dtype=dtype))
    except KeyError:
        return False
    return True


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _rms_norm(residual: bool, back: bool) -> Callable[[int, int, torch.dtype], tuple[Tensors, Tensors]]:
    def run(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        x, weight, inverse = _randn(rows, width, dtype=dtype), _randn(width), torch.ones(rows)
        added = _randn(rows, width, dtype=dtype) if residual else None
        if back:
            dy = _randn(rows, width, dtype=dtype)
            return (dy, added, x, weight, inverse), rms_norm.launch_backward(dy, added, x, weight, inverse, False)
        return (x, added, weight), rms_norm.launch_forward(x, added, weight, 1e-6, False)

    return run


def _layer_norm(back: bool) -> Callable[[int, int, torch.dtype], tuple[Tensors, Tensors]]:
    def run(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        x, weight, bias = _randn(rows, width, dtype=dtype), _randn(width), _randn(width)
        if back:
            dy, mean, inverse = _randn(rows, width, dtype=dtype), torch.zeros(rows), torch.ones(rows)
            return (dy, x, weight, mean, inverse), layer_norm.launch_backward(dy, x, weight, mean, inverse, torch.float32)
        return (x, weight, bias), layer_norm.launch_forward(x, weight, bias, 1e-6)

    return run


def _rotary(norm: bool, back: bool) -> Callable[[int, int, torch.dtype], tuple[Tensors, Tensors]]:
    def run(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        head_dim = min(width, HEAD_DIM)
        x, weight = _randn(rows, width // head_dim, head_dim, dtype=dtype), _randn(head_dim) if norm else None
        cos, sin = _randn(rows, head_dim // 2), _randn(rows, head_dim // 2)
        if norm and back:
            dy = torch.ones_like(x)
            return (dy, x, cos, sin, weight), rotary.launch_norm_backward(dy, x, cos, sin, weight, 1e-6)
        return (x, cos, sin, weight), (rotary.launch_rotate(x, cos, sin, weight, 1e-6, back),)

    return run


def _gated(activation: str, gated_by: bool, back: bool) -> Callable[[int, int, torch.dtype], tuple[Tensors, Tensors]]:
    def run(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        gate, dy = _randn(rows, width, dtype=dtype), _randn(rows, width, dtype=dtype)
        up = _randn(rows, width, dtype=dtype) if gated_by else None
        if back:
            dgate, dup = torch.empty_like(gate), torch.empty_like(gate) if gated_by else None
            gated.launch_backward(dy, gate, up, activation, dgate, dup)
            return (dy, gate, up), (dgate, dup)
        return (gate, up), (gated.launch_forward(gate, up, activation),)

    return run


def _policy_loss(rows: int, _: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    logprob, old, advantage, weight, reference, rollout = (_randn(rows, dtype=dtype) for _ in range(6))
    provenance = torch.zeros(rows, dtype=torch.int8)
    inputs = (logprob, old, advantage, weight, provenance, reference, rollout)
    return inputs, launch_policy_loss(*inputs, None, None, False, 3, [0.2, 0.2, 0.0, 0.1, 2.0])


def _adamw(rows: int, _: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    weight, gradient = _randn(rows, dtype=dtype), _randn(rows, dtype=dtype)
    first, second = torch.zeros(rows), torch.zeros(rows)
    member = Member(weight, gradient, first, second, None, 0, 0)
    launch_step([member], torch.ones(()), Hyperparameters(1e-3, (0.9, 0.99), 1e-8, 0.1, 0, 1), Table())
    return (weight, gradient, first, second), (weight, first, second)


ROW_OPERATIONS = (
    RowOperation("rms_norm", "rms_norm_forward", _rms_norm(False, False)),
    RowOperation("rms_norm with residual", "rms_norm_forward", _rms_norm(True, False)),
    RowOperation("rms_norm backward", "rms_norm_backward", _rms_norm(False, True)),
    RowOperation("rms_norm with residual, backward", "rms_norm_backward", _rms_norm(True, True)),
    RowOperation("layer_norm", "layer_norm_forward", _layer_norm(False), 1152),
    RowOperation("layer_norm backward", "layer_norm_backward", _layer_norm(True), 1152),
    RowOperation("rotary", "rotary", _rotary(False, False)),
    RowOperation("rotary backward", "rotary", _rotary(False, True)),
    RowOperation("rotary with norm", "rotary", _rotary(True, False)),
    RowOperation("rotary with norm, backward", "rotary_norm_backward", _rotary(True, True)),
    RowOperation("swiglu", "gated_forward", _gated("silu", True, False), 6912),
    RowOperation("swiglu backward", "gated_backward", _gated("silu", True, True), 6912),
    RowOperation("gelu", "gated_forward", _gated("gelu", False, False), 4304),
    RowOperation("gelu backward", "gated_backward", _gated("gelu", False, True), 4304),
    RowOperation("policy_loss", "policy_loss", _policy_loss, 1),
    RowOperation("adamw", "adamw", _adamw, 1),
)


@dataclass(frozen=True)
class Formula:
    """run(*shape, dtype) runs the kernels of one operation and returns the bytes that its closed formula gives."""

    name: str
    run: Callable[..., int]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class FormulaTraffic:
    """Bytes counted, and what the formula says."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    counted: int
    formula: int


def formula_report(dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> list[FormulaTraffic]:
    """Count and formula of every product at three shapes, under the launch configuration in force."""
    report = []
    for formula in FORMULAS:
        for shape in formula.shapes:
            for dtype in dtypes:
                with counting() as traffic:
                    expected = formula.run(*shape, dtype)
                report.append(FormulaTraffic(formula.name, shape, str(dtype).removeprefix("torch."), traffic.total, expected))
    return report


def _matmul(T: int, N: int, K: int, dtype: torch.dtype) -> int:
    x, weight, bias = _randn(T, K, dtype=dtype), _randn(N, K, dtype=dtype), _randn(N, dtype=dtype)
    matmul.launch_matmul(x, weight, bias)
    return matmul.forward_traffic(T, N, K, dtype.itemsize, configuration("matmul", N, x).tiles, True)


def _head(nll_only: bool, back: bool) -> Callable[..., int]:
    def run(T: int, V: int, D: int, dtype: torch.dtype) -> int:
        hidden, weight, labels = _randn(T, D, dtype=dtype), _randn(V, D, dtype=dtype), torch.arange(T) % V
        if back:
            g, lse = torch.ones(T), torch.full((T,), 99.0)
            g_mean = None if nll_only else g
            linear_statistics_kernels.launch_backward(g, g, g_mean, hidden, weight, labels, lse, g, 0, 1.0, None, nll_only, True, True)
            tiles = configuration("linear_statistics_backward", D, hidden).tiles
            chunk = chunk_of_words(V, dtype.itemsize, tiles["BLOCK_V"])
            return linear_statistics_kernels.backward_traffic(T, V, D, dtype.itemsize, tiles, chunk, not nll_only)
        linear_statistics_kernels.launch_forward(hidden, weight, labels, 0, 1.0, None, nll_only)
        tiles = configuration("linear_statistics_forward", D, hidden).tiles
        return linear_statistics_kernels.forward_traffic(T, V, D, dtype.itemsize, tiles, nll_only)

    return run


def _distillation(back: bool) -> Callable[..., int]:
    def run(T: int, V: int, D: int, dtype: torch.dtype) -> int:
        E = 2 * D
        tensors = tuple(_randn(*shape, dtype=dtype) for shape in ((T, D), (V, D), (T, E), (V, E)))
        if back:
            linear_distillation.launch_backward(torch.ones(T), torch.full((2, T), 99.0), *tensors, 1.0, None, None, True, True)
            tiles = configuration("linear_distillation_backward", D, tensors[0]).tiles
            chunk = chunk_of_words(V, dtype.itemsize, tiles["BLOCK_V"])
            return linear_distillation.backward_traffic(T, V, D, E, dtype.itemsize, tiles, chunk)
        linear_distillation.launch_forward(*tensors, 1.0, None, None)
        tiles = configuration("linear_distillation_forward", D, tensors[0]).tiles
        return linear_distillation.forward_traffic(T, V, D, E, dtype.itemsize, tiles)

    return run


def _attention(back: bool) -> Callable[..., int]:
    def run(T: int, H: int, K: int, D: int, dtype: torch.dtype) -> int:
        q, k, rows = _randn(T, H, D, dtype=dtype), _randn(T, K, D, dtype=dtype), torch.arange(T, dtype=torch.int32)
        bounds = attention.intervals(0 * rows, rows + 1, T)
        tiles = [configuration(f"attention_{name}", D, q).tiles for name in ("forward", "dq", "dkv")]
        if not back:
            attention_kernels.launch_forward(q, k, k, bounds.rows, 1.0, 0.0)
            return attention_kernels.forward_traffic(T, H, D, dtype.itemsize, tiles[0])
        lse = torch.full((H, T), 99.0)
        attention_kernels.launch_backward(q, k, k, *bounds, q, lse, q, lse, 1.0, 0.0)
        return attention_kernels.backward_traffic(T, H, K, D, dtype.itemsize, *tiles[1:])

    return run


_CAUSAL = ((32, 2, 1, 16), (64, 2, 2, 24), (96, 4, 2, 16))  # T, H, K, D
_SHAPES = ((16, 64, 32), (37, 101, 48), (5, 130, 20))
FORMULAS = (
    Formula("attention", _attention(False), _CAUSAL),
    Formula("attention backward", _attention(True), _CAUSAL),
    Formula("matmul", _matmul, _SHAPES),
    Formula("linear_cross_entropy", _head(True, False), _SHAPES),
    Formula("linear_cross_entropy backward", _head(True, True), _SHAPES),
    Formula("linear_statistics", _head(False, False), _SHAPES),
    Formula("linear_statistics backward", _head(False, True), _SHAPES),
    Formula("linear_distillation", _distillation(False), _SHAPES),
    Formula("linear_distillation backward", _distillation(True), _SHAPES),
)


BEGIN, END = "<!-- smalt kernels traffic: begin -->", "<!-- smalt kernels traffic: end -->"


def traffic_section(rows: Sequence[RowTraffic], formulas: Sequence[FormulaTraffic]) -> str:
    """The two reports as Markdown: of row kernels the ratio for each target, of products the count beside the formula."""
    targets = list(dict.fromkeys(r.target for r in rows))
    ratios = {(r.name, r.target): f"{r.ratio:.3f}" for r in rows}
    lines = ["Bytes moved / least, row kernels, from 8192 rows on, bf16:", ""]
    lines += ["| kernel | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(ratios[name, t] for t in targets) + " |" for name in dict.fromkeys(r.name for r in rows)]
    lines += ["", "Products, at small shapes: bytes counted and what the formula in the kernel's file says, bf16:", ""]
    lines += ["| kernel | shape | counted | formula |", "|---|---|---|---|"]
    lines += [f"| {f.name} | {f.shape} | {f.counted:,} | {f.formula:,} |" for f in formulas]
    return "\n".join(lines)


def main(write: bool) -> int:
    """``smalt kernels traffic``: print both reports, write them into docs/kernels.md on request; 1 where a limit is broken."""
    from .bench_results import DOCS, insert_section

    rows, formulas = traffic_report(), formula_report([torch.bfloat16])
    section = traffic_section(rows, formulas)
    print(section)
    if write:
        DOCS.write_text(insert_section(DOCS.read_text(), section, BEGIN, END))
    wrong = [f"{r.name} on {r.target}: {r.ratio:.3f} of at most {LIMIT}" for r in rows if r.ratio > LIMIT]
    wrong += [f"{f.name} {f.shape}: {f.counted} bytes, the formula says {f.formula}" for f in formulas if f.counted != f.formula]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main("--write" in sys.argv[1:]))
