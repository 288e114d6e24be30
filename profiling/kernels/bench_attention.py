"""Attention of training: packs of documents, one long document, documents with images, and the tiles of the vision tower.

Work is in FLOP of the pairs of a query row and a key that it sees: forward two products, backward five (the scores again, and one
for dV, dP, dQ and dK each), whoever computes it and whatever it computes besides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalt.kernels.attention import attention, attention_plan

from .bench_cases import (
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    PACKS,
    PATCHES,
    TILE_TOKENS,
    TILES,
    VISION_HEADS,
    VISION_WIDTH,
    Absent,
    Bounds,
    Call,
    Contestant,
    Given,
    Operation,
    Shape,
    absent,
    bounds,
    call,
    compile_static,
    cumulative,
    document_lengths,
    leaf,
    require,
)

NO_SPANS = "cannot express images whose tokens see each other"
EXPANDED = "keys expanded to all heads outside the timing"


def _inputs(shape: Shape, device: str) -> Given:
    H, K, D = (shape[k] for k in "HKD")
    b: Bounds = bounds(shape["lengths"], shape["causal"], shape["image"])
    T = len(b.start)
    q, k, v = leaf(T, H, D, device=device), leaf(T, K, D, device=device), leaf(T, K, D, device=device)
    start, end = (torch.tensor(x, dtype=torch.int32).to(device) for x in (b.start, b.end))
    return {"args": (q, k, v), "start": start, "end": end, "bounds": b, "device": device}


def _work(given: Given) -> dict[str, float]:
    q, bound = given["args"][0], given["bounds"]
    product = 2 * q.shape[1] * q.shape[2] * bound.pairs
    return {"forward": 2 * product, "backward": 5 * product, "both": 7 * product}


def _smalt(given: Given) -> Call:
    start, end = given["start"], given["end"]
    plan = attention_plan(start, end, len(start))
    return call(lambda q, k, v: attention(q, k, v, start, end, plan=plan), given["args"], "plan of the pack made outside the timing")


def expanded(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """q, and keys and values of as many heads, as leaves of their own."""
    q, k, v = given["args"]
    groups = q.shape[1] // k.shape[1]
    return q, *(x.detach().repeat_interleave(groups, 1).requires_grad_() for x in (k, v))


def _is_grouped(given: Given) -> bool:
    q, k, _ = given["args"]
    return q.shape[1] != k.shape[1]


def _sdpa(given: Given) -> Call:
    """What plain torch has: one causal document, or tiles of one size, as they are; packs by a dense mask."""
    b: Bounds = given["bounds"]
    one, alike = len(b.lengths) == 1, len(set(b.lengths)) == 1
    if (one or not b.causal) and alike and not b.images:
        n = len(b.lengths)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=b.causal, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2).flatten(0, 1)

        return call(run, given["args"], "scaled_dot_product_attention")
    key = torch.arange(len(b.start), device=given["device"])
    mask = (key >= given["start"][:, None]) & (key < given["end"][:, None])

    def run_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)[0]

    note = "scaled_dot_product_attention with a dense mask made outside the timing"
    return call(run_masked, expanded(given), f"{note}; {EXPANDED}" if _is_grouped(given) else note)


def varlen_function() -> Callable[..., Any]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Absent(f"torch {torch.__version__} has none") from None
    return varlen_attn


def _varlen(given: Given) -> Call:
    function, b = varlen_function(), given["bounds"]
    if b.images:
        raise Absent(NO_SPANS)
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"is_causal": b.causal} if "is_causal" in parameters else {"window_size": (-1, 0 if b.causal else -1)}
    args, note = given["args"], ""
    if _is_grouped(given):
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            args, note = expanded(given), f"no grouped queries in torch {torch.__version__}: {EXPANDED}"
    at, most = cumulative(b.lengths, given["device"]), max(b.lengths)
    return call(lambda q, k, v: function(q, k, v, at, at, most, most, **options), args, note)


def _flex(given: Given) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    start, end, T = given["start"], given["end"], len(given["start"])

    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= start[row]) & (key < end[row])

    on_gpu = given["device"] != "cpu"
    # Uncompiled it would hold T x T numbers, several times.
    make = torch.compile(create_block_mask) if on_gpu else create_block_mask
    mask = make(seen, None, None, T, T, device=given["device"])
    function: Any = compile_static(flex_attention) if on_gpu else flex_attention
    grouped = _is_grouped(given)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)[0]

    return call(run, given["args"], "create_block_mask outside the timing")


def _flash(deterministic: bool) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        require("flash_attn")
        from flash_attn import flash_attn_varlen_func

        b = given["bounds"]
        if b.images:
            raise Absent(NO_SPANS)
        at, most = cumulative(b.lengths, given["device"]), max(b.lengths)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_varlen_func(q, k, v, at, at, most, most, causal=b.causal, deterministic=deterministic)

        return call(run, given["args"], "" if deterministic else "backward not deterministic")

    return prepare


def _text(name: str, lengths: list[int], image: int = 0) -> Shape:
    sizes = {"lengths": lengths, "causal": True, "image": image, "H": NUM_HEADS, "K": NUM_KV_HEADS, "D": HEAD_DIM}
    return Shape(f"{name}, 20 / 4 heads of 128", sizes)


def _tiles(name: str, n: int) -> Shape:
    sizes = {"lengths": [PATCHES] * n, "causal": False, "image": 0, "H": VISION_HEADS, "K": VISION_HEADS}
    return Shape(f"{name} of {PATCHES}, 16 heads of 72", {**sizes, "D": VISION_WIDTH // VISION_HEADS})


ATTENTION = Operation(
    "attention",
    "matmul",
    (
        _text("one causal document of 16k", [16_384]),
        _tiles("16 tiles", TILES["16 tiles"]),
        *(_text(f"documents, {name}", document_lengths(T)) for name, T in PACKS.items()),
        _text("documents with images, 8k", document_lengths(PACKS["8k"]), TILE_TOKENS),
        _tiles("64 tiles", TILES["64 tiles"]),
    ),
    _inputs,
    _work,
    (
        Contestant("smalt", _smalt),
        Contestant("torch eager", _sdpa),
        absent("torch.compile", "of eager there is nothing to fuse; FlexAttention is torch's compiled attention"),
        Contestant("torch varlen", _varlen),
        Contestant("FlexAttention", _flex),
        Contestant("flash-attn", _flash(False)),
        Contestant("flash-attn deterministic", _flash(True)),
        absent("Liger", "has no such kernel"),
    ),
    quick=2,
)
