"""Limits and issue rates of the chips that the launch tables name.

Sources: the CUDA C++ Programming Guide, tables "Technical Specifications per Compute Capability" (shared memory of a block) and
"Throughput of Native Arithmetic Instructions" (lanes); "Pipelines" in the Nsight Compute documentation (which instruction runs
where); the whitepapers of A100, H100, B200 and RTX PRO 6000 Blackwell (matrix rate: dense bf16 TFLOP/s over SMs and boost clock, which
gives a power of two on each); AMD's CDNA 3 and CDNA 4 whitepapers (LDS). Where the guide's table ends before a chip, the rates of
sm_90 stand in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KIB = 1024
SCHEDULERS = 4  # of an SM, each with its own pipes and one instruction a cycle; shared memory is the SM's


@dataclass(frozen=True)
class Chip:
    """backend, arch, warp_size: what Triton calls it; shared: bytes a block may have; matrix: dense bf16 FLOP a cycle and SM, fp32
    sums; fma, alu, special, shuffle: lanes an SM; bandwidth: bytes of shared memory a cycle and SM.

    The rates of AMD's chips are not filled in: 0.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared: int
    matrix: int = 0
    fma: int = 128
    alu: int = 64
    special: int = 16
    shuffle: int = 32
    bandwidth: int = 128

    def gpu_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 163 * KIB, matrix=2048, fma=64),
    "sm_90": Chip("cuda", 90, 32, 227 * KIB, matrix=4096),
    "sm_100": Chip("cuda", 100, 32, 227 * KIB, matrix=8192),
    "sm_120": Chip("cuda", 120, 32, 99 * KIB, matrix=1024),
    "gfx942": Chip("hip", "gfx942", 64, 64 * KIB),
    "gfx950": Chip("hip", "gfx950", 64, 160 * KIB),
}
TENSOR_MEMORY = 512  # columns of sm_100's tensor memory
