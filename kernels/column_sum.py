"""Sum over the rows of a matrix in a fixed order: the second half of every weight gradient of the row kernels.

    out[d] = sum_p x[p, d],   p in blocks of BLOCK_P; each block a tree, the blocks one after another

A program owns its columns, so no two programs add to one number and the result has the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import cdiv, configuration, convert, jit, launch, tl


@jit(varying=("num_rows",))
def _kernel(x, out, num_rows, num_columns, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_rows, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < num_rows)[:, None] & (d < num_columns)[None, :]
        total += tl.sum(tl.load(x + p.to(tl.int64)[:, None] * num_columns + d[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + d, convert(total, out.dtype.element_ty), mask=d < num_columns)


def column_sum(x_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """x_PD: fp32 [P, D], contiguous. Returns [D] in ``dtype``."""
    P, D = x_PD.shape
    out = x_PD.new_empty(D, dtype=dtype)
    config = configuration("column_sum", D, x_PD)
    launch("column_sum", _kernel, (cdiv(D, config.tiles["BLOCK_D"]),), x_PD, out, P, D, config=config)
    return out
