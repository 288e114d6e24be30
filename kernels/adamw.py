"""AdamW with decoupled decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2), all parameters of a group in one launch.

    g = clip_scale * gradient,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

Everything is formed in fp32. Weights in bf16 either have an fp32 master beside them, which is what is updated, or are rounded
stochastically, as is a state kept in bf16: x goes to the upper of its two neighbours with a probability equal to its distance from
the lower one, so that steps smaller than half a unit are not lost (Zamirai et al. 2020, arXiv 2010.06192). The random bits are
Philox 4x32-10 (Salmon et al. 2011) of (seed, step, number of the parameter, index of the element in the parameter), so that the
result depends neither on how tensors are cut into blocks nor on the order of the blocks.

The tensors are found through a table of their addresses, one row a tensor, so that the number of tensors costs no launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import current_backend
from .launch import cdiv, configuration, constexpr, convert, jit, launch, tl

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STATE_DTYPES = (torch.float32, torch.bfloat16)
# Columns of the table: five addresses (weight, gradient, exp_avg, exp_avg_sq, master), then elements, first block, number of the
# parameter, index of the first element in the whole parameter.
COLUMNS = constexpr(9)
LANES = 8  # elements that share a call of Philox: 16 random bits each
_ALIGNMENT = constexpr(16)  # bytes; what the widest load of a GPU asks for


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one step, of one group. ``step`` counts from 1."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    seed: int
    step: int

    @property
    def scalars(self) -> tuple[float, ...]:
        """lr / (1 - b1^t), 1 - lr decay, 1 - b1, b2, 1 - b2, 1 / sqrt(1 - b2^t), eps: formed in double, where 1 - b is still exact."""
        b1, b2 = self.betas
        rate, correction = self.lr / (1 - b1**self.step), 1 / math.sqrt(1 - b2**self.step)
        return rate, 1 - self.lr * self.weight_decay, 1 - b1, b2, 1 - b2, correction, self.eps


class Member(NamedTuple):
    """One parameter of a launch: its tensors on this rank, its number, and where its first element stands in the whole parameter."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    number: int
    first_index: int


def adamw_reference(member: Member, clip_scale: Tensor | None, h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: new weight (or master), exp_avg and exp_avg_sq, in fp32 (fp64 for fp64 weights), not yet rounded."""
    wide = torch.promote_types(member.weight.dtype, torch.float32)
    rate, decay, b1_rest, b2, b2_rest, correction, eps = h.scalars
    g = member.gradient.to(wide)
    if clip_scale is not None:
        g = g * clip_scale.to(wide)
    w = (member.weight if member.master is None else member.master).to(wide)
    m = member.exp_avg.to(wide).lerp(g, b1_rest)
    v = member.exp_avg_sq.to(wide).mul(b2).addcmul(g, g, value=b2_rest)
    return (w * decay).addcdiv(m, (v.sqrt() * correction).add_(eps), value=-rate), m, v


def torch_step(members: Sequence[Member], clip_scale: Tensor | None, h: Hyperparameters) -> None:
    """What :func:`launch_step` does, in plain torch, any float dtype and any strides."""
    for member in members:
        w, m, v = adamw_reference(member, clip_scale, h)
        _store(member.weight if member.master is None else member.master, w, member, 0, h)
        _store(member.exp_avg, m, member, 1, h)
        _store(member.exp_avg_sq, v, member, 2, h)
        if member.master is not None:
            member.weight.copy_(w)


def _store(target: Tensor, x: Tensor, member: Member, stream: int, h: Hyperparameters) -> None:
    if target.dtype == torch.bfloat16:
        index = member.first_index + torch.arange(x.numel(), device=x.device)
        x = round_stochastically(x, random_bits(index, member.number, stream, h.seed, h.step).view(x.shape))
    target.copy_(x)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 x in bf16: up where the cut-off 16 bits and ``bits`` (0 .. 65535) carry over. NaN stays NaN, infinity infinity."""
    raw = x.view(torch.int32)
    rounded = torch.where(x.isnan(), raw | 0x400000, raw + bits.to(torch.int32))
    return (rounded & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def random_bits(index: Tensor, number: int, stream: int, seed: int, step: int) -> Tensor:
    """16 random bits for each element, as int64: lane ``index % 8`` of Philox at the counter (index // 8, stream, number, step)."""
    group, lane = index // LANES, index % LANES
    high = (group >> 32) | (stream << 28)
    words = torch.stack(philox(group & 0xFFFFFFFF, high, number, step, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    word = words.gather(0, (lane // 2)[None]).squeeze(0)
    return (word >> (16 * (lane % 2))) & 0xFFFF


def philox(c0: Tensor, c1: Tensor, c2: int, c3: int, k0: int, k1: int) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of 32 bits for each counter, held in int64."""
    low = 0xFFFFFFFF
    x0, x1, x2, x3 = c0, c1, torch.full_like(c0, c2), torch.full_like(c0, c3)
    for _ in range(10):
        # int64 wraps modulo 2^64, which leaves the bits of the product as they are.
        p0, p2 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = ((p2 >> 32) & low) ^ x1 ^ k0, p2 & low, ((p0 >> 32) & low) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0, x1, x2, x3


@jit
def _read(address, offset, inside, DTYPE: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), _ALIGNMENT)
        return tl.load(pointer + offset).to(tl.float32)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offset, mask=inside, other=0.0).to(tl.float32)


@jit
def _write(address, offset, inside, x, DTYPE: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        tl.store(tl.multiple_of(address.to(tl.pointer_type(DTYPE)), _ALIGNMENT) + offset, x)
    else:
        tl.store(address.to(tl.pointer_type(DTYPE)) + offset, x, mask=inside)


@jit
def _rounded(x, group, number, step, seed, STREAM: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """x in DTYPE; stochastically where that is bf16. group: of the block's first element."""
    if DTYPE == tl.bfloat16:
        counter = group + tl.arange(0, BLOCK // 8)
        high = (counter >> 32).to(tl.int32) | (STREAM << 28)
        zero = tl.zeros([BLOCK // 8], tl.int32)
        r0, r1, r2, r3 = tl.philox(seed, counter.to(tl.int32), high, zero + number, zero + step)
        # The last dim of a join is the lowest bit of the lane: (r0, r1, r2, r3), each its low and then its high half.
        words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
        bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK])
        raw = x.to(tl.uint32, bitcast=True)
        raw = tl.where(x == x, raw + bits, raw | 0x400000)
        x = (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x


@jit
def _update(
    row, start, inside, clip, rate, decay, beta1_rest, beta2, beta2_rest, correction, eps, seed, step,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    offset = start + tl.arange(0, BLOCK)
    weight, gradient, exp_avg, exp_avg_sq = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    number, group = tl.load(row + 7).to(tl.int32), (tl.load(row + 8) + start) >> 3
    g = _read(gradient, offset, inside, GRADIENT, FAST) * clip
    m = _read(exp_avg, offset, inside, STATE, FAST)
    v = _read(exp_avg_sq, offset, inside, STATE, FAST)
    w = _read(tl.load(row + 4), offset, inside, tl.float32, FAST) if MASTER else _read(weight, offset, inside, WEIGHT, FAST)
    m += (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    w = w * decay - rate * (m / (tl.sqrt(v) * correction + eps))
    if MASTER:
        _write(tl.load(row + 4), offset, inside, w, tl.float32, FAST)
        _write(weight, offset, inside, convert(w, WEIGHT), WEIGHT, FAST)
    else:
        _write(weight, offset, inside, _rounded(w, group, number, step, seed, 0, BLOCK, WEIGHT), WEIGHT, FAST)
    _write(exp_avg, offset, inside, _rounded(m, group, number, step, seed, 1, BLOCK, STATE), STATE, FAST)
    _write(exp_avg_sq, offset, inside, _rounded(v, group, number, step, seed, 2, BLOCK, STATE), STATE, FAST)


# With a multiple of eight elements a thread bf16 is moved in 16 bytes, and a thread makes its own bits.
@jit(varying=("seed", "step"))
def _kernel(
    table, owner, clip_scale, rate, decay, beta1_rest, beta2, beta2_rest, correction, eps, seed, step,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr,
):  # fmt: skip
    row = table + tl.load(owner + tl.program_id(0)).to(tl.int64) * COLUMNS
    size, first_index = tl.load(row + 5), tl.load(row + 8)
    # Blocks begin at multiples of BLOCK of the whole parameter; of a shard the first one may begin before it.
    start = (tl.program_id(0) - tl.load(row + 6)) * BLOCK - first_index % BLOCK
    inside = (start + tl.arange(0, BLOCK) >= 0) & (start + tl.arange(0, BLOCK) < size)
    addresses = tl.load(row) | tl.load(row + 1) | tl.load(row + 2) | tl.load(row + 3) | tl.load(row + 4)
    clip = tl.load(clip_scale)
    if (start >= 0) & (start + BLOCK <= size) & (start % 8 == 0) & (addresses % _ALIGNMENT == 0):
        _update(row, tl.multiple_of(start, 8), inside, clip, rate, decay, beta1_rest, beta2, beta2_rest, correction, eps, seed, step,
                BLOCK, WEIGHT, GRADIENT, STATE, MASTER, True)  # fmt: skip
    else:
        _update(row, start, inside, clip, rate, decay, beta1_rest, beta2, beta2_rest, correction, eps, seed, step,
                BLOCK, WEIGHT, GRADIENT, STATE, MASTER, False)  # fmt: skip


class Table:
    """Where the tensors of one launch are, on their device; built again only when a tensor has moved, or blocks have another size."""

    def __init__(self) -> None:
        self.made_for: tuple[int, torch.device] | None = None
        self.rows: list[tuple[int, ...]] = []
        self.blocks = 0
        self.table = self.owner = torch.empty(0)

    def update(self, members: Sequence[Member], block: int) -> None:
        """After it ``table`` is int64 [P, 9], and ``owner`` int32 [blocks] names the row of each block."""
        rows, counts, blocks = [], [], 0
        for m in members:
            addresses = [0 if t is None else t.data_ptr() for t in m[:5]]
            rows.append((*addresses, m.weight.numel(), blocks, m.number, m.first_index))
            counts.append(cdiv(m.first_index % block + m.weight.numel(), block))
            blocks += counts[-1]
        device = members[0].weight.device
        # The rows do not tell how many blocks the last tensor has, and owner depends on it.
        other = self.made_for != (block, device)
        if rows == self.rows and not other:
            return
        if other or [r[5:] for r in rows] != [r[5:] for r in self.rows]:
            owner = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
            self.owner, self.blocks = _send(owner, device), blocks
        self.rows, self.table = rows, _send(torch.tensor(rows, dtype=torch.int64), device)
        self.made_for = block, device


def _send(x: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the copy waits for nothing, and torch keeps the memory until it is done.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def launch_step(members: Sequence[Member], clip_scale: Tensor, h: Hyperparameters, table: Table) -> None:
    """One step of members whose tensors are contiguous and alike in dtype. clip_scale: fp32, 0-dimensional, on their device."""
    weight, gradient, exp_avg, _, master = members[0][:5]
    config = configuration("adamw", 1, weight)
    table.update(members, config.tiles["BLOCK"])
    launch(
        "adamw", _kernel, (table.blocks,), table.table, table.owner, clip_scale, *h.scalars, h.seed, h.step, config=config,
        WEIGHT=_TRITON[weight.dtype], GRADIENT=_TRITON[gradient.dtype], STATE=_TRITON[exp_avg.dtype], MASTER=master is not None,
    )  # fmt: skip


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16} if tl else {}


def adamw_traffic(numel: int, weight: torch.dtype, gradient: torch.dtype, state: torch.dtype, master: bool) -> int:
    """Bytes that a step moves, which is the least it can: gradient in, state in and out, weight in and out (of a master: only out)."""
    weights = weight.itemsize + 8 if master else 2 * weight.itemsize
    return numel * (gradient.itemsize + 4 * state.itemsize + weights)


class AdamW(torch.optim.Optimizer):
    """AdamW as ``torch.optim.AdamW`` computes it, with the state and the weights in the precision asked for.

    lr, betas, eps, weight_decay: as in torch; floats, free to change from step to step. state_dtype: of exp_avg and exp_avg_sq,
    float32 or bfloat16 (of float64 weights the state is float64). master_weights: keep fp32 weights beside bf16 or fp16 ones in
    the state, made from the weight where the state has none; without them bf16 weights are rounded stochastically, from ``seed``.
    All of these may differ by group.

    The state of ``torch.optim.AdamW`` can be loaded: options that a loaded group does not name stay as they were.

    Parameters may be DTensors: each rank updates its own shard. ``first_index``, where set, is a function that gives the index of a
    shard's first element in the whole parameter (shards along dim 0), and makes the rounding the same for every number of ranks;
    ``number``, where set, gives a parameter's number, for ranks that do not hold the same parameters: it is its place here otherwise.
    Deterministic; on a GPU nothing waits for the host, nor the host for the GPU. Raises ValueError for values that make no sense.
    """

    first_index: Callable[[Tensor], int] | None = None
    number: Callable[[Tensor], int] | None = None

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, state_dtype: torch.dtype = torch.float32, master_weights: bool = False, seed: int = 0,
    ):  # fmt: skip
        self._tables: dict[Any, Table] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "state_dtype": state_dtype, "master_weights": master_weights, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        wrong = [f"{name} = {group[name]}" for name in ("lr", "eps", "weight_decay") if not group[name] >= 0]
        wrong += [f"betas = {group['betas']}"] * (not all(0 <= b < 1 for b in group["betas"]))
        wrong += [f"state_dtype = {group['state_dtype']}"] * (group["state_dtype"] not in STATE_DTYPES)
        for p in group["params"]:
            allowed = (*WEIGHT_DTYPES, torch.float16) if group["master_weights"] else WEIGHT_DTYPES
            wrong += [f"a parameter {tuple(p.shape)} of {p.dtype}"] * (p.dtype not in allowed)
        if wrong:
            self.param_groups.pop()
            raise ValueError(
                f"AdamW: {', '.join(wrong)}; expected lr, eps and weight_decay >= 0, 0 <= betas < 1, state_dtype float32 or bfloat16, "
                "and parameters of float32, float64 or bfloat16 (of float16 only with master_weights)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "first_index": self.first_index, "number": self.number}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])  # [] in a copy, or from a pickle: there the groups are our own
        super().__setstate__(state)
        self._tables = {}
        for group, old in zip(self.param_groups, before, strict=False):
            for name, value in old.items():
                if name in self.defaults:
                    group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps its dtype: torch would cast the state of bf16 weights to bf16.

        Takes the state of torch's AdamW. Raises ValueError for one that asks for ``amsgrad`` or ``maximize``.
        """
        for i, group in enumerate(state_dict["param_groups"]):
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"AdamW: group {i} of the state has {name} on, which this optimiser has not; turn it off there")
        super().load_state_dict(state_dict)
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for name, p in zip(names, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if torch.is_tensor(value) and key != "step":
                    self.state[p][key] = value.to(p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, clip_scale: Tensor | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient.

        clip_scale: 0-dimensional, on the device of the parameters; all gradients are multiplied by it first, for example by
        min(1, limit / norm). It is read on the device. Raises ValueError for one that is no such tensor, or a sparse gradient.
        """
        if clip_scale is not None and not (torch.is_tensor(clip_scale) and clip_scale.dim() == 0):
            what = tuple(clip_scale.shape) if torch.is_tensor(clip_scale) else repr(clip_scale)
            raise ValueError(f"AdamW: clip_scale is {what}; pass a tensor without dims on the device of the parameters")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for i, group in enumerate(self.param_groups):
            launches: dict[Any, list[Member]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    member, step = self._member(p, group, place if self.number is None else self.number(p))
                    dtypes = member.weight.dtype, member.gradient.dtype, member.exp_avg.dtype, member.master is not None
                    launches.setdefault((step, _implementation(member), *dtypes, member.weight.device), []).append(member)
                place += 1
            for j, ((step, implementation, *_), members) in enumerate(launches.items()):
                h = Hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["seed"], step)
                if implementation == "triton":
                    device = members[0].weight.device
                    scale = torch.ones((), device=device) if clip_scale is None else clip_scale.to(torch.float32)
                    launch_step(members, scale, h, self._tables.setdefault((i, j), Table()))
                else:
                    torch_step(members, clip_scale, h)
        return loss

    def _member(self, p: Tensor, group: dict[str, Any], number: int) -> tuple[Member, int]:
        """p's tensors on this rank, and the number of the step that is about to be taken, which is counted here."""
        if p.grad.is_sparse:  # type: ignore[union-attr]
            raise ValueError(f"AdamW: the gradient of parameter {number} {tuple(p.shape)} is sparse")
        state = self.state[p]
        if not state:
            dtype = torch.float64 if p.dtype == torch.float64 else group["state_dtype"]
            # On the host, so that reading it waits for no GPU.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype), torch.zeros_like(p, dtype=dtype)
        elif state["step"].device.type != "cpu":
            state["step"] = state["step"].cpu()
        # A state that was loaded may have none either.
        if group["master_weights"] and p.dtype in (torch.bfloat16, torch.float16) and "master" not in state:
            state["master"] = p.detach().to(torch.float32)
        state["step"] += 1
        first = 0 if self.first_index is None else self.first_index(p)
        tensors = [None if t is None else _local(t) for t in (p, p.grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"))]
        return Member(*tensors, number, first), int(state["step"])  # type: ignore[arg-type, call-arg]


def _local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; kernels know no process group, so that it is known by its method."""
    return x.to_local() if hasattr(x, "to_local") else x


def _implementation(member: Member) -> str:
    """``triton`` where the kernel runs; it walks through memory, so that all tensors must lie in it alike."""
    dense = all(t is None or t.is_contiguous() for t in member[:5])
    return "triton" if dense and current_backend(member.weight) in ("triton", "liger") else "torch"
