"""Launch configurations from a small model of each chip; ``smalt kernels configure`` writes the launch tables from it.

For every kernel, chip, width of dtype and size the model lists tiles, warps and stages, drops what does not fit (shared memory,
registers by an estimate of the values that live at once) and ranks the rest by the time that it predicts. Row kernels are as fast
as their bytes: the bandwidth that their loads in flight can draw (Little's law), times the share of the last wave. Matrix kernels
take, for one step of their inner loop, the longest of the matrix unit, the other instructions and the loads from L2, plus what
cannot overlap: with n groups of warps on a multiprocessor, 1/n of the shorter ones. The best that the compiler confirms, without
spills, is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from smalt.kernels.launch import cdiv, next_power_of_two

from .chips import CHIPS, Chip

TOKENS = 8192  # the problem that a configuration is chosen for: rows of a pack
FRAME = 40  # registers of a thread that hold addresses, counters and bounds
PRODUCT_FRAME = 96  # and, in a kernel with products, operands on their way
MAX_REGISTERS = 255  # what a thread can have; estimates a little above are left to the compiler to judge
MAX_UNROLLED = 4096  # multiply-adds of a thread in one step
LATENCY = 900  # cycles from a load to its value, under load
PROGRAM = 600  # cycles to start a program and to end it
STEP = 150  # cycles of a step of an inner loop that go to barriers, counters and the start of the matrix unit


@dataclass(frozen=True)
class Machine:
    """What a chip's data sheet says: multiprocessors, clock in GHz, memory in bytes a second, bytes of L2 a cycle and
    multiprocessor, registers of 32 bits and threads of a multiprocessor."""

    processors: int
    clock: float
    memory: float
    l2: float
    registers: int = 65536
    threads: int = 2048

    @property
    def memory_rate(self) -> float:
        """Bytes a cycle and multiprocessor from memory."""
        return self.memory / (self.clock * 1e9 * self.processors)


# A100 80GB, H100 SXM, B200, RTX PRO 6000 Blackwell; MI300X and MI355X (of CDNA's 512 registers a lane, 2048 lanes a CU).
MACHINES = {
    "sm_80": Machine(108, 1.41, 2.04e12, 48),
    "sm_90": Machine(132, 1.75, 3.35e12, 48),
    "sm_100": Machine(148, 1.85, 8.0e12, 64),
    "sm_120": Machine(188, 2.4, 1.79e12, 40, threads=1536),
    "gfx942": Machine(304, 2.1, 5.3e12, 64, registers=131072),
    "gfx950": Machine(256, 2.4, 8.0e12, 64, registers=131072),
}
AMD_MATRIX = {"gfx942": 2048, "gfx950": 4096}  # dense bf16 FLOP a cycle and CU: 1307 TFLOP/s and 2.5 PFLOP/s


@dataclass(frozen=True)
class Guess:
    """A configuration and the seconds that the model gives it."""

    tiles: dict[str, int]
    num_warps: int
    num_stages: int
    seconds: float


@dataclass(frozen=True)
class RowKernel:
    """A kernel that holds whole rows, or pieces of rows: its time is its bytes.

    sizes: of its rows in the table; tile: elements of a program's tile by (tiles, size); live: fp32 values an element that live at
    once; loads, stores: tensors read and written an element of the tile; programs: of TOKENS rows; choices: values of its tiles;
    extra: bytes besides, such as partial sums; least: elements that a thread must have.
    """

    name: str
    sizes: tuple[int, ...]
    choices: dict[str, tuple[int, ...]]
    tile: Callable[[dict[str, int], int], int]
    programs: Callable[[dict[str, int], int], int]
    steps: Callable[[dict[str, int], int], int]
    live: float
    loads: float
    stores: float
    extra: Callable[[dict[str, int], int], float] = lambda tiles, size: 0.0
    bits: tuple[int, ...] = (16, 32)
    least: int = 1

    def guesses(self, target: str, bits: int, size: int) -> Iterator[Guess]:
        machine, chip, itemsize = MACHINES[target], CHIPS[target], bits // 8
        for values in itertools.product(*self.choices.values()):
            tiles = dict(zip(self.choices, values, strict=True))
            if "ROWS" in tiles and tiles["ROWS"] % tiles["BLOCK_T"]:
                continue
            elements = self.tile(tiles, size)
            for warps in (1, 2, 4, 8, 16):
                threads = warps * chip.warp_size
                each = elements / threads
                registers = FRAME + self.live * each
                if threads > 1024 or registers > min(160, machine.registers / threads) or each < self.least:
                    continue
                resident = _resident(machine, chip, threads, registers, 0)
                programs, steps = self.programs(tiles, size), self.steps(tiles, size)
                moved = elements * (self.loads + self.stores) * itemsize
                # A load of less than 16 bytes a thread draws less; so does a multiprocessor with too few bytes in flight.
                vector = min(1.0, each * itemsize / 16) ** 0.25
                flight = resident * elements * self.loads * itemsize
                rate = machine.memory_rate * min(1.0, flight / (LATENCY * machine.memory_rate)) * vector
                waves = math.ceil(programs / (resident * machine.processors))
                cycles = waves * (resident * steps * moved / rate + PROGRAM)
                seconds = cycles / (machine.clock * 1e9) + self.extra(tiles, size) / machine.memory
                yield Guess(tiles, warps, 1, seconds)


@dataclass(frozen=True)
class MatrixKernel:
    """A kernel with products in its inner loop. All numbers are of one step of that loop, by (tiles, size).

    rows: the tile whose members the warps share out; flop: of the products; work: other instructions, in elements (one lane each);
    loads: elements fetched; held: elements that stay in shared memory; live: fp32 values of a program that live at once; programs
    and steps: of TOKENS rows; sums: the loop sums over the members of the other tile; cut: fp32 products read their operands again,
    piece by piece, where a pipeline would only hold more of them in registers.
    """

    name: str
    sizes: tuple[int, ...]
    choices: dict[str, tuple[int, ...]]
    rows: str
    flop: Callable[[dict[str, int], int], float]
    work: Callable[[dict[str, int], int], float]
    loads: Callable[[dict[str, int], int], float]
    held: Callable[[dict[str, int], int], float]
    live: Callable[[dict[str, int], int], float]
    programs: Callable[[dict[str, int], int], float]
    steps: Callable[[dict[str, int], int], float]
    sums: bool = False
    cut: bool = False
    bits: tuple[int, ...] = (16, 32)

    def guesses(self, target: str, bits: int, size: int) -> Iterator[Guess]:
        machine, chip, itemsize = MACHINES[target], CHIPS[target], bits // 8
        # fp32 is multiplied exactly, by the ordinary units.
        matrix = (chip.matrix or AMD_MATRIX[target]) if bits == 16 else 2 * chip.fma
        pieces = self.cut and bits == 32
        # A warp multiplies 16 rows at least; with fewer, warps share rows, which a sum over a row should not do if the outputs of
        # 16 rows fit into a warp's registers.
        least = 4 if pieces else 16 if self.sums and size <= 128 else 8
        for values in itertools.product(*self.choices.values()):
            tiles = dict(zip(self.choices, values, strict=True))
            for warps, stages in itertools.product((2, 4, 8), (1,) if pieces else (1, 2, 3, 4)):
                if tiles[self.rows] < least * warps:
                    continue
                threads = warps * chip.warp_size
                registers = PRODUCT_FRAME + self.live(tiles, size) / threads * (1 if bits == 16 else 2.5)
                # AMD's matrix units read what stays from registers, and its pipeline keeps one stage there too.
                kept, buffers = (0.0, max(1, stages - 1)) if chip.backend == "hip" else (self.held(tiles, size), stages)
                shared = itemsize * (kept + buffers * self.loads(tiles, size))
                # Exact products of fp32 are unrolled, one multiply-add an instruction.
                unrolled = bits == 32 and self.flop(tiles, size) / 2 / threads > MAX_UNROLLED
                if unrolled or registers > 1.2 * MAX_REGISTERS or shared > chip.shared:
                    continue
                resident = _resident(machine, chip, threads, registers, shared)
                work = self.work(tiles, size) / 128
                product = self.flop(tiles, size) / matrix
                fetch = self.loads(tiles, size) * itemsize / machine.l2
                longest = max(product, work, fetch)
                exposed = max(0.0, LATENCY - (stages - 1) * longest)  # of the loads' latency, what no earlier step hides
                groups = resident * max(1, warps // 4)
                step = (STEP + exposed) / resident + longest + (product + work + fetch - longest) / groups
                programs = self.programs(tiles, size)
                waves = math.ceil(programs / (resident * machine.processors))
                cycles = waves * resident * (self.steps(tiles, size) * step + PROGRAM)
                yield Guess(tiles, warps, stages, cycles / (machine.clock * 1e9))


def _resident(machine: Machine, chip: Chip, threads: int, registers: float, shared: float) -> int:
    """Programs that a multiprocessor holds at once."""
    by_registers = machine.registers // int(threads * min(MAX_REGISTERS, registers))
    by_shared = int(chip.shared // shared) if shared else 32
    return max(1, min(by_registers, by_shared, machine.threads // threads, 16))


def sizes(kernel: RowKernel | MatrixKernel, bits: int) -> tuple[int, ...]:
    """Of the rows of a kernel; in fp32, which few train in, only the two largest."""
    return kernel.sizes if bits == 16 else kernel.sizes[-2:]


def ranked(kernel: RowKernel | MatrixKernel, target: str, bits: int, size: int) -> list[Guess]:
    """All configurations that fit, the fastest by the model first. Of equals that with fewer warps, stages and smaller tiles."""
    guesses = kernel.guesses(target, bits, size)
    return sorted(guesses, key=lambda g: (round(g.seconds, 7), g.num_warps, g.num_stages, *g.tiles.values()))


def row(kernel: RowKernel | MatrixKernel, target: str, bits: int, size: int, guess: Guess) -> dict[str, Any]:
    """A row of a launch table."""
    return {
        "kernel": kernel.name, "target": target, "bits": bits, "size": size,
        "tiles": guess.tiles, "num_warps": guess.num_warps, "num_stages": guess.num_stages,
    }  # fmt: skip


# The kernels


def _power_rows(name: str, live: float, loads: float, rows: tuple[int, ...], partials: int = 0) -> RowKernel:
    """A kernel over whole rows, ROWS of them to a program and BLOCK_T at a time, that leaves so many partial rows of fp32.

    ``rows`` are such that weights in fp32 and partial rows stay under 5% of the bytes that a 16-bit program must move.
    """
    return RowKernel(
        name, NORM_SIZES, {"ROWS": rows, "BLOCK_T": (1, 2, 4, 8, 16, 32)}, lambda t, size: t["BLOCK_T"] * next_power_of_two(size),
        lambda t, size: cdiv(TOKENS, t["ROWS"]), lambda t, size: t["ROWS"] // t["BLOCK_T"], live, loads, 1,
        lambda t, size: cdiv(TOKENS, t["ROWS"]) * size * 8 * partials,
    )  # fmt: skip


def _attention(name: str, products: int, accumulators: str, choices: dict[str, tuple[int, ...]]) -> MatrixKernel:
    """M rows by N keys; the loop walks keys, or, for dk and dv, rows. Heads: 20. Half of the pairs are seen (causal)."""
    own, other = ("BLOCK_N", "BLOCK_M") if accumulators == "keys" else ("BLOCK_M", "BLOCK_N")
    held = 1 if "forward" in name else 2
    outputs = 2 if accumulators == "keys" else 1
    # Of each pair: forward 6.5 instructions, backward 8, 6 more with a soft cap; forward also one to rescale each output.
    pair = (6.5 if held == 1 else 8) + (6 if name.endswith("capped") else 0)
    work = lambda t, D: t["BLOCK_M"] * t["BLOCK_N"] * pair + (t["BLOCK_M"] * _padded(D) if held == 1 else 0)  # noqa: E731
    return MatrixKernel(
        name, HEAD_DIMS, choices, own,
        flop=lambda t, D: 2 * products * t["BLOCK_M"] * t["BLOCK_N"] * _padded(D),
        work=work,
        loads=lambda t, D: 2 * t[other] * _padded(D),
        held=lambda t, D: held * t[own] * _padded(D),
        live=lambda t, D: outputs * t[own] * _padded(D) + t["BLOCK_M"] * t["BLOCK_N"] * (1.25 if held == 1 else 2),
        programs=lambda t, D: 20 * cdiv(TOKENS, t[own]),
        steps=lambda t, D: TOKENS / t[other] / 2,
        sums=held == 1,
        cut=True,
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    """What the two parts of a head dim hold."""
    first = 1 << (head_dim.bit_length() - 1)
    return first if head_dim == first else first + next_power_of_two(max(16, head_dim - first))


def _product(name: str, rows: str, columns: str, depth: str, choices: dict[str, tuple[int, ...]], shape: tuple[int, int, int],
             operands: int = 1) -> MatrixKernel:  # fmt: skip
    """A matrix product of shape (rows, columns, depth), or several (operands) at once."""
    return MatrixKernel(
        name, (_SIZE,), choices, rows,
        flop=lambda t, _: 2 * operands * t[rows] * t[columns] * t[depth],
        work=lambda t, _: 0.0,
        loads=lambda t, _: operands * (t[rows] + t[columns]) * t[depth],
        held=lambda t, _: 0.0,
        live=lambda t, _: operands * t[rows] * t[columns] * 1.25,
        programs=lambda t, _: cdiv(shape[0], t[rows]) * cdiv(shape[1], t.get("SLICE", t[columns])),
        steps=lambda t, _: shape[2] / t[depth] * (t.get("SLICE", t[columns]) / t[columns]),
    )  # fmt: skip


_TILES: dict[str, tuple[int, ...]] = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}
_KEY_TILES: dict[str, tuple[int, ...]] = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (32, 64, 128)}
_HEAD = {"GROUP": (8,), "BLOCK_T": (64, 128), "BLOCK_V": (64, 128, 256), "BLOCK_K": (32, 64)}
_SLICED = {"SLICE": (4096,), **_HEAD}
_SIZE = 8192  # of rows for all sizes: the tiles do not depend on it
_WORDS, _WIDTH, _HEADS = 100_096, 2560, 20


def _flat(name: str, tile: str, choices: tuple[int, ...], count: int, live: float, loads: float, stores: float,
          bits: tuple[int, ...] = (16, 32), size: int = 1, least: int = 1) -> RowKernel:  # fmt: skip
    """A kernel over ``count`` numbers in a row, ``least`` or more to a thread."""
    return RowKernel(
        name, (size,), {tile: choices}, lambda t, s: t[tile], lambda t, s: cdiv(count, t[tile]), lambda t, s: 1,
        live, loads, stores, bits=bits, least=least,
    )  # fmt: skip


def _gated(name: str, live: float, loads: float, stores: float) -> RowKernel:
    return RowKernel(
        name, (_SIZE,), {"BLOCK_T": (1, 2, 4), "BLOCK_F": (256, 512, 1024, 2048)}, lambda t, s: t["BLOCK_T"] * t["BLOCK_F"],
        lambda t, s: cdiv(TOKENS, t["BLOCK_T"]) * cdiv(8192, t["BLOCK_F"]), lambda t, s: 1, live, loads, stores,
    )  # fmt: skip


def _heads(name: str, live: float, loads: float, rows: tuple[int, ...] | None) -> RowKernel:
    """A kernel over heads of 128, BLOCK_H at a time, of BLOCK_T tokens; with ``rows``, a program takes ROWS tokens."""
    first = {} if rows is None else {"ROWS": rows}
    return RowKernel(
        name, (1024, 8192), {**first, "BLOCK_T": (1, 2, 4, 8), "BLOCK_H": (4, 8)},
        lambda t, s: t["BLOCK_T"] * min(t["BLOCK_H"] * 128, s),
        lambda t, s: cdiv(TOKENS, t.get("ROWS", t["BLOCK_T"])),
        lambda t, s: t.get("ROWS", t["BLOCK_T"]) // t["BLOCK_T"] * cdiv(s, t["BLOCK_H"] * 128), live, loads, 1,
        lambda t, s: cdiv(TOKENS, t["ROWS"]) * 128 * 8 if rows else 0.0,
    )  # fmt: skip


HEAD_DIMS = (64, 80, 128, 256)
NORM_SIZES = (128, 2048, 4096, 8192)
KERNELS: tuple[RowKernel | MatrixKernel, ...] = (
    _power_rows("rms_norm_forward", 2.5, 1, (24, 32, 48, 64)),
    _power_rows("rms_norm_backward", 4.5, 2, (48, 64), partials=1),
    _power_rows("layer_norm_forward", 2.5, 1, (48, 64)),
    _power_rows("layer_norm_backward", 5.5, 2, (72, 80), partials=2),
    RowKernel(
        "column_sum", (_SIZE,), {"BLOCK_P": (8, 16, 32), "BLOCK_D": (32, 64, 128)},
        lambda t, s: t["BLOCK_P"] * t["BLOCK_D"], lambda t, s: cdiv(_WIDTH, t["BLOCK_D"]), lambda t, s: cdiv(128, t["BLOCK_P"]),
        live=2, loads=1, stores=0, bits=(32,),
    ),
    _heads("rotary", 3, 1, None),
    _heads("rotary_norm_backward", 6, 2, (16, 32, 64)),
    _gated("gated_forward", 3, 2, 1),
    _gated("gated_backward", 5, 3, 2),
    _attention("attention_forward", 2, "rows", _TILES),
    _attention("attention_dq", 3, "rows", _TILES),
    _attention("attention_dkv", 4, "keys", _KEY_TILES),
    _attention("attention_forward_capped", 2, "rows", _TILES),
    _attention("attention_dq_capped", 3, "rows", _TILES),
    _attention("attention_dkv_capped", 4, "keys", _KEY_TILES),
    MatrixKernel(  # 16 rows, of which a group of heads fills some; bound by the cache that is read
        "decode_attention", (80, 128, 256), {"BLOCK_N": (16, 32, 64, 128), "SLICE": (256, 512)}, "BLOCK_N",
        flop=lambda t, D: 4 * 16 * t["BLOCK_N"] * _padded(D),
        work=lambda t, D: 16 * (6.5 * t["BLOCK_N"] + _padded(D)),
        loads=lambda t, D: 2 * t["BLOCK_N"] * _padded(D),
        held=lambda t, D: 16 * _padded(D),
        live=lambda t, D: 16 * (2 * _padded(D) + 2 * t["BLOCK_N"]),
        programs=lambda t, D: 64 * 4 * cdiv(4096, t["SLICE"]),
        steps=lambda t, D: t["SLICE"] / t["BLOCK_N"],
        cut=True,
    ),
    RowKernel(
        "decode_attention_merge", (80, 128, 256), {}, lambda t, s: s, lambda t, s: 64 * _HEADS, lambda t, s: 16,
        live=3, loads=1, stores=0,
    ),
    _product("matmul", "BLOCK_T", "BLOCK_N", "BLOCK_K",
             {"BLOCK_T": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64)}, (TOKENS, 8192, _WIDTH)),
    _product("matmul_weight", "BLOCK_N", "BLOCK_K", "BLOCK_T",
             {"BLOCK_N": (64, 128), "BLOCK_K": (64, 128, 256), "BLOCK_T": (32, 64)}, (8192, _WIDTH, TOKENS)),
    RowKernel(
        "matmul_bias", (_SIZE,), {"ROWS": (64,), "BLOCK_T": (8, 16, 32), "BLOCK_N": (64, 128)},
        lambda t, s: t["BLOCK_T"] * t["BLOCK_N"], lambda t, s: cdiv(TOKENS, t["ROWS"]) * cdiv(8192, t["BLOCK_N"]),
        lambda t, s: t["ROWS"] // t["BLOCK_T"], live=2, loads=1, stores=0,
    ),
    _product("linear_statistics_forward", "BLOCK_T", "BLOCK_V", "BLOCK_K", _SLICED, (TOKENS, _WORDS, _WIDTH)),
    _flat("linear_statistics_merge", "BLOCK_T", (32, 64, 128, 256), TOKENS, 8, 100, 1, size=_SIZE),
    _product("linear_statistics_backward", "BLOCK_T", "BLOCK_V", "BLOCK_K", _HEAD, (TOKENS, 4096, _WIDTH)),
    _product("linear_distillation_forward", "BLOCK_T", "BLOCK_V", "BLOCK_K", _SLICED, (TOKENS, _WORDS, _WIDTH), operands=2),
    _flat("linear_distillation_merge", "BLOCK_T", (32, 64, 128, 256), TOKENS, 8, 100, 1, size=_SIZE),
    _product("linear_distillation_backward", "BLOCK_T", "BLOCK_V", "BLOCK_K", _HEAD, (TOKENS, 4096, _WIDTH), operands=2),
    _flat("policy_loss", "BLOCK", (256, 512, 1024, 2048), 4 * TOKENS, 12, 7, 1),
    _flat("policy_loss_sums", "BLOCK_P", (16, 32, 64), 16 * 128, 3, 16, 0, bits=(32,)),
    _flat("sequence_log_ratio", "BLOCK", (256, 512, 1024, 2048), 4 * TOKENS, 5, 3, 0),
    _flat("adamw", "BLOCK", (1024, 2048, 4096), 1 << 28, 6, 4, 3, least=8),
)  # fmt: skip
