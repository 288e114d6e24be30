"""What ``smalt kernels check`` compiles: every operation at the shapes of the 3B model, forward and backward.

A case calls the launchers of an operation on meta tensors. To add an operation, write such functions and one entry in ``cases``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = 8192  # tokens of a pack; no tile depends on it
# model/config.py, bluelm_3b
WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 2560, 20, 4, 128, 8192, 100_096
SOFTCAP = 50.0  # Gemma 2's, of attention
VISION_WIDTH, VISION_HEADS, VISION_HEAD_DIM, VISION_FFN = 1152, 16, 72, 4304


@dataclass(frozen=True)
class Case:
    """One operation.

    kernels: names in the launch table whose ``size`` is that of the case; rows of theirs that ``sizes`` do not reach are compiled too.
    launches: functions of (size, dtype) that call launchers; each on its own, so that a missing configuration hides one only.
    dtypes: the first at all sizes, the others at the first size.
    """

    name: str
    kernels: tuple[str, ...]
    sizes: tuple[int, ...]
    launches: tuple[Callable[[int, torch.dtype], object], ...]
    dtypes: tuple[str, ...] = ("bf16", "fp32")


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _fp32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def _attention_inputs(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = (VISION_HEADS, VISION_HEADS) if head_dim == VISION_HEAD_DIM else (HEADS, KV_HEADS)
    return meta(ROWS, heads, head_dim, dtype=dtype), meta(ROWS, kv_heads, head_dim, dtype=dtype), meta(3, ROWS, dtype=torch.int32)


def _attention_forward(size: int, dtype: torch.dtype, softcap: float = 0.0) -> None:
    from smalt.kernels.attention_kernels import launch_forward

    q, kv, rows = _attention_inputs(size, dtype)
    launch_forward(q, kv, kv, rows, size**-0.5, softcap)


def _attention_backward(size: int, dtype: torch.dtype, softcap: float = 0.0) -> None:
    from smalt.kernels.attention_kernels import launch_backward

    q, kv, rows = _attention_inputs(size, dtype)
    lse = _fp32(q.shape[1], ROWS)
    launch_backward(q, kv, kv, rows, rows, q, lse, q, lse, size**-0.5, softcap)


def _decode_attention(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.decode_attention import launch_decode

    q, cache = meta(64, HEADS, size, dtype=dtype), meta(64, 4096, KV_HEADS, size, dtype=dtype)
    for softcap in (0.0, SOFTCAP):
        launch_decode(q, cache, cache, meta(64, dtype=torch.int32), size**-0.5, softcap)


def _rms_norm_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.rms_norm import launch_forward

    x, weight = meta(ROWS, size, dtype=dtype), meta(size, dtype=dtype)
    launch_forward(x, x, weight, 1e-6, False)
    launch_forward(x, None, weight, 1e-6, True)


def _rms_norm_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.rms_norm import launch_backward

    x, weight = meta(ROWS, size, dtype=dtype), meta(size, dtype=dtype)
    launch_backward(x, x, x, weight, _fp32(ROWS), False)
    launch_backward(x, None, x, weight, _fp32(ROWS), True)


def _layer_norm_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.layer_norm import launch_forward

    weight = meta(size, dtype=dtype)
    launch_forward(meta(ROWS, size, dtype=dtype), weight, weight, 1e-6)


def _layer_norm_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.layer_norm import launch_backward

    x = meta(ROWS, size, dtype=dtype)
    launch_backward(x, x, meta(size, dtype=dtype), _fp32(ROWS), _fp32(ROWS), dtype)


def _rotary_inputs(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, cosines (sines are like them) and the weight of a QK-norm."""
    head_dim = HEAD_DIM if size % HEAD_DIM == 0 else size
    return meta(ROWS, size // head_dim, head_dim, dtype=dtype), _fp32(ROWS, head_dim // 2), meta(head_dim, dtype=dtype)


def _rotary(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.rotary import launch_rotate

    x, cos, weight = _rotary_inputs(size, dtype)
    launch_rotate(x, cos, cos, None, 1e-6, False)
    launch_rotate(x, cos, cos, None, 1e-6, True)
    launch_rotate(x, cos, cos, weight, 1e-6, False)


def _rotary_norm_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.rotary import launch_norm_backward

    x, cos, weight = _rotary_inputs(size, dtype)
    launch_norm_backward(x, x, cos, cos, weight, 1e-6)


def _swiglu_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.gated import launch_forward

    packed = meta(ROWS, 2 * size, dtype=dtype)
    launch_forward(packed[:, :size], packed[:, size:], "silu")


def _swiglu_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.gated import launch_backward

    packed = meta(ROWS, 2 * size, dtype=dtype)
    gate, up = packed[:, :size], packed[:, size:]
    launch_backward(meta(ROWS, size, dtype=dtype), gate, up, "silu", gate, up)


def _gelu_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.gated import launch_forward

    x = meta(ROWS, size, dtype=dtype)
    launch_forward(x, None, "gelu")
    launch_forward(x, x, "gelu")


def _gelu_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.gated import launch_backward

    x = meta(ROWS, size, dtype=dtype)
    launch_backward(x, x, None, "gelu", x, None)
    launch_backward(x, x, x, "gelu", x, x)


def _head_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.linear_statistics_kernels import launch_forward

    hidden, weight, labels = meta(ROWS, size, dtype=dtype), meta(VOCABULARY, size, dtype=dtype), meta(ROWS, dtype=torch.int64)
    for nll_only in (True, False):
        launch_forward(hidden, weight, labels, 0, 1.0, None, nll_only)


def _head_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.linear_statistics_kernels import launch_backward

    hidden, weight, labels = meta(ROWS, size, dtype=dtype), meta(VOCABULARY, size, dtype=dtype), meta(ROWS, dtype=torch.int64)
    row = _fp32(ROWS)
    launch_backward(row, row, None, hidden, weight, labels, row, _fp32(0), 0, 1.0, None, True, True, True)
    launch_backward(row, row, row, hidden, weight, labels, row, row, 0, 1.0, None, False, True, True)


def _distillation_inputs(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, then of a teacher of its width."""
    hidden, weight = meta(ROWS, size, dtype=dtype), meta(VOCABULARY, size, dtype=dtype)
    return hidden, weight, hidden, weight


def _distillation_forward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.linear_distillation import launch_forward

    launch_forward(*_distillation_inputs(size, dtype), 1.0, None, None)


def _distillation_backward(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.linear_distillation import launch_backward

    launch_backward(_fp32(ROWS), _fp32(2, ROWS), *_distillation_inputs(size, dtype), 1.0, None, None, True, True)


def _policy_loss(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.policy_loss_kernels import launch_policy_loss

    x, index, sampled = meta(ROWS, dtype=dtype), meta(ROWS, dtype=torch.int64), meta(ROWS, dtype=torch.bool)
    numbers = [0.2, 0.28, 0.0, 1e-3, 2.0]
    launch_policy_loss(x, x, x, _fp32(ROWS), sampled, x, x, None, None, False, 3, numbers)
    launch_policy_loss(x, x, x, _fp32(ROWS), sampled, None, None, index, _fp32(64), True, 1, numbers)


def _sequence_log_ratio(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.policy_loss_kernels import launch_sequence_log_ratio

    x, sampled = meta(ROWS, dtype=dtype), meta(ROWS, dtype=torch.bool)
    launch_sequence_log_ratio(x, x, _fp32(ROWS), sampled, meta(ROWS, dtype=torch.int64), 64)


def _adamw(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.adamw import Hyperparameters, Member, Table, launch_step

    h, shape = Hyperparameters(1e-4, (0.9, 0.95), 1e-8, 0.1, 0, 100), (WIDTH, WIDTH)
    x = meta(*shape, dtype=dtype)
    with_fp32 = Member(x, x, _fp32(*shape), _fp32(*shape), None if dtype == torch.float32 else _fp32(*shape), 0, 0)
    for member in (with_fp32, Member(x, x, x, x, None, 0, 0)):
        launch_step([member], _fp32(), h, Table())


def _matmul(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.matmul import launch_matmul

    launch_matmul(meta(ROWS, WIDTH, dtype=dtype), meta(size, WIDTH, dtype=dtype), None)
    launch_matmul(meta(ROWS, size, dtype=dtype), meta(size, size, dtype=dtype).t(), None)  # the input's gradient


def _matmul_weight(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.matmul import launch_weight

    launch_weight(meta(ROWS, WIDTH, dtype=dtype), meta(ROWS, size, dtype=dtype))


def _matmul_bias(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.matmul import launch_bias

    launch_bias(meta(ROWS, size, dtype=dtype))


def _column_sum(size: int, dtype: torch.dtype) -> None:
    from smalt.kernels.column_sum import column_sum

    column_sum(_fp32(ROWS // 64, size), dtype)


CASES = (
    Case(
        "attention",
        ("attention_forward", "attention_dq", "attention_dkv"),
        (HEAD_DIM, VISION_HEAD_DIM),
        (_attention_forward, _attention_backward),
    ),
    Case(
        "attention_capped",
        ("attention_forward_capped", "attention_dq_capped", "attention_dkv_capped"),
        (HEAD_DIM,),
        (partial(_attention_forward, softcap=SOFTCAP), partial(_attention_backward, softcap=SOFTCAP)),
    ),
    Case("decode_attention", ("decode_attention", "decode_attention_merge"), (HEAD_DIM,), (_decode_attention,)),
    Case(
        "linear_cross_entropy",
        ("linear_statistics_forward", "linear_statistics_merge", "linear_statistics_backward"),
        (WIDTH,),
        (_head_forward, _head_backward),
    ),
    Case(
        "linear_distillation",
        ("linear_distillation_forward", "linear_distillation_merge", "linear_distillation_backward"),
        (WIDTH,),
        (_distillation_forward, _distillation_backward),
    ),
    Case("rms_norm", ("rms_norm_forward", "rms_norm_backward"), (WIDTH, HEAD_DIM), (_rms_norm_forward, _rms_norm_backward)),
    Case("layer_norm", ("layer_norm_forward", "layer_norm_backward"), (VISION_WIDTH,), (_layer_norm_forward, _layer_norm_backward)),
    Case(
        "rotary",
        ("rotary", "rotary_norm_backward"),
        (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM),
        (_rotary, _rotary_norm_backward),
    ),
    Case("swiglu", ("gated_forward", "gated_backward"), (FFN,), (_swiglu_forward, _swiglu_backward)),
    Case("gelu", (), (VISION_FFN,), (_gelu_forward, _gelu_backward)),
    Case(
        "policy_loss",
        ("policy_loss", "policy_loss_sums", "sequence_log_ratio"),
        (1,),
        (_policy_loss, _sequence_log_ratio),
        ("fp32", "bf16"),
    ),
    Case("adamw", ("adamw",), (1,), (_adamw,)),
    Case("matmul", ("matmul", "matmul_weight", "matmul_bias"), (WIDTH,), (_matmul, _matmul_weight, _matmul_bias)),
    Case("column_sum", ("column_sum",), (WIDTH, VISION_WIDTH), (_column_sum,)),
)
