"""What the operations of the head share: logits in plain torch, a tile of them in Triton, and the walk of the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_scales
from .dispatch import is_abstract
from .launch import cdiv, dot, jit, tanh, tl

IGNORE = -100  # the label of a row that has none
# Logits in memory at a time without the kernels, in elements: 16 MiB of fp32.
CHUNK_ELEMENTS = 1 << 22
# Words of a chunk of the backward pass: dx takes at most 1/CHUNK_SHARE of the fp32 logits, unless the vocabulary is small.
CHUNK_SHARE = 64
MIN_CHUNK = 2048


def cast_as_autocast_does(x: Tensor) -> Tensor:
    """x in the dtype that autocast would multiply it in."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def check_head(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, softcap: float | None) -> None:
    """Raises ValueError where the arguments do not fit."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} do not fit; "
            "expected [T, D], [V, D] and [T]"
        )
    if 0 in weight.shape:
        raise ValueError(f"{name}: weight {tuple(weight.shape)} is empty")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; expected torch.int64, pass labels.long()")
    check_scales(name, temperature=temperature, softcap=softcap)


def check_labels(name: str, labels: Tensor, vocabulary: int) -> bool:
    """Whether labels could be looked at without waiting for a GPU; raises ValueError for one that is out of range."""
    if labels.device.type != "cpu" or is_abstract(labels):
        return False
    outside = (labels >= vocabulary) | ((labels < 0) & (labels != IGNORE))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"{name}: the label of row {row} is {int(labels[row])}; expected 0 to {vocabulary - 1}, or {IGNORE}")
    return True


def head_logits(hidden_TD: Tensor, weight_VD: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """z [T, V] in fp32 (fp64 for fp64 input), of a product in hidden's dtype."""
    z = (hidden_TD @ weight_VD.T).to(torch.promote_types(hidden_TD.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def pieces(rows: int, vocabulary: int) -> list[slice]:
    """Slices of rows whose logits are at most ``CHUNK_ELEMENTS``, or single rows."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(low, min(low + size, rows)) for low in range(0, rows, size)]


def chunk_of_words(vocabulary: int, itemsize: int, block: int) -> int:
    """How many words the backward pass takes at a time, from the vocabulary alone: a multiple of ``block``, the tile."""
    words = max(MIN_CHUNK, vocabulary * 4 // (CHUNK_SHARE * itemsize))
    return min(max(words // block, 1), cdiv(vocabulary, block)) * block


def backward_by_words(
    write: Callable[[Tensor, Tensor, int], None], hidden: Tensor, weight: Tensor, chunk: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dhidden [T, D] and dweight [V, D], each in its input's dtype; of no rows where not needed.

    ``write(dx, words, first)`` fills dx [T, n], the gradient of the products of hidden with words [n, D], the rows of weight from
    ``first`` on. dx lies in one buffer, rows padded to ``chunk``. A row of dweight is rounded once; dhidden is summed in fp32.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    dx = hidden.new_empty(T, chunk)
    dhidden = hidden.new_zeros(T if need_hidden else 0, D, dtype=torch.float32)
    dweight = weight.new_empty(V if need_weight else 0, D)
    for first in range(0, V, chunk):
        words = weight[first : first + chunk].to(hidden.dtype)
        piece = dx[:, : words.shape[0]]
        write(piece, words, first)
        if need_weight:
            dweight[first : first + chunk] = _wide_product(piece.T, hidden)
        if need_hidden:
            _add_wide_product(dhidden, piece, words)
    return dhidden.to(hidden.dtype), dweight


def backward_by_rows(
    gradient: Callable[[slice, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """What :func:`backward_by_words` returns, in plain torch and any float dtype, from pieces of rows.

    ``gradient(piece, z)`` gives dz of a slice of rows from their z.
    """
    (T, D), V = hidden.shape, weight.shape[0]
    words = weight.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = hidden.new_empty(T if need_hidden else 0, D)
    dweight = weight.new_zeros(V if need_weight and not T else 0, D, dtype=wide)
    for piece in pieces(T, V):
        z = head_logits(hidden[piece], words, temperature, softcap)
        dx = gradient(piece, z)
        if softcap is not None:
            dx *= 1.0 - (z * (temperature / softcap)).square_()
        if temperature != 1.0:
            dx /= temperature
        dx = dx.to(hidden.dtype)
        if need_hidden:
            torch.mm(dx, words, out=dhidden[piece])
        if need_weight:
            product = dx.T @ hidden[piece]
            dweight = product.to(wide) if piece.start == 0 else dweight.add_(product)
    return dhidden, dweight.to(weight.dtype)


def _multiplies_into_fp32(a: Tensor) -> bool:
    """Whether torch has products of 16 bits that give fp32 on a's device. CUDA does, ROCm does not: there a is made fp32 first."""
    return a.is_cuda and a.element_size() == 2 and not torch.version.hip


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32. Not rounded to 16 bits before its last sum, which a product that is split over K would be."""
    if _multiplies_into_fp32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_wide_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32."""
    if _multiplies_into_fp32(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def product_traffic(T: int, V: int, widths: int, itemsize: int, tiles: dict[str, int], span: int) -> tuple[int, int]:
    """Bytes that a kernel loads to form all products tile by tile, and how many tiles of words there are.

    span: words after which tiles start anew, a slice or a chunk. Tiles count in full along rows and words, where the last stands in
    for those outside, and not along the width, where lanes outside load nothing.
    """
    word_tiles = sum(cdiv(min(span, V - low), tiles["BLOCK_V"]) for low in range(0, V, span))
    row_tiles = cdiv(T, tiles["BLOCK_T"])
    return row_tiles * word_tiles * (tiles["BLOCK_T"] + tiles["BLOCK_V"]) * widths * itemsize, word_tiles


@jit
def place(num_rows, num_parts, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of rows and its part of the words.

    GROUP blocks of rows go through all parts before the next GROUP starts, so that what runs at a time shares hidden states and
    weights in the L2 cache.
    """
    group = tl.program_id(0) // (GROUP * num_parts)
    inside = tl.program_id(0) % (GROUP * num_parts)
    size = tl.minimum(tl.cdiv(num_rows, BLOCK_T) - group * GROUP, GROUP)
    return (group * GROUP + inside % size).to(tl.int64), inside // size


@jit
def product_tile(
    hidden, weight, t, v, num_rows, num_words, width, hidden_stride, weight_stride, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """hidden[t] . weight[v] for vectors t (int64) and v, in fp32. Where they lie outside, the last row or word stands in."""
    # Not masks: with a tile of 128 x 256 the registers for them are not there.
    k = tl.arange(0, BLOCK_K)
    a = hidden + tl.minimum(t, num_rows - 1)[:, None] * hidden_stride + k[None, :]
    b = weight + tl.minimum(v, num_words - 1).to(tl.int64)[None, :] * weight_stride + k[:, None]
    x = tl.zeros([t.shape[0], v.shape[0]], tl.float32)
    for first in range(0, width, BLOCK_K):
        inside = k < width - first
        rows = tl.load(a + first, mask=inside[None, :], other=0.0)
        x = dot(rows, tl.load(b + first, mask=inside[:, None], other=0.0), x, PRECISION)
    return x


@jit
def halves(x):
    """The left and the right half of a tile. One after the other they, and what is made of them, fit into the registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@jit
def scaled(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """z of products x."""
    if SOFTCAP:
        x = softcap * tanh(x * (1.0 / softcap))
    return x * inverse_temperature


@jit
def unscaled(dz, z, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """dx of dz."""
    if SOFTCAP:
        y = z * (1.0 / (inverse_temperature * softcap))
        dz *= 1.0 - y * y
    return dz * inverse_temperature
