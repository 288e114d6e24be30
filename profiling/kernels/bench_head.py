"""The head: projection and loss without logits, its distillation form, and the batch-invariant product.

Work is in FLOP: of a head forward one product, backward two; what is computed again counts for nothing. The loss of all contestants
is the mean over tokens, all of which have a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalt.kernels.head import chunk_of_words
from smalt.kernels.launch import configuration
from smalt.kernels.linear_cross_entropy import linear_cross_entropy
from smalt.kernels.linear_distillation import linear_distillation
from smalt.kernels.matmul import matmul

from .bench_cases import (
    FFN,
    LARGE_VOCABULARY,
    PACKS,
    VOCABULARY,
    WIDTH,
    Absent,
    Call,
    Contestant,
    Given,
    Operation,
    Shape,
    absent,
    call,
    compile_static,
    compiled,
    eager,
    leaf,
    liger,
    smalt,
)

IN_FORWARD = "its forward pass computes the gradients too"
WEIGHT_SCALE = 0.02


def _inputs(shape: Shape, device: str) -> Given:
    T, V, D = (shape[k] for k in "TVD")
    labels = torch.randint(0, V, (T,), device=device)
    return {"args": (leaf(T, D, device=device), leaf(V, D, device=device, scale=WEIGHT_SCALE), labels)}


def _work(given: Given) -> dict[str, float]:
    (T, D), V = given["args"][0].shape, given["args"][1].shape[0]
    product = 2.0 * T * V * D
    return {"forward": product, "backward": 2 * product, "both": 3 * product}


def _smalt(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels).mean()


def torch_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def chunk_rows(hidden: Tensor, weight: Tensor) -> int:
    """Rows of a chunk of logits, for the memory that Smalt's backward pass takes besides its results, rounded up to 64.

    Smalt: the gradient of a chunk of words, and dhidden in fp32. The baseline: logits and their gradient, both in hidden's dtype.
    """
    (T, D), V, itemsize = hidden.shape, weight.shape[0], hidden.element_size()
    block = configuration("linear_statistics_backward", D, hidden).tiles["BLOCK_V"]
    buffers = T * chunk_of_words(V, itemsize, block) * itemsize + T * D * 4
    rows = buffers // (2 * itemsize * V)
    return min(T, -(-rows // 64) * 64)


def chunk_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The loss of a chunk of rows and the gradient of its logits, both times scale."""
    logits = F.linear(hidden, weight).float()
    lse = logits.logsumexp(-1, keepdim=True)
    loss = (lse - logits.gather(1, labels[:, None])).sum() * scale
    one = torch.arange(logits.shape[1], device=labels.device) == labels[:, None]
    return loss, (((logits - lse).exp() - one.to(logits.dtype)) * scale).to(hidden.dtype)


class _Chunked(torch.autograd.Function):
    """Chunks of rows, one after the other, with both gradients in the forward pass: what trainers in plain torch do best."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, step: Callable) -> Tensor:
        T = hidden.shape[0]
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for low in range(0, T, rows):
            piece = slice(low, min(low + rows, T))
            loss, dlogits = step(hidden[piece], weight, labels[piece], 1.0 / T)
            total += loss
            torch.mm(dlogits, weight, out=dhidden[piece])
            dweight.addmm_(dlogits.T, hidden[piece])
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:  # type: ignore[override]
        dhidden, dweight = ctx.saved_tensors
        return dhidden.mul_(upstream), dweight.mul_(upstream), None, None, None


def _chunked(rows: int | None) -> Callable[[Given], Call]:
    def prepare(given: Given) -> Call:
        hidden, weight, _ = given["args"]
        n = chunk_rows(hidden, weight) if rows is None else min(rows, hidden.shape[0])
        # A last chunk of fewer rows is a second shape, compiled on its own.
        step = compile_static(chunk_gradient)
        note = f"{n} rows a chunk, {IN_FORWARD}, dweight is summed in {str(weight.dtype).removeprefix('torch.')}"
        return call(lambda *args: _Chunked.apply(*args, n, step), given["args"], note)

    return prepare


def _torch_chunked(given: Given) -> Call:
    function, options = getattr(F, "linear_cross_entropy", None), getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Absent(f"torch {torch.__version__} has none")
    chosen = options()
    note = f"LinearCrossEntropyOptions() as they come, {IN_FORWARD}"
    return call(lambda hidden, weight, labels: function(hidden, weight, labels, options=chosen), given["args"], note)


def _liger(ops: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    found = ops.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)
    return found[0] if isinstance(found, tuple) else found


def _head_shape(pack: str, vocabulary: int) -> Shape:
    return Shape(f"{pack}, V = {vocabulary:,}", {"T": PACKS[pack], "V": vocabulary, "D": WIDTH})


HEAD = Operation(
    "linear_cross_entropy",
    "matmul",
    tuple(_head_shape(pack, V) for V in (VOCABULARY, LARGE_VOCABULARY) for pack in PACKS),
    _inputs,
    _work,
    (
        smalt(_smalt),
        eager(torch_head),
        compiled(torch_head),
        Contestant("torch.compile, chunks of equal memory", _chunked(None)),
        Contestant("torch.compile, chunks of 2048 rows", _chunked(2048)),
        Contestant("F.linear_cross_entropy", _torch_chunked),
        liger(_liger, IN_FORWARD),
    ),
)


# Distillation


def _distillation_inputs(shape: Shape, device: str) -> Given:
    T, V, D, E = (shape[k] for k in "TVDE")
    teacher = (leaf(T, E, device=device).detach(), leaf(V, E, device=device, scale=WEIGHT_SCALE).detach())
    return {"args": (leaf(T, D, device=device), leaf(V, D, device=device, scale=WEIGHT_SCALE), *teacher)}


def _distillation_work(given: Given) -> dict[str, float]:
    hidden, weight, teacher_hidden, _ = given["args"]
    (T, D), V, E = hidden.shape, weight.shape[0], teacher_hidden.shape[1]
    forward, backward = 2.0 * T * V * (D + E), 4.0 * T * V * D
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _distillation(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    return linear_distillation(hidden, weight, teacher_hidden, teacher_weight).mean()


def torch_distillation(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    student = F.linear(hidden, weight).float().log_softmax(-1)
    teacher = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _liger_distillation(ops: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    # Its divergence with beta 0 is KL(teacher || student), as the mean over tokens.
    return ops.LigerFusedLinearJSDFunction.apply(hidden, weight, teacher_hidden, teacher_weight, None, 0.0)


DISTILLATION = Operation(
    "linear_distillation",
    "matmul",
    (Shape("8k, V = 100,096, teacher of 4096", {"T": PACKS["8k"], "V": VOCABULARY, "D": WIDTH, "E": 4096}),),
    _distillation_inputs,
    _distillation_work,
    (
        smalt(_distillation),
        eager(torch_distillation),
        compiled(torch_distillation),
        liger(_liger_distillation, f"JSD with beta 0, {IN_FORWARD}"),
    ),
)


# The batch-invariant product


def _matmul_work(given: Given) -> dict[str, float]:
    (T, K), N = given["args"][0].shape, given["args"][1].shape[0]
    product = 2.0 * T * N * K
    return {"forward": product, "backward": 2 * product, "both": 3 * product}


MATMUL = Operation(
    "matmul",
    "matmul",
    tuple(Shape(f"{name} x {WIDTH} x {2 * FFN}", {"T": T, "K": WIDTH, "N": 2 * FFN}) for name, T in PACKS.items()),
    lambda s, device: {"args": (leaf(s["T"], s["K"], device=device), leaf(s["N"], s["K"], device=device, scale=WEIGHT_SCALE))},
    _matmul_work,
    (
        smalt(matmul),
        eager(F.linear, "not batch-invariant"),
        absent("torch.compile", "calls the product that eager calls"),
        absent("Liger", "has no such kernel"),
    ),
)

HEAD_OPERATIONS = (HEAD, DISTILLATION, MATMUL)
