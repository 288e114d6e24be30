"""The same operations in other libraries, to compile beside Smalt's: their own launchers are called, and what they launch is kept.

Nothing is copied or configured here: tiles and warps are those that the library chooses for the shapes and, where it asks, the chip.
A library that counts SMs to share out rows gets the answer that it gives itself without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from smalt.kernels.launch import Config, Launch

from .cases import (
    FFN,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    ROWS,
    VISION_FFN,
    VISION_HEAD_DIM,
    VISION_HEADS,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    meta,
)
from .chips import CHIPS

LIBRARIES = {"liger": "liger_kernel", "fla": "fla"}
# How Liger and flash-linear-attention call the chips, where they ask.
_LIGER_ARCH = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "sm_120": "blackwell_consumer"}
_FLA_SHARED = {"hopper": 227 * 1024, "ampere": 163 * 1024}


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[library]) is not None


def record_other(library: str, case: str, size: int, target: str, dtype: torch.dtype) -> list[Launch]:
    """What a library launches for an operation, named as the library names its kernels."""
    with _recording(target) as launches:
        OTHERS[library, case, size](target, dtype)
    return launches


@contextmanager
def _recording(target: str) -> Iterator[list[Launch]]:
    """Inside, Triton's launches are appended to the list instead of run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        constants = {k: v for k, v in given.items() if k in kernel.arg_names}
        config = Config({}, given.get("num_warps", 4), given.get("num_stages", 3 if CHIPS[target].backend == "cuda" else 2))
        launches.append(Launch(kernel, (), args, constants, config, kernel.fn.__name__, target))

    with patch.object(JITFunction, "run", run):
        yield launches


def _liger(module: str, target: str) -> Any:
    found: Any = importlib.import_module(f"liger_kernel.ops.{module}")
    if hasattr(found, "infer_device_arch"):
        found.infer_device_arch = lambda: _LIGER_ARCH.get(target, "")
    if hasattr(found, "is_hip"):
        found.is_hip = lambda: CHIPS[target].backend == "hip"
    return found


def _liger_rms_norm(target: str, dtype: torch.dtype) -> None:
    ops = _liger("rms_norm", target)
    x, weight = meta(ROWS, WIDTH, dtype=dtype), meta(WIDTH, dtype=dtype)
    _, _, inverse, block, num_warps, cast = ops.rms_norm_forward(x, weight, 1e-6, 0.0, "llama", None)
    ops.rms_norm_backward(x, x, weight, inverse, 0.0, cast, block, num_warps, False, None)


def _liger_layer_norm(target: str, dtype: torch.dtype) -> None:
    ops = _liger("layer_norm", target)
    x, weight = meta(ROWS, VISION_WIDTH, dtype=dtype), meta(VISION_WIDTH, dtype=dtype)
    _, _, mean, inverse, *_ = ops.layer_norm_forward(x, weight, weight, 1e-6)
    ops.layer_norm_backward(x, x, weight, weight, mean, inverse)


def _liger_rotary(target: str, dtype: torch.dtype) -> None:
    ops = _liger("rope", target)
    q, k = (meta(1, ROWS, n, HEAD_DIM, dtype=dtype).transpose(1, 2) for n in (HEADS, KV_HEADS))
    table = meta(1, ROWS, HEAD_DIM, dtype=dtype)
    ops.rope_forward(q, k, table, table)
    ops.rope_backward(q, k, table, table)


def _liger_gated(module: str, name: str, width: int) -> Callable[[str, torch.dtype], None]:
    def call(target: str, dtype: torch.dtype) -> None:
        ops = _liger(module, target)
        gate = meta(ROWS, width, dtype=dtype)
        getattr(ops, f"{name}_forward")(gate, gate)
        getattr(ops, f"{name}_backward")(gate, gate, gate)

    return call


def _liger_cross_entropy(target: str, dtype: torch.dtype) -> None:
    """The kernel that Liger runs over the logits of a chunk; the products before and after it are torch's."""
    ops = _liger("cross_entropy", target)
    logits = torch.zeros(2, VOCABULARY, dtype=dtype).requires_grad_()  # real ones: it counts the labels
    ops.cross_entropy_forward(logits, torch.zeros(2, dtype=torch.int64), None, -100, 0.0, 0.0, "mean", None, False)


def _fla_attention(num_heads: int, num_kv_heads: int, head_dim: int) -> Callable[[str, torch.dtype], None]:
    def call(target: str, dtype: torch.dtype) -> None:
        ops: Any = importlib.import_module("fla.ops.attn.parallel")
        ops.check_shared_mem = lambda arch="none", *_: CHIPS[target].shared >= _FLA_SHARED.get(arch, 0)

        def heads(n: int) -> Tensor:
            return meta(1, ROWS, n, head_dim, dtype=dtype)

        q, kv = heads(num_heads), heads(num_kv_heads)
        documents, chunks = meta(9, dtype=torch.int64), meta(ROWS // 128, 2, dtype=torch.int64)
        o, lse = ops.parallel_attn_fwd(q, kv, kv, None, None, head_dim**-0.5, None, documents, chunks)
        ops.parallel_attn_bwd(q, kv, kv, o, None, lse, q, None, head_dim**-0.5, None, 128, documents, chunks)

    return call


# By library, case and size, the last only to be shown.
OTHERS: dict[tuple[str, str, int], Callable[[str, torch.dtype], None]] = {
    ("fla", "attention", HEAD_DIM): _fla_attention(HEADS, KV_HEADS, HEAD_DIM),
    ("fla", "attention", VISION_HEAD_DIM): _fla_attention(VISION_HEADS, VISION_HEADS, VISION_HEAD_DIM),
    ("liger", "linear_cross_entropy", WIDTH): _liger_cross_entropy,
    ("liger", "rms_norm", WIDTH): _liger_rms_norm,
    ("liger", "layer_norm", VISION_WIDTH): _liger_layer_norm,
    ("liger", "rotary", HEADS * HEAD_DIM): _liger_rotary,
    ("liger", "swiglu", FFN): _liger_gated("swiglu", "swiglu", FFN),
    ("liger", "gelu", VISION_FFN): _liger_gated("geglu", "geglu", VISION_FFN),
}
