"""Correctness on the GPU, before anything is timed: no figure of a kernel that is wrong.

The rule of the tests: the error of a kernel in bf16 is at most twice that of plain torch in bf16, plus a floor, in relative RMS and in
maximum, outputs and gradients, both measured against float64; with uninitialised memory poisoned by NaN; and a second run gives
the same bits. It needs nothing but torch, so that it runs where the tests cannot; where hypothesis is installed these run too.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalt.kernels import backend
from smalt.kernels.adamw import AdamW
from smalt.kernels.attention import attention
from smalt.kernels.decode_attention import decode_attention
from smalt.kernels.gelu import geglu_packed, gelu
from smalt.kernels.layer_norm import layer_norm
from smalt.kernels.linear_cross_entropy import linear_cross_entropy
from smalt.kernels.linear_distillation import linear_distillation
from smalt.kernels.matmul import matmul
from smalt.kernels.policy_loss import PolicyLossOptions, policy_loss
from smalt.kernels.rms_norm import rms_norm
from smalt.kernels.rotary import rotary
from smalt.kernels.rotary_tables import rotary_table
from smalt.kernels.swiglu import swiglu, swiglu_packed

from .bench_cases import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, PATCHES, VISION_FFN, VISION_WIDTH, WIDTH, bounds

TESTS = Path(__file__).parents[2] / "tests" / "kernels"
TEST_SECONDS = 120
# What may be added to twice torch's own error: rounding of the fp32 sums inside, in units of the tensor.
FLOOR = {torch.float32: 1e-6, torch.float16: 5e-5, torch.bfloat16: 4e-4}


@dataclass(frozen=True)
class Check:
    """function of the tensors that ``inputs`` makes for a device; model: at sizes of the 3B model, too large for the interpreter."""

    name: str
    function: Callable[..., Any]
    inputs: Callable[[str], list[Tensor]]
    model: bool = False


# Inputs


def _bf16(*shapes: tuple[int, ...], scale: float = 1.0) -> Callable[[str], list[Tensor]]:
    return lambda device: [_random(shape, device, scale) for shape in shapes]


def _random(shape: tuple[int, ...], device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(device, torch.bfloat16)


def _columns(rows: int, width: int) -> Callable[[str], list[Tensor]]:
    """A slice of the columns of something wider, and a weight."""
    return lambda device: [_random((rows, 2 * width), device)[:, width // 2 : width // 2 + width], _random((width,), device)]


def _attention(
    name: str, lengths: list[int], H: int, K: int, D: int, causal: bool = True, image: int = 0, softcap: float | None = None,
    window: int | None = None, empty: int = 0, model: bool = False,
) -> Check:  # fmt: skip
    """empty: rows at the end that see nothing."""
    b = bounds(lengths, causal, image)
    start = b.start if window is None else [max(s, t - window + 1) for t, s in enumerate(b.start)]
    T = len(start) + empty
    low, high = (torch.tensor([*x, *[T] * empty], dtype=torch.int32) for x in (start, b.end))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = attention(q, k, v, low.to(q.device), high.to(q.device), softcap=softcap, return_lse=True)
        return tuple(found)

    return Check(f"attention {name}", function, _bf16((T, H, D), (T, K, D), (T, K, D)), model)


def _head(T: int, V: int, D: int, model: bool = False, **options: Any) -> Check:
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    labels[:: 3 if T > 3 else 1] = -100

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels.to(hidden.device), **options)

    told = ", ".join(f"{k} {v}" for k, v in options.items())
    return Check(f"linear_cross_entropy {T} x {V} x {D} {told}".strip(), function, _bf16((T, D), (V, D), scale=0.5), model)


def _distillation(T: int, V: int, D: int, E: int, scale: float) -> Callable[[str], list[Tensor]]:
    return _bf16((T, D), (V, D), (T, E), (V, E), scale=scale)


def _rotary(T: int, H: int, D: int, R: int, norm: bool, model: bool = False) -> Check:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        table = rotary_table(torch.arange(T, device=x.device), R, 1e4, torch.float32)
        return rotary(x, *table, weight if norm else None, EPS)

    return Check(f"rotary {H} heads of {D}, {R} turn{', norm' * norm}", function, _bf16((T, H, D), (D,)), model)


def _policy(loss: str, T: int, **changes: Any) -> Check:
    options = PolicyLossOptions.of(loss, **changes)
    generator = torch.Generator().manual_seed(2)
    old, reference = (-torch.rand(T, generator=generator) for _ in range(2))
    advantage, weight = torch.randn(T, generator=generator), torch.rand(T, generator=generator) / T
    provenance = (torch.rand(T, generator=generator) < 0.2).to(torch.int32)

    def function(logprob: Tensor) -> tuple[Tensor, ...]:
        o, a, w, p, r = (x.to(logprob.device) for x in (old, advantage, weight, provenance, reference))
        value, metrics = policy_loss(logprob, o, a, w, options, provenance=p, reference_logprob=r)
        return value, metrics.kl_old, metrics.ratio

    def inputs(device: str) -> list[Tensor]:
        return [(-torch.rand(T)).to(device, torch.float32)]

    return Check(f"policy_loss {loss}", function, inputs)


def _adamw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Check:
    """Three steps. float64 keeps every bit of the state; in bf16 torch rounds by the same random bits."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        parameters = [torch.nn.Parameter(x.detach().clone()) for x in tensors[::2]]
        optimizer = AdamW(parameters, lr=0.01, weight_decay=0.1, state_dtype=dtype)
        for _ in range(3):
            for p, g in zip(parameters, tensors[1::2], strict=True):
                p.grad = g.detach().clone()
            optimizer.step(clip_scale=torch.full((), 0.5, device=tensors[0].device))
        return tuple(p.detach() for p in parameters)

    def inputs(device: str) -> list[Tensor]:
        return [_random(shape, device).to(dtype) for shape in shapes for _ in range(2)]

    return Check(f"adamw {str(dtype).removeprefix('torch.')}", function, inputs)


def _decode(lengths: list[int], H: int, K: int, D: int, model: bool = False) -> Check:
    B, L = len(lengths), max(lengths)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not differentiable by intent.
        return decode_attention(q.detach(), k.detach(), v.detach(), torch.tensor(lengths, device=q.device))

    return Check(f"decode_attention {B} x {L}", function, _bf16((B, H, D), (B, L, K, D), (B, L, K, D)), model)


def _row_checks(rows: int, width: int, model: bool) -> list[Check]:
    shape = f"{rows} x {width}"
    row = (rows, width)
    return [
        Check(f"rms_norm {shape}", lambda x, w: rms_norm(x, w, EPS), _columns(rows, width), model),
        Check(f"rms_norm {shape}, before", lambda x, w: rms_norm(x, w, EPS, cast="before"), _columns(rows, width), model),
        Check(f"rms_norm {shape}, residual", lambda x, r, w: rms_norm(x, w, EPS, r), _bf16(row, row, (width,)), model),
        Check(f"layer_norm {shape}", lambda x, w, b: layer_norm(x, w, b, EPS), _bf16(row, (width,), (width,)), model),
        Check(f"swiglu {shape}", swiglu, _bf16(row, row), model),
        Check(f"swiglu_packed {shape}", swiglu_packed, _bf16((rows, 2 * width)), model),
        Check(f"gelu {shape}", gelu, _bf16(row), model),
        Check(f"geglu_packed {shape}", geglu_packed, _bf16((rows, 2 * width)), model),
    ]


CHECKS: tuple[Check, ...] = (
    *_row_checks(37, 96, False),
    *_row_checks(2050, WIDTH, True),
    *_row_checks(PATCHES, VISION_WIDTH, True),
    Check(f"gelu {PATCHES} x {VISION_FFN}", gelu, _bf16((PATCHES, VISION_FFN)), True),
    _attention("causal documents", [1, 33, 90], 4, 2, 64, empty=5),
    *(_attention(f"head dim {D}", [70, 1, 60], 2, 1, D) for D in (72, 80, 96, 128, 256)),
    _attention("bidirectional tiles", [50, 50], 2, 2, 72, causal=False),
    _attention("images, window, softcap", [90, 40], 4, 1, 64, image=20, softcap=20.0),
    _attention("window", [130], 2, 2, 64, window=17),
    _attention("of the model", [1024, 1, 700, 375], NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, image=196, model=True),
    _attention("of the vision tower", [PATCHES] * 3, 16, 16, 72, causal=False, model=True),
    _decode([1, 40, 77], 4, 2, 64),
    _decode([2048, 1500, 1], NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, model=True),
    _rotary(23, 3, 64, 64, False),
    _rotary(23, 3, 72, 36, True),
    _rotary(1030, NUM_HEADS, HEAD_DIM, HEAD_DIM, False, model=True),
    _rotary(1030, NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, True, model=True),
    _head(37, 130, 48),
    _head(37, 130, 48, temperature=0.7, softcap=10.0, z_loss=1e-3),
    _head(1, 77, 32),
    _head(1030, 20_011, WIDTH, model=True),
    Check("linear_distillation", linear_distillation, _distillation(21, 130, 48, 64, 0.5)),
    Check("linear_distillation of the model", linear_distillation, _distillation(300, 9001, WIDTH, 4096, 0.05), True),
    _policy("grpo", 301),
    _policy("dapo", 301),
    _policy("cispo", 301, clip_high=0.2, clip_low=0.2),
    _policy("grpo", 301, dual_clip=3.0),
    _adamw(torch.float32, (37, 5), (3,), (130,)),
    _adamw(torch.bfloat16, (37, 5), (3,), (130,)),
    Check("matmul", matmul, _bf16((37, 48), (29, 48))),
    Check("matmul of the model", matmul, _bf16((1030, WIDTH), (4096, WIDTH), scale=0.2), True),
)  # fmt: skip


# The rule


def outputs_and_gradients(function: Callable, inputs: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor | None]]:
    """On a backend: outputs, and the gradients of all inputs for fixed random upstream gradients that every precision can hold."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend(name):
        outputs = function(*leaves)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        wanted = [y for y in outputs if y.requires_grad]
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in wanted]
        gradients = torch.autograd.grad(wanted, leaves, upstream, allow_unused=True) if wanted else ()
    return [y.detach() for y in outputs], list(gradients)


def errors(got: Tensor, want: Tensor, smallest: float) -> tuple[float, float]:
    """Relative RMS error and relative largest error, against at least ``smallest``; infinities must agree, NaN is infinitely wrong."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if got.shape != want.shape or got.isnan().any() or not torch.equal(got[~finite], want[~finite]):
        return float("inf"), float("inf")
    difference, want = (got - want)[finite], want[finite]
    if not difference.numel() or not difference.any():
        return 0.0, 0.0
    rms, largest = want.square().mean().sqrt().item(), want.abs().max().item()
    return (
        difference.square().mean().sqrt().item() / max(rms, smallest, 1e-30),
        difference.abs().max().item() / max(largest, smallest, 1e-30),
    )


def run_check(check: Check, device: str) -> list[str]:
    """What is wrong with a kernel; nothing, if all is well."""
    torch.manual_seed(0)
    inputs = check.inputs(device)
    floor = max(FLOOR[x.dtype] for x in inputs)
    kernel = outputs_and_gradients(check.function, inputs, "triton")
    again = outputs_and_gradients(check.function, inputs, "triton")
    plain = outputs_and_gradients(check.function, inputs, "reference")
    truth = outputs_and_gradients(check.function, [x.double() for x in inputs], "reference")
    wrong = []
    for part, kind in enumerate(("output", "gradient")):
        got, repeated, base, want = (list(found[part]) for found in (kernel, again, plain, truth))
        # Some true gradients are zero, or almost: against themselves they would be noise.
        known = [w for w in want if w is not None] if kind == "gradient" else []
        numel = sum(w.numel() for w in known)
        smallest = 1e-3 * (sum(w.square().sum().item() for w in known) / numel) ** 0.5 if numel else 0.0
        for i, (g, r, b, w) in enumerate(zip(got, repeated, base, want, strict=True)):
            if g is None or w is None or b is None or r is None:
                wrong += [] if g is None and w is None else [f"{kind} {i} is there for one only"]
                continue
            if g.dtype != b.dtype:
                wrong.append(f"{kind} {i} is {g.dtype}, not {b.dtype}")
            if not torch.equal(g.nan_to_num(), r.nan_to_num()):
                wrong.append(f"{kind} {i} changes its bits from run to run")
            for measure, mine, torchs in zip(("RMS", "largest"), errors(g, w, smallest), errors(b, w, smallest), strict=True):
                if not mine <= 2 * torchs + floor:
                    wrong.append(f"{kind} {i}: {measure} error {mine:.3g}, torch's {torchs:.3g}, floor {floor:.3g}")
    return wrong


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, uninitialised memory is NaN: a row that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch's own operations, in the references
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run_gate(device: str, checks: tuple[Check, ...] = CHECKS, say: Callable[[str], None] = print) -> list[str]:
    """Run every check; returns what is wrong, with the name of the check. A kernel that raises is wrong."""
    wrong = []
    with poisoned():
        for check in checks:
            try:
                found = run_check(check, device)
            except Exception as error:
                text = str(error).strip()
                found = [f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"]
            wrong += [f"{check.name}: {problem}" for problem in found]
            for problem in found:
                say(f"RED {check.name}: {problem}")
    return wrong


def run_tests(folder: Path = TESTS, seconds: float = TEST_SECONDS) -> tuple[str, list[str]]:
    """Run the quick tests of the kernels where they can run: what came of it, and what is wrong.

    In a process of their own, up to the first red one. Tests that are not through when the time is up count as neither.
    """
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: {' and '.join(missing)} not installed", []
    if not folder.is_dir():
        return "not run: Smalt is installed without them", []
    command = [sys.executable, "-m", "pytest", str(folder), "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=folder.parents[1], capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"none red in {seconds:.0f} s, then stopped", []
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [done.stderr.strip() or "no output"]
    if done.returncode:
        return "red", [f"pytest: {line}" for line in lines if line.startswith(("FAILED", "ERROR"))] or [f"pytest: {lines[-1]}"]
    return lines[-1], []
