"""Attention of one query row a sequence over that sequence's cached keys: the step of generation.

    out[b, h] = sum_l softmax_l(z[b, h, l]) v[b, l, h // G],   z = scale * q[b, h] . k[b, l, h // G],   l < lengths[b]

The keys are cut into slices of fixed length, so that one long sequence keeps a whole chip busy; the slices of a sequence are put
together in order. A sequence's result does not depend on the batch that it is in, nor on how long the cache is (Dao et al. 2023,
"Flash-Decoding for long-context inference", cuts by the number of processors instead).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_kernels import LOG2E, MAX_HEAD_DIM, aligned, constants, forward_step, load_part, log_sum, store_part
from .checks import check_scales
from .dispatch import current_backend, runs_kernel, without_autocast, without_dispatcher
from .launch import cdiv, configuration, convert, jit, launch, next_power_of_two, tl, unit_stride


def decode_attention(
    q_BHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, lengths: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Row b sees the keys 0 <= l < lengths[b], at least one and at most L. The kernels have no backward pass.

    q_BHD: [B, H, D]; k_BLKD, v_BLKD: [B, L, K, D], H a multiple of K; lengths: integer [B]. Returns [B, H, D] in q's dtype.
    Raises ValueError when shapes or dtypes do not fit, or for a scale or softcap that is not positive.
    """
    _check(q_BHD, k_BLKD, v_BLKD, lengths)
    check_scales("decode_attention", scale=scale, softcap=softcap)
    scale = q_BHD.shape[2] ** -0.5 if scale is None else scale
    implementation = current_backend(q_BHD)
    if implementation == "reference":
        return decode_attention_reference(q_BHD, k_BLKD, v_BLKD, lengths, scale, softcap)
    return _call(q_BHD, k_BLKD, v_BLKD, lengths, scale, softcap or 0.0, implementation)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> None:
    fits = q.ndim == 3 and k.ndim == 4 and k.shape == v.shape and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[2])
    if not fits or not k.shape[2] or q.shape[1] % k.shape[2] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and lengths {tuple(lengths.shape)} do not "
            "fit; expected [B, H, D], [B, L, K, D] twice and [B], H a multiple of K"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"decode_attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; give all three one dtype")


def decode_attention_reference(
    q_BHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, lengths: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """The definition. Shapes as in :func:`decode_attention`."""
    B, H, D = q_BHD.shape
    K = k_BLKD.shape[2]
    visible = torch.arange(k_BLKD.shape[1], device=lengths.device) < lengths[:, None]
    with without_autocast(q_BHD):
        scores = torch.einsum("bkgd,blkd->bkgl", q_BHD.reshape(B, K, H // K, D), k_BLKD) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bkgl,blkd->bkgd", weights, v_BLKD).reshape(B, H, D)


@jit(varying=("num_keys", "num_slices"))
def _slice_kernel(
    q, k, v, lengths, out, lse, groups, num_kv_heads, num_keys, num_slices, scale, softcap, q_strides, k_strides, v_strides,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CUT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The heads of one group over one slice of one sequence: its output, and the log-sum-exp that weighs it."""
    sequence, kv_head = (tl.program_id(0) // num_kv_heads).to(tl.int64), tl.program_id(0) % num_kv_heads
    slice_index = tl.program_id(1)
    g = tl.arange(0, BLOCK_G)
    inside = g < groups
    head = (kv_head * groups + g).to(tl.int64)
    q_row = (sequence * q_strides[0] + head * q_strides[1]) * ALIGN
    q1 = load_part(q, q_row, inside, 0, D1, D, True)
    q2 = load_part(q, q_row, inside, D1, D2, D, True) if D2 else q1
    k += (sequence * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]) * ALIGN
    v += (sequence * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]) * ALIGN
    first = slice_index * SLICE
    stop = tl.minimum(tl.minimum(tl.load(lengths + sequence).to(tl.int32), num_keys), first + SLICE)
    start, length = tl.zeros([BLOCK_G], tl.int32) + first, tl.zeros([BLOCK_G], tl.int32) + tl.maximum(stop - first, 0)
    m, l = tl.full([BLOCK_G], -1e30, tl.float32), tl.zeros([BLOCK_G], tl.float32)
    acc1 = tl.zeros([BLOCK_G, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_G, D2 if D2 else 1], tl.float32)
    whole = first + tl.maximum(stop - first, 0) // BLOCK_N * BLOCK_N
    for n in range(first, whole, BLOCK_N):
        m, l, acc1, acc2 = forward_step(
            n, q1, q2, q, q_row, inside, k, v, start, length, stop, m, l, acc1, acc2, scale, softcap,
            K_STRIDE, V_STRIDE, D, D1, D2, CUT, BLOCK_G, BLOCK_N, SOFTCAP, PRECISION, False)  # fmt: skip
    for n in range(whole, stop, BLOCK_N):
        m, l, acc1, acc2 = forward_step(
            n, q1, q2, q, q_row, inside, k, v, start, length, stop, m, l, acc1, acc2, scale, softcap,
            K_STRIDE, V_STRIDE, D, D1, D2, CUT, BLOCK_G, BLOCK_N, SOFTCAP, PRECISION, True)  # fmt: skip
    seen = l != 0
    norm = tl.where(seen, l, 1.0)
    row = (sequence * num_kv_heads * groups + head) * num_slices + slice_index
    store_part(out, row * D, inside, acc1 / norm[:, None], 0, D1, D)
    if D2:
        store_part(out, row * D, inside, acc2 / norm[:, None], D1, D2, D)
    tl.store(lse + row, tl.where(seen, log_sum(m, norm, k.dtype.element_ty), float("-inf")), mask=inside)


@jit(varying=("num_slices",))
def _merge_kernel(parts, lse, out, num_slices, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m, l, acc = -1e30, 0.0, tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, num_slices):
        part_lse = tl.load(lse + row * num_slices + i)
        part = tl.load(parts + (row * num_slices + i) * D + d, mask=d < D, other=0.0)
        m_new = tl.maximum(m, part_lse)
        alpha, weight = tl.exp2((m - m_new) * LOG2E), tl.exp2((part_lse - m_new) * LOG2E)
        acc = acc * alpha + part * weight
        l = l * alpha + weight
        m = m_new
    tl.store(out + row * D + d, convert(acc / l, out.dtype.element_ty), mask=d < D)


def launch_decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, softcap: float) -> Tensor:
    """out [B, H, D]. Shapes as in :func:`decode_attention`."""
    (B, H, D), (_, L, K, _) = q.shape, k.shape
    q, k, v = (unit_stride(x) for x in (q, k, v))
    align, strides = aligned(*q.stride()[:2], k.stride(0), k.stride(2), v.stride(0), v.stride(2))
    config = configuration("decode_attention", D, q)
    num_slices = cdiv(L, config.tiles["SLICE"])
    parts, lse = q.new_empty(B, H, num_slices, D, dtype=torch.float32), q.new_empty(B, H, num_slices, dtype=torch.float32)
    launch(
        "decode_attention", _slice_kernel, (B * K, num_slices),
        q, k, v, lengths.contiguous(), parts, lse, H // K, K, L, num_slices, scale, softcap, strides[:2], strides[2:4], strides[4:],
        config=config, K_STRIDE=k.stride(1), V_STRIDE=v.stride(1), ALIGN=align, BLOCK_G=max(16, next_power_of_two(H // K)),
        **constants(q, softcap),
    )  # fmt: skip
    out = q.new_empty(B, H, D)
    config = configuration("decode_attention_merge", D, q)
    launch(
        "decode_attention_merge", _merge_kernel, (B * H,), parts, lse, out, num_slices,
        config=config, D=D, BLOCK_D=next_power_of_two(D),
    )  # fmt: skip
    return out


def _compute(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, softcap: float, implementation: str) -> Tensor:
    if runs_kernel(implementation, q, MAX_HEAD_DIM):
        return launch_decode(q, k, v, lengths, scale, softcap)
    return decode_attention_reference(q, k, v, lengths, scale, softcap).contiguous()


_decode_attention = torch.library.custom_op("smalt::decode_attention", mutates_args=())(_compute)


@_decode_attention.register_fake
def _(q, k, v, lengths, scale, softcap, implementation):
    return q.new_empty(q.shape)


_call = without_dispatcher(_decode_attention, _compute)
