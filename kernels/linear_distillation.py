"""KL divergence from a teacher's head to a student's over the full vocabulary; the logits of neither ever exist at once.

With z and y the logits of student and teacher (soft-capped, divided by the temperature; see linear_statistics.py), p and q
their softmax:

    kl = sum_v q[v] (log q[v] - log p[v]) = sum_v q[v] (y[v] - z[v]) - (lse(y) - lse(z)),   dz[v] = g (p[v] - q[v])

without the factor temperature^2 that Hinton et al. 2015 (arXiv 1503.02531, section 2) multiply by. The sum over q and the two
lse are formed in one pass over the words, both products tile by tile; slices and merging are those of linear_statistics_kernels.py,
the walk of the backward pass is that of head.py. All is summed relative to the running maxima, so that a small divergence of large
logits keeps its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_scales
from .dispatch import KERNEL_DTYPES, current_backend, differentiable, runs_kernel, without_autocast, without_dispatcher
from .head import (
    backward_by_rows,
    backward_by_words,
    cast_as_autocast_does,
    chunk_of_words,
    halves,
    head_logits,
    pieces,
    place,
    product_tile,
    product_traffic,
    scaled,
    unscaled,
)
from .launch import cdiv, configuration, convert, jit, launch, precision, tl


def linear_distillation(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """KL(teacher || student) of each row in nats, at a temperature, without the factor temperature^2.

    hidden_TD: [T, D]; weight_VD: [V, D]; teacher_hidden_TE: [T, E]; teacher_weight_VE: [V, E]; of any float dtypes, each weight
    multiplied in the dtype of its hidden states, those cast first where autocast is on. Returns [T] in fp32 (fp64 for fp64
    hidden states), differentiable in hidden and weight; the teacher gets no gradient. Raises ValueError when the shapes do not
    fit, or temperature or a soft-cap is not positive. Liger has no such loss by row: there Smalt's kernels run.
    """
    shapes = [tuple(x.shape) for x in (hidden_TD, weight_VD, teacher_hidden_TE, teacher_weight_VE)]
    (T, D), (V, _), (_, E) = (s if len(s) == 2 else (-1, -1) for s in shapes[:3])
    if shapes != [(T, D), (V, D), (T, E), (V, E)] or V == 0 or D == 0 or E == 0:
        raise ValueError(
            "linear_distillation: hidden {}, weight {}, teacher's hidden {} and weight {} do not fit; "
            "expected [T, D], [V, D], [T, E] and [V, E], not empty".format(*shapes)
        )
    check_scales("linear_distillation", temperature=temperature, softcap=softcap, teacher_softcap=teacher_softcap)
    hidden_TD, teacher_hidden_TE = cast_as_autocast_does(hidden_TD), cast_as_autocast_does(teacher_hidden_TE)
    teacher = teacher_hidden_TE.detach(), teacher_weight_VE.detach()
    implementation = current_backend(hidden_TD)
    if implementation == "reference":
        return linear_distillation_reference(hidden_TD, weight_VD, *teacher, temperature, softcap, teacher_softcap)
    if teacher_hidden_TE.dtype not in KERNEL_DTYPES:
        implementation = "torch"
    return _call(hidden_TD, weight_VD, *teacher, temperature, softcap, teacher_softcap, implementation)[0]


def linear_distillation_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_VE: Tensor,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
) -> Tensor:
    """The definition, with all logits of both in memory. Arguments as in :func:`linear_distillation`."""
    z = head_logits(hidden_TD, weight_VD.to(hidden_TD.dtype), temperature, softcap)
    y = head_logits(teacher_hidden_TE, teacher_weight_VE.to(teacher_hidden_TE.dtype), temperature, teacher_softcap)
    return kl_of_logits(z, y)


def kl_of_logits(z: Tensor, y: Tensor) -> Tensor:
    """KL [T] from the softmax of y [T, V] to that of z [T, V], in z's dtype."""
    log_q = y.log_softmax(-1)
    return (log_q.exp() * (log_q - z.log_softmax(-1))).masked_fill(log_q == -torch.inf, 0.0).sum(-1).to(z.dtype)


# Two products to a tile, so twice the accumulators of linear_statistics': where registers are short, tiles are smaller.
@jit(varying=("num_rows",))
def _forward_kernel(
    hidden, weight, teacher_hidden, teacher_weight, partial, num_rows, num_words, width, teacher_width,
    inverse_temperature, softcap, teacher_softcap,
    SLICE: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
):  # fmt: skip
    tl.static_assert(SLICE % BLOCK_V == 0)
    block, part = place(num_rows, tl.cdiv(num_words, SLICE), BLOCK_T, GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    low = part * SLICE
    top, teacher_top = tl.full([BLOCK_T], float("-inf"), tl.float32), tl.full([BLOCK_T], float("-inf"), tl.float32)
    total, teacher_total, gap = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for first in range(low, tl.minimum(low + SLICE, num_words), BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        xs = halves(product_tile(hidden, weight, t, v, num_rows, num_words, width, width, width, BLOCK_K, PRECISION))
        ys = halves(
            product_tile(
                teacher_hidden, teacher_weight, t, v, num_rows, num_words, teacher_width, teacher_width, teacher_width,
                BLOCK_K, TEACHER_PRECISION,
            )
        )  # fmt: skip
        for half in tl.static_range(2):
            word = (first + half * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2) < num_words)[None, :]
            z = scaled(xs[half], inverse_temperature, softcap, SOFTCAP)
            y = scaled(ys[half], inverse_temperature, teacher_softcap, TEACHER_SOFTCAP)
            difference = y - z
            z, y = tl.where(word, z, float("-inf")), tl.where(word, y, float("-inf"))
            here, teacher_here = tl.max(z, axis=1), tl.max(y, axis=1)
            higher, teacher_higher = tl.where(here > top, here, top), tl.where(teacher_here > teacher_top, teacher_here, teacher_top)
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            teacher_pivot = tl.where(teacher_higher == float("-inf"), 0.0, teacher_higher)
            total = total * tl.exp(top - pivot) + tl.sum(tl.exp(z - pivot[:, None]), axis=1)
            fade, e = tl.exp(teacher_top - teacher_pivot), tl.exp(y - teacher_pivot[:, None])
            teacher_total = teacher_total * fade + tl.sum(e, axis=1)
            gap = gap * fade + tl.sum(e * tl.where(e == 0.0, 0.0, difference), axis=1)
            top, teacher_top = higher, teacher_higher
    # [slice, statistic, row]
    n = num_rows.to(tl.int64)
    out = partial + part * 5 * n + t
    tl.store(out, top, mask=t < num_rows)
    tl.store(out + n, total, mask=t < num_rows)
    tl.store(out + 2 * n, teacher_top, mask=t < num_rows)
    tl.store(out + 3 * n, teacher_total, mask=t < num_rows)
    tl.store(out + 4 * n, gap, mask=t < num_rows)


@jit(varying=("num_rows",))
def _merge_kernel(partial, kl, lses, num_rows, num_parts, BLOCK_T: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, n = t < num_rows, num_rows.to(tl.int64)
    top, teacher_top = tl.full([BLOCK_T], float("-inf"), tl.float32), tl.full([BLOCK_T], float("-inf"), tl.float32)
    total, teacher_total, gap = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for part in range(num_parts):
        at = partial + tl.cast(part, tl.int64) * 5 * n + t
        here, teacher_here = tl.load(at, mask=row, other=0.0), tl.load(at + 2 * n, mask=row, other=0.0)
        higher, teacher_higher = tl.where(here > top, here, top), tl.where(teacher_here > teacher_top, teacher_here, teacher_top)
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        teacher_pivot = tl.where(teacher_higher == float("-inf"), 0.0, teacher_higher)
        total = total * tl.exp(top - pivot) + tl.load(at + n, mask=row, other=1.0) * tl.exp(here - pivot)
        fade, scale = tl.exp(teacher_top - teacher_pivot), tl.exp(teacher_here - teacher_pivot)
        teacher_total = teacher_total * fade + tl.load(at + 3 * n, mask=row, other=1.0) * scale
        gap = gap * fade + tl.load(at + 4 * n, mask=row, other=0.0) * scale
        top, teacher_top = higher, teacher_higher
    tl.store(kl + t, gap / teacher_total - ((teacher_top - top) + (tl.log(teacher_total) - tl.log(total))), mask=row)
    tl.store(lses + t, top + tl.log(total), mask=row)
    tl.store(lses + n + t, teacher_top + tl.log(teacher_total), mask=row)


@jit(varying=("num_rows",))
def _backward_kernel(
    hidden, weight, teacher_hidden, teacher_weight, lses, g, dx, num_rows, num_words, width, teacher_width, dx_stride,
    inverse_temperature, softcap, teacher_softcap,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = place(num_rows, tl.cdiv(num_words, BLOCK_V), BLOCK_T, GROUP)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    v = part * BLOCK_V + tl.arange(0, BLOCK_V)
    xs = halves(product_tile(hidden, weight, t, v, num_rows, num_words, width, width, width, BLOCK_K, PRECISION))
    ys = halves(
        product_tile(
            teacher_hidden, teacher_weight, t, v, num_rows, num_words, teacher_width, teacher_width, teacher_width,
            BLOCK_K, TEACHER_PRECISION,
        )
    )  # fmt: skip
    row, n = t < num_rows, num_rows.to(tl.int64)
    for half in tl.static_range(2):
        v = part * BLOCK_V + half * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2)
        z = scaled(xs[half], inverse_temperature, softcap, SOFTCAP)
        y = scaled(ys[half], inverse_temperature, teacher_softcap, TEACHER_SOFTCAP)
        lse = tl.load(lses + t, mask=row, other=float("inf"))[:, None]
        teacher_lse = tl.load(lses + n + t, mask=row, other=float("inf"))[:, None]
        dz = tl.load(g + t, mask=row, other=0.0)[:, None] * (tl.exp(z - lse) - tl.exp(y - teacher_lse))
        out = convert(unscaled(dz, z, inverse_temperature, softcap, SOFTCAP), dx.dtype.element_ty)
        tl.store(dx + t[:, None] * dx_stride + v[None, :], out, mask=row[:, None] & (v < num_words)[None, :])


def forward_traffic(T: int, V: int, D: int, E: int, itemsize: int, tiles: dict[str, int]) -> int:
    """Bytes that the two forward kernels load and store, counted as in linear_statistics_kernels.py; hidden states of one itemsize."""
    products, _ = product_traffic(T, V, D + E, itemsize, tiles, tiles["SLICE"])
    return products + T * (cdiv(V, tiles["SLICE"]) * 2 * 5 * 4 + 3 * 4)


def backward_traffic(T: int, V: int, D: int, E: int, itemsize: int, tiles: dict[str, int], chunk: int) -> int:
    """Bytes that the backward kernel loads and stores over all chunks, counted likewise; torch's products not counted."""
    products, word_tiles = product_traffic(T, V, D + E, itemsize, tiles, chunk)
    return products + T * word_tiles * 2 * 3 * 4 + T * V * itemsize


def _wider(hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """The one whose bits choose the tiles: those for 16 bits are neither meant nor compiled for products of fp32."""
    return max(hidden, teacher_hidden, key=Tensor.element_size)


def launch_forward(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl [T], and lse [2, T] of student and teacher. All inputs contiguous, each weight of the dtype of its hidden states."""
    (T, D), V, E = hidden.shape, weight.shape[0], teacher_hidden.shape[1]
    wider = _wider(hidden, teacher_hidden)
    config = configuration("linear_distillation_forward", D, wider)
    merge = configuration("linear_distillation_merge", D, wider)
    slices = cdiv(V, config.tiles["SLICE"])
    partial, kl, lses = (hidden.new_empty(*shape, dtype=torch.float32) for shape in ((slices, 5, T), (T,), (2, T)))
    launch(
        "linear_distillation_forward", _forward_kernel, (cdiv(T, config.tiles["BLOCK_T"]) * slices,),
        hidden, weight, teacher_hidden, teacher_weight, partial, T, V, D, E, 1.0 / temperature, softcap or 0.0, teacher_softcap or 0.0,
        config=config, SOFTCAP=softcap is not None, TEACHER_SOFTCAP=teacher_softcap is not None,
        PRECISION=precision(hidden.dtype), TEACHER_PRECISION=precision(teacher_hidden.dtype),
    )  # fmt: skip
    launch("linear_distillation_merge", _merge_kernel, (cdiv(T, merge.tiles["BLOCK_T"]),), partial, kl, lses, T, slices, config=merge)
    return kl, lses


def launch_backward(
    g: Tensor, lses: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden and dweight, each in its input's dtype; weights may be wider than the hidden states. All inputs contiguous."""
    (T, D), V, E = hidden.shape, weight.shape[0], teacher_hidden.shape[1]
    config = configuration("linear_distillation_backward", D, _wider(hidden, teacher_hidden))

    def write(dx: Tensor, words: Tensor, first: int) -> None:
        n = words.shape[0]
        teacher_words = teacher_weight[first : first + n].to(teacher_hidden.dtype)
        launch(
            "linear_distillation_backward", _backward_kernel, (cdiv(T, config.tiles["BLOCK_T"]) * cdiv(n, config.tiles["BLOCK_V"]),),
            hidden, words, teacher_hidden, teacher_words, lses, g, dx, T, n, D, E, dx.stride(0),
            1.0 / temperature, softcap or 0.0, teacher_softcap or 0.0,
            config=config, SOFTCAP=softcap is not None, TEACHER_SOFTCAP=teacher_softcap is not None,
            PRECISION=precision(hidden.dtype), TEACHER_PRECISION=precision(teacher_hidden.dtype),
        )  # fmt: skip

    chunk = chunk_of_words(V, hidden.element_size(), config.tiles["BLOCK_V"])
    return backward_by_words(write, hidden, weight, chunk, need_hidden, need_weight)


def torch_forward(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`launch_forward` returns, in plain torch and any float dtype, but no lse: its backward pass needs none."""
    words, teacher_words = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
    kl = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    for piece in pieces(hidden.shape[0], weight.shape[0]):
        z = head_logits(hidden[piece], words, temperature, softcap)
        kl[piece] = kl_of_logits(z, head_logits(teacher_hidden[piece], teacher_words, temperature, teacher_softcap))
    return kl, kl.new_empty(0, hidden.shape[0])


def torch_backward(
    g: Tensor, lses: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`launch_backward` returns, in plain torch and any float dtype."""
    teacher_words = teacher_weight.to(teacher_hidden.dtype)

    def gradient(piece: slice, z: Tensor) -> Tensor:
        y = head_logits(teacher_hidden[piece], teacher_words, temperature, teacher_softcap)
        return z.softmax(-1).sub_(y.softmax(-1)).mul_(g[piece, None])

    return backward_by_rows(gradient, hidden, weight, temperature, softcap, need_hidden, need_weight)


def _compute(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (temperature, softcap, teacher_softcap)
    with without_autocast(hidden):
        if runs_kernel(implementation, hidden):
            words, teacher_words = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
            tensors = (x.contiguous() for x in (hidden, words, teacher_hidden, teacher_words))
            return launch_forward(*tensors, *options)  # type: ignore[call-arg, arg-type]
        return torch_forward(hidden, weight, teacher_hidden, teacher_weight, *options)


_linear_distillation = torch.library.custom_op("smalt::linear_distillation", mutates_args=())(_compute)


@_linear_distillation.register_fake
def _(hidden, weight, teacher_hidden, teacher_weight, temperature, softcap, teacher_softcap, implementation):
    kl = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return kl, kl.new_empty(2 if runs_kernel(implementation, hidden) else 0, hidden.shape[0])


def _gradient(
    g: Tensor, lses: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    temperature: float, softcap: float | None, teacher_softcap: float | None, need_hidden: bool, need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = (temperature, softcap, teacher_softcap, need_hidden, need_weight)
    with without_autocast(hidden):
        if runs_kernel(implementation, hidden):
            tensors = (x.contiguous() for x in (g, lses, hidden, weight, teacher_hidden, teacher_weight))
            return launch_backward(*tensors, *options)  # type: ignore[call-arg, arg-type]
        return torch_backward(g, lses, hidden, weight, teacher_hidden, teacher_weight, *options)


_linear_distillation_backward = torch.library.custom_op("smalt::linear_distillation_backward", mutates_args=())(_gradient)


@_linear_distillation_backward.register_fake
def _(g, lses, hidden, weight, teacher_hidden, teacher_weight, temperature, softcap, teacher_softcap,
      need_hidden, need_weight, implementation):  # fmt: skip
    (T, D), V = hidden.shape, weight.shape[0]
    return hidden.new_empty(T if need_hidden else 0, D), weight.new_empty(V if need_weight else 0, D)


_differentiate = without_dispatcher(_linear_distillation_backward, _gradient)


def _setup(ctx, inputs, output):
    *tensors, temperature, softcap, teacher_softcap, ctx.implementation = inputs
    ctx.options = (temperature, softcap, teacher_softcap)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, g, _lses):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    dhidden, dweight = _differentiate(g, *ctx.saved_tensors, *ctx.options, need_hidden, need_weight, ctx.implementation)
    return dhidden if need_hidden else None, dweight if need_weight else None, *(None,) * 6


_linear_distillation.register_autograd(_backward, setup_context=_setup)
_call = differentiable(_linear_distillation, _compute, _setup, _backward)
