"""A recorded launch, compiled for a chip that need not be there, exactly as Triton specialises it at run time.

A kernel is compiled for the types of its arguments and for what Triton sees in their values: a pointer or an integer that is a
multiple of 16, an integer that is 1, a buffer under 2 GiB (AMD). Without these the result means nothing: loads are not
vectorised, copies are not asynchronous, and registers spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from smalt.kernels.launch import INTERPRET, Launch

from .chips import CHIPS

_TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
_MULTIPLE_OF_16 = ["tt.divisibility", 16]
_UNDER_2_GIB = ["tt.pointer_range", 32]


@dataclass(frozen=True)
class Compiled:
    """kernel: Triton's CompiledKernel; cached: taken from Triton's cache."""

    kernel: Any
    cached: bool


def compile_launch(launch: Launch) -> Compiled:
    """Compile a launch for its target. Raises RuntimeError in a process that interprets kernels, and whatever Triton raises."""
    if INTERPRET:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them; unset it")
    import triton
    from triton.compiler import ASTSource

    chip = CHIPS[launch.target]
    signature, constants, attributes = specialize(launch.kernel, launch.args, launch.constants, amd=chip.backend == "hip")
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages, "enable_fp_fusion": True}
    hits: list[bool] = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    try:
        source = ASTSource(launch.kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=chip.gpu_target(), options=options)
    finally:
        triton.knobs.compilation.listener = before
    return Compiled(kernel, bool(hits) and all(hits))


def specialize(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], amd: bool = False) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a kernel (a JITFunction) for arguments, as ``ASTSource`` takes them."""
    bound = kernel.signature.bind(*args, **constants)
    bound.apply_defaults()
    signature: dict[str, Any] = {}
    fixed: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def visit(value: Any, at: tuple[int, ...], constant: bool, free: bool) -> Any:
        """The type of a value; of a tuple, those of its members."""
        if isinstance(value, tuple) and not constant:
            return tuple(visit(member, (*at, i), False, free) for i, member in enumerate(value))
        if constant or value is None or (free and type(value) is int and value == 1):
            fixed[at] = value
            return "constexpr"
        seen = []
        if free and _is_multiple_of_16(value):
            seen.append(_MULTIPLE_OF_16)
        if free and amd and isinstance(value, torch.Tensor) and value.untyped_storage().size() < 2**31:
            seen.append(_UNDER_2_GIB)
        if seen:
            attributes[at] = seen
        return _type(value)

    for parameter, value in zip(kernel.params, bound.arguments.values(), strict=True):
        at, free = (parameter.num,), not parameter.do_not_specialize
        signature[parameter.name] = visit(value, at, parameter.is_constexpr, free)
    return signature, fixed, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel cannot take {value!r}: give it a tensor, an int, a float or None, or declare it constexpr")


def _is_multiple_of_16(value: Any) -> bool:
    """A tensor counts by where it starts in its storage, which torch's allocator aligns to far more than 16 bytes."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0
