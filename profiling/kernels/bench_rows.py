"""The operations that are bound by memory: norms, rotary embedding, gated units, policy loss, optimiser, decoding.

Their work is the least number of bytes: each input read once, each output written once. Where a baseline moves more, its percentage
shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalt.kernels.adamw import AdamW, adamw_traffic
from smalt.kernels.decode_attention import decode_attention
from smalt.kernels.gelu import gelu
from smalt.kernels.layer_norm import layer_norm
from smalt.kernels.policy_loss import PolicyLossOptions, policy_loss, policy_loss_reference
from smalt.kernels.rms_norm import rms_norm
from smalt.kernels.rotary import rotary
from smalt.kernels.rotary_tables import rotary_table
from smalt.kernels.swiglu import swiglu_packed

from .bench_cases import (
    EPS,
    FFN,
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    PACKS,
    PATCHES,
    TILES,
    VISION_FFN,
    VISION_WIDTH,
    VOCABULARY,
    WIDTH,
    Call,
    Contestant,
    Given,
    Operation,
    Shape,
    absent,
    apex,
    call,
    compile_static,
    compiled,
    eager,
    leaf,
    liger,
    require,
    require_apex,
    smalt,
)

NO_LIGER = absent("Liger", "has no such kernel")


def _text(width: int) -> tuple[Shape, ...]:
    return tuple(Shape(f"{name} x {width}", {"T": T, "D": width}) for name, T in PACKS.items())


def _vision(width: int) -> tuple[Shape, ...]:
    return tuple(Shape(f"{name} x {width}", {"T": n * PATCHES, "D": width}) for name, n in TILES.items())


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _moved(forward: float, backward: float) -> dict[str, float]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


# Norms


def _norm_inputs(shape: Shape, device: str, bias: bool = False, residual: bool = False) -> Given:
    T, D = shape["T"], shape["D"]
    rows = [leaf(T, D, device=device) for _ in range(1 + residual)]
    return {"args": (*rows, *(leaf(D, device=device) for _ in range(1 + bias)))}


def _norm_work(given: Given) -> dict[str, float]:
    x, *weights = given["args"]
    return _moved(2 * _nbytes(x) + _nbytes(*weights), 3 * _nbytes(x) + _nbytes(weights[0], *weights))


def _add_norm_work(given: Given) -> dict[str, float]:
    # In: x and residual; out: y and the sum. Backward in: the sum and both upstream gradients; out: one gradient for x and residual.
    x, _, weight = given["args"]
    return _moved(4 * _nbytes(x) + _nbytes(weight), 4 * _nbytes(x) + 2 * _nbytes(weight))


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


RMS_NORM = Operation(
    "rms_norm",
    "copy",
    _text(WIDTH),
    _norm_inputs,
    _norm_work,
    (
        smalt(lambda x, w: rms_norm(x, w, EPS)),
        eager(torch_rms_norm),
        compiled(torch_rms_norm),
        liger(lambda ops, x, w: ops.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "gemma", False)),
        apex(
            lambda m, x, w: m.fused_rms_norm_affine(x, w, w.shape, EPS),
            "apex.normalization.fused_layer_norm",
            "fused_layer_norm_cuda",
        ),
    ),
)
ADD_RMS_NORM = Operation(
    "rms_norm with residual",
    "copy",
    _text(WIDTH),
    lambda shape, device: _norm_inputs(shape, device, residual=True),
    _add_norm_work,
    (
        smalt(lambda x, r, w: rms_norm(x, w, EPS, r)),
        eager(torch_add_rms_norm),
        compiled(torch_add_rms_norm),
        liger(lambda ops, x, r, w: ops.LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "gemma", False)),
        absent("apex", "its norm adds no residual"),
    ),
)
LAYER_NORM = Operation(
    "layer_norm",
    "copy",
    _vision(VISION_WIDTH),
    lambda shape, device: _norm_inputs(shape, device, bias=True),
    _norm_work,
    (
        smalt(lambda x, w, b: layer_norm(x, w, b, EPS)),
        eager(torch_layer_norm),
        compiled(torch_layer_norm),
        liger(lambda ops, x, w, b: ops.LigerLayerNormFunction.apply(x, w, b, EPS)),
        apex(
            lambda m, x, w, b: m.fused_layer_norm_affine(x, w, b, w.shape, EPS),
            "apex.normalization.fused_layer_norm",
            "fused_layer_norm_cuda",
        ),
    ),
)


# Rotary embedding


def _rotary_inputs(shape: Shape, device: str, norm: bool = False) -> Given:
    T, H, K, D = (shape[k] for k in "THKD")
    q, k = leaf(T, H, D, device=device), leaf(T, K, D, device=device)
    table = rotary_table(torch.arange(T, device=device), D, 1e6, torch.float32)
    return {"args": (q, k, *((leaf(D, device=device), leaf(D, device=device)) if norm else ()), *table)}


def _rotary_work(given: Given) -> dict[str, float]:
    q, k, *weights, cos, sin = given["args"]
    heads, rest = _nbytes(q, k), _nbytes(cos, sin, *weights)
    return _moved(2 * heads + rest, (3 if weights else 2) * heads + rest + _nbytes(*weights))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(q, cos, sin), rotary(k, cos, sin)


def _norm_and_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(q, cos, sin, q_weight, EPS), rotary(k, cos, sin, k_weight, EPS)


def torch_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As models in plain torch write it."""
    cos, sin = (torch.cat([x, x], -1)[:, None] for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return turn(q), turn(k)


def torch_norm_and_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch_rotate(torch_rms_norm(q, q_weight), torch_rms_norm(k, k_weight), cos, sin)


def _liger_rotate(ops: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.cat([x, x], -1)[None] for x in (cos, sin))
    q, k = ops.LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


_HEADS = tuple(
    Shape(f"{n}, 20 + 4 heads of 128", {"T": T, "H": NUM_HEADS, "K": NUM_KV_HEADS, "D": HEAD_DIM}) for n, T in PACKS.items()
)
ROTARY = Operation(
    "rotary",
    "copy",
    _HEADS,
    _rotary_inputs,
    _rotary_work,
    (smalt(_rotate), eager(torch_rotate), compiled(torch_rotate), liger(_liger_rotate, spoils=True)),
)
NORM_ROTARY = Operation(
    "rotary with QK-norm",
    "copy",
    _HEADS,
    lambda shape, device: _rotary_inputs(shape, device, norm=True),
    _rotary_work,
    (smalt(_norm_and_rotate), eager(torch_norm_and_rotate), compiled(torch_norm_and_rotate), NO_LIGER),
)


# Gated units


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def torch_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


SWIGLU = Operation(
    "swiglu",
    "copy",
    tuple(Shape(f"{name} x 2 x {FFN}", {"T": T, "D": 2 * FFN}) for name, T in PACKS.items()),
    lambda shape, device: {"args": (leaf(shape["T"], shape["D"], device=device),)},
    lambda given: _moved(1.5 * _nbytes(*given["args"]), 2.5 * _nbytes(*given["args"])),
    (
        smalt(swiglu_packed),
        eager(torch_swiglu),
        compiled(torch_swiglu),
        liger(lambda ops, x: ops.LigerFusedGateUpSiLUMulFunction.apply(x)),
    ),
)
GELU = Operation(
    "gelu",
    "copy",
    _vision(VISION_FFN),
    lambda shape, device: {"args": (leaf(shape["T"], shape["D"], device=device),)},
    lambda given: _moved(2 * _nbytes(*given["args"]), 3 * _nbytes(*given["args"])),
    (smalt(gelu), eager(torch_gelu), compiled(torch_gelu), NO_LIGER),
)


# Policy loss

_GRPO = PolicyLossOptions.of("grpo")


def _policy_inputs(shape: Shape, device: str) -> Given:
    T = shape["T"]
    logprob = (-torch.rand(T, device=device)).requires_grad_()
    old, reference = (-torch.rand(T, device=device) for _ in range(2))
    advantage, weight = torch.randn(T, device=device), torch.full((T,), 1 / T, device=device)
    provenance = (torch.rand(T, device=device) < 0.1).to(torch.int32)
    return {"args": (logprob, old, advantage, weight, provenance, reference)}


def _policy_loss(logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, provenance: Tensor, reference: Tensor) -> tuple:
    loss, metrics = policy_loss(logprob, old, advantage, weight, _GRPO, provenance=provenance, reference_logprob=reference)
    return loss, *metrics


def torch_policy_loss(logprob: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, provenance: Tensor, reference: Tensor) -> tuple:
    loss, metrics = policy_loss_reference(logprob, old, advantage, weight, _GRPO, provenance, reference, None, None, None)
    return loss, *metrics


POLICY_LOSS = Operation(
    "policy_loss",
    "copy",
    tuple(Shape(name, {"T": T}) for name, T in PACKS.items()),
    _policy_inputs,
    # Backward in the least: the gradient that the forward pass wrote is read, scaled and written.
    lambda given: _moved(_nbytes(*given["args"]) + _nbytes(given["args"][0]), 2 * _nbytes(given["args"][0])),
    (
        smalt(_policy_loss),
        eager(torch_policy_loss),
        compiled(torch_policy_loss),
        absent("Liger", "takes logits, not log-probabilities"),
    ),
)


# Optimiser


def _layer(width: int, ffn: int) -> list[tuple[int, ...]]:
    q, kv = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    return [(width,), (q + 2 * kv, width), (width, q), (width,), (2 * ffn, width), (width, ffn)]


def _adamw_inputs(shape: Shape, device: str) -> Given:
    return {"args": (), "device": device, **shape.sizes}


def _adamw_work(given: Given) -> dict[str, float]:
    numel = sum(torch.Size(s).numel() for s in given["parameters"])
    dtype = given["dtype"]
    return {"step": adamw_traffic(numel, dtype, dtype, dtype, False)}


def _optimizer(make: Callable[[list[Tensor], Given], Any], note: str = "", compile_step: bool = False) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        generator = torch.Generator(given["device"]).manual_seed(0)
        parameters = []
        for shape in given["parameters"]:
            p = torch.empty(shape, device=given["device"], dtype=given["dtype"]).normal_(0, 0.02, generator=generator)
            p.requires_grad_().grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
            parameters.append(p)
        optimizer = make(parameters, given)
        step = torch.compile(optimizer.step) if compile_step else optimizer.step

        def run() -> Tensor:
            step()
            return parameters[0].detach()

        note_here = note if given["dtype"] == torch.bfloat16 else ""
        return Call(run, note=note_here)

    return prepare


_OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_NEAREST = "rounds to nearest: steps below half a unit of bf16 are lost"


def _capturable(parameters: list[Tensor], given: Given) -> torch.optim.Optimizer:
    # Compiled steps count on the GPU; torch allows that there only.
    return torch.optim.AdamW(parameters, foreach=True, capturable=given["device"] != "cpu", **_OPTIONS)


def _apex_adamw(given: Given) -> Call:
    optimizers = require_apex("apex.optimizers", "amp_C")
    return _optimizer(lambda p, given: optimizers.FusedAdam(p, adam_w_mode=True, **_OPTIONS), _NEAREST)(given)


_TWO_LAYERS = [(VOCABULARY, WIDTH), *_layer(WIDTH, FFN), *_layer(WIDTH, FFN)]
ADAMW = Operation(
    "adamw",
    "copy",
    (
        Shape("embedding and 2 layers, fp32", {"parameters": _TWO_LAYERS, "dtype": torch.float32}),
        Shape("embedding and 2 layers, bf16 weights and state", {"parameters": _TWO_LAYERS, "dtype": torch.bfloat16}),
    ),
    _adamw_inputs,
    _adamw_work,
    (
        Contestant("smalt", _optimizer(lambda p, g: AdamW(p, state_dtype=g["dtype"], **_OPTIONS), "rounds stochastically")),
        Contestant("torch eager", _optimizer(lambda p, g: torch.optim.AdamW(p, foreach=True, **_OPTIONS), _NEAREST)),
        Contestant("torch fused", _optimizer(lambda p, g: torch.optim.AdamW(p, fused=True, **_OPTIONS), _NEAREST)),
        Contestant(
            "torch.compile",
            _optimizer(_capturable, _NEAREST, compile_step=True),
        ),
        Contestant("apex", _apex_adamw),
        NO_LIGER,
    ),
    parts=("step",),
)


# Decoding


def _decode_inputs(shape: Shape, device: str) -> Given:
    B, L, H, K, D = (shape[k] for k in "BLHKD")
    lengths = [L - i * L // (2 * B) for i in range(B)]  # from a full cache down to half of it
    cache = [torch.randn(B, L, K, D, device=device, dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(B, H, D, device=device, dtype=torch.bfloat16)
    return {"args": (q, *cache, torch.tensor(lengths, device=device, dtype=torch.int32)), "keys": sum(lengths)}


def _decode_work(given: Given) -> dict[str, float]:
    q, k, *_ = given["args"]
    return {"forward": 2 * given["keys"] * k.shape[2] * k.shape[3] * k.element_size() + 2 * _nbytes(q)}


def _sdpa_decode(compile_it: bool) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        q, k, v, lengths = given["args"]
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None]

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            q, k, v = q[:, :, None], k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]

        return call(compile_static(run) if compile_it else run, (q, k, v, mask), "mask made outside the timing; reads the whole cache")

    return prepare


def _flash_decode(given: Given) -> Call:
    require("flash_attn")
    from flash_attn import flash_attn_with_kvcache

    q, k, v, lengths = given["args"]
    return call(lambda q, k, v, n: flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=n)[:, 0], (q, k, v, lengths))


DECODE_ATTENTION = Operation(
    "decode_attention",
    "copy",
    (Shape("64 sequences, 4k to 8k keys", {"B": 64, "L": 8192, "H": NUM_HEADS, "K": NUM_KV_HEADS, "D": HEAD_DIM}),),
    _decode_inputs,
    _decode_work,
    (
        smalt(decode_attention),
        Contestant("torch eager", _sdpa_decode(False)),
        Contestant("torch.compile", _sdpa_decode(True)),
        Contestant("flash-attn", _flash_decode),
        NO_LIGER,
    ),
    parts=("forward",),
)

ROW_OPERATIONS = (RMS_NORM, ADD_RMS_NORM, LAYER_NORM, ROTARY, NORM_ROTARY, SWIGLU, GELU, POLICY_LOSS, ADAMW, DECODE_ATTENTION)
