"""What a compiled kernel takes and how it computes, read from its binary (NVIDIA) or its assembly (AMD)."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from .chips import CHIPS
from .loops import Code, count, innermost_loops, parse_amdgcn, parse_sass


def figures(kernel: Any, target: str) -> dict[str, Any]:
    """The figures of a Triton ``CompiledKernel``, a JSON object:

    registers  of a thread (AMD: vector registers, accumulators included)
    stack      bytes a thread
    spills     instructions that move registers to or from local memory (AMD: registers spilled)
    shared     bytes a block, static and dynamic
    tensor     columns of tensor memory, where the chip has it
    matrix     wgmma, tcgen05, mma, mfma, or ""
    copies     asynchronous copies to shared memory, instructions
    loops      of each innermost loop what ``loops.count`` gives; that with most matrix work first

    Kept in Triton's cache beside the binary: disassembling takes as long as compiling.
    """
    from triton.runtime.cache import get_cache_manager

    chip, read = CHIPS[target], _nvidia if CHIPS[target].backend == "cuda" else _amd
    kept, name = get_cache_manager(kernel.hash), f"smalt-{_version()}.json"
    if path := kept.get_file(name):
        return json.loads(Path(path).read_text())
    found, code = read(kernel, target)
    found["loops"] = [count(loop, chip, kernel.metadata.num_warps) for loop in innermost_loops(code)]
    kept.put(json.dumps(found), name, binary=False)
    return found


@cache
def _version() -> str:
    """Changes with the code that reads binaries."""
    files = [Path(__file__).with_name(name) for name in ("chips.py", "loops.py", "machine_code.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _nvidia(kernel: Any, target: str) -> tuple[dict[str, Any], Code]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = parse_sass(_tool("nvdisasm", "-c", file.name), CHIPS[target])
    taken = re.search(rf"Function {re.escape(kernel.metadata.name)}:\s*REG:(\d+) STACK:(\d+)", usage)
    if taken is None:
        raise RuntimeError(f"cuobjdump did not say what {kernel.metadata.name} takes: {usage.strip()!r}")
    opcodes = [i.opcode for i in code.instructions]
    found = {
        "registers": int(taken[1]),
        "stack": int(taken[2]),
        "spills": sum(o.split(".")[0] in ("LDL", "STL") for o in opcodes),
        "shared": kernel.metadata.shared,
        "matrix": _matrix(opcodes),
        "copies": sum(o.split(".")[0] in ("LDGSTS", "UTMALDG", "UBLKCP") for o in opcodes),
    }
    if tensor := getattr(kernel.metadata, "tmem_size", 0):
        found["tensor"] = tensor
    return found, code


def _matrix(opcodes: list[str]) -> str:
    """The most capable kind of matrix instruction that the code has."""
    for kind, pattern in (("tcgen05", r"UTC\w*MMA"), ("wgmma", r"[HIBQ]GMMA"), ("mma", r"[HIBDQO]MMA")):
        if any(re.match(pattern + r"(\.|$)", o) for o in opcodes):
            return kind
    return ""


def _tool(name: str, *args: str) -> str:
    import triton

    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _amd(kernel: Any, target: str) -> tuple[dict[str, Any], Code]:
    text = kernel.asm["amdgcn"]
    code = parse_amdgcn(text)

    def noted(name: str) -> int:
        value = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        return int(value[1]) if value else 0

    copies = re.findall(r"^\t(?:global_load_lds\w*|buffer_load\w*.*\blds\b)", text, re.MULTILINE)
    found = {
        "registers": noted("vgpr_count"),
        "stack": noted("private_segment_fixed_size"),
        "spills": noted("vgpr_spill_count"),
        "shared": kernel.metadata.shared,
        "matrix": "mfma" if any(i.kind == "matrix" for i in code.instructions) else "",
        "copies": len(copies),
        "scalar_registers": noted("sgpr_count"),
        "accumulators": noted("agpr_count"),
    }
    return found, code
