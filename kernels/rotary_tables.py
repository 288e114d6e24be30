"""The tables that :func:`smalt.kernels.rotary` rotates by: cos and sin of angle[t, i] = position[t] f[i], i a pair of dims.

    f[i] = theta^(-2 i / R)                           R dims of each head rotate (Su et al. 2021, arXiv 2104.09864, eq. 15)
    f[i] / s for slow, f[i] for fast dims             YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2)

With several positions a token, each column takes one of them: time, row or column of a patch. Which one is all that distinguishes
M-RoPE in sections (Qwen2-VL, arXiv 2409.12191), M-RoPE interleaved (Qwen3-VL), and the 2-D form of vision towers.

Angles are formed in float64, once per pack: fp32 loses position 100,000. The table is rounded once to the dtype that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: dims that turn less than ``beta_slow`` times within ``original_length`` are slowed down by ``factor``, those that turn
    more than ``beta_fast`` times are kept, with a linear ramp between them.

    attention_factor: what cos and sin, and so queries and keys, are multiplied by; None: 0.1 ln(factor) + 1. truncate: whether the
    ends of the ramp are whole dims, as in most checkpoints.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_length <= 0 or not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(f"{self}: factor, original_length and betas are positive, and beta_slow is not more than beta_fast")

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """The frequencies [R/2], slowed down where they are slow."""
        rotary_dim = 2 * frequencies.shape[0]

        def turning(turns: float) -> float:
            """The dim, as a real number, that turns so often within original_length."""
            return rotary_dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = turning(self.beta_fast), turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        index = torch.arange(frequencies.shape[0], dtype=frequencies.dtype, device=frequencies.device)
        # An empty ramp is a step; transformers gives it the width 0.001.
        slowed = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequencies * (1 - slowed + slowed / self.factor)


def rotary_table(
    positions: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype, scaling: YarnScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, R/2], of integer positions [T].

    rotary_dim: R, the head dim, or less, where only the first R dims of each head rotate. Raises ValueError when it is odd.
    """
    frequencies = _frequencies(rotary_dim, theta, positions.device)
    return _table(positions[None], [], frequencies, theta, dtype, scaling)


def mrope_table(
    positions_3T: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype, sections: tuple[int, int, int],
    interleaved: bool = False, scaling: YarnScaling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cos and sin, each [T, R/2], of positions (time, row, column) [3, T].

    sections: how many of the R/2 pairs turn with time, row and column: (16, 24, 24) in Qwen2-VL, one section after the other;
    (24, 20, 20) in Qwen3-VL, ``interleaved``: time, row, column, time, ... until row and column have theirs, and time after that.
    Raises ValueError when positions or sections do not fit.
    """
    half = rotary_dim // 2
    if positions_3T.dim() != 2 or positions_3T.shape[0] != 3:
        raise ValueError(f"mrope_table: positions {tuple(positions_3T.shape)}; expected [3, T]")
    if len(sections) != 3 or sum(sections) != half or (interleaved and max(3 * sections[1] - 2, 3 * sections[2] - 1) >= half):
        raise ValueError(
            f"mrope_table: sections {sections} of {half} pairs; expected three with that sum, none beyond it when interleaved"
        )
    if interleaved:
        pairs = [slice(axis, 3 * sections[axis], 3) for axis in (1, 2)]
    else:
        pairs = [slice(sections[0], half - sections[2]), slice(half - sections[2], half)]
    return _table(positions_3T, pairs, _frequencies(rotary_dim, theta, positions_3T.device), theta, dtype, scaling)


def rotary_table_2d(positions_2T: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, R/2], of positions (row, column) [2, T], as Qwen2-VL's vision tower takes them.

    The first half of the pairs turns with the row, the second with the column, both with the frequencies of R/2 dims.
    Raises ValueError when rotary_dim is no multiple of four or positions do not fit.
    """
    if positions_2T.dim() != 2 or positions_2T.shape[0] != 2 or rotary_dim % 4:
        raise ValueError(
            f"rotary_table_2d: positions {tuple(positions_2T.shape)}, rotary_dim {rotary_dim}; expected [2, T] and a multiple of 4"
        )
    frequencies = _frequencies(rotary_dim // 2, theta, positions_2T.device).repeat(2)
    return _table(positions_2T, [slice(rotary_dim // 4, None)], frequencies, theta, dtype, None)


def _frequencies(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim {rotary_dim} is not a positive even number; dims turn in pairs")
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)


def _table(
    positions_AT: Tensor, pairs: Sequence[slice], frequencies: Tensor, theta: float, dtype: torch.dtype, scaling: YarnScaling | None
) -> tuple[Tensor, Tensor]:
    """pairs: which turn with each row of positions after the first; the rest turn with the first."""
    magnitude = 1.0
    if scaling is not None:
        frequencies, magnitude = scaling.scale(frequencies, theta), scaling.magnitude
    positions = positions_AT.to(torch.float64)[..., None]
    angle = positions[0] * frequencies
    # By slices: a list of indices would be copied to the GPU at each call, which waits for it and cannot be captured in a graph.
    for position, some in zip(positions[1:], pairs, strict=True):
        angle[:, some] = position * frequencies[some]
    return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)
