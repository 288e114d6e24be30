"""No index of any kernel overflows 32 bits: read from Triton's own intermediate code, for every launch of every operation.

A row, a head or a position fits into 32 bits; times a stride it need not. So where a product leads to an address it is formed in 64
bits, or one factor is harmless: the size of a tile (a program's number times its tile is again a row), a number up to 8, or
the query heads of a key's head.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from smalt.kernels.launch import TABLES, Config, Launch, jit, recording, tl

TARGET = "sm_90"
NAME = re.compile(r"%[\w$.-]+")
LINE = re.compile(r"\s*(?:(%[\w$.-]+)(?::\d+)? = )?\"?([a-z_]+\.[\w.]+)\"?(.*)")


@dataclass
class Code:
    """What the values of one function come from: operator, operands, text of the line."""

    operator: dict[str, str] = field(default_factory=dict)
    operands: dict[str, set[str]] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    offsets: list[str] = field(default_factory=list)


def parse(text: str) -> list[Code]:
    """The functions of a module; the values of a loop come from where it starts and from what an iteration yields."""
    functions, regions = [], []
    for line in text.splitlines():
        line = line.split(" loc(")[0]
        if "tt.func" in line:
            functions.append(Code())
            continue
        match = LINE.match(line)
        if not match or not functions:
            if line.strip().startswith("}") and regions and not line.strip().endswith("{"):
                regions.pop()
            continue
        result, operator, rest = match.groups()
        code, operands = functions[-1], set(NAME.findall(rest))
        if operator == "tt.addptr":
            code.offsets.append(NAME.findall(rest)[1])
        if operator == "scf.yield" and regions:
            for name in regions[-1]:
                code.operands[name] |= operands
        names = [result] if result else []
        if operator == "scf.for":
            names += re.findall(r"(%[\w$.-]+) = ", rest)
        for name in names:
            code.operator[name], code.text[name] = operator, line.strip()
            code.operands[name] = operands - {name}
        if line.rstrip().endswith("{"):
            regions.append(names)
    return functions


def narrow_products(text: str, harmless: set[int]) -> list[str]:
    """The products in 32 bits that lead to an address and have no harmless factor."""
    found = []
    for code in parse(text):

        def constant(name, code=code):
            if code.operator.get(name) == "tt.splat":
                (name,) = code.operands[name]
            value = re.search(r"arith\.constant (?:dense<)?(-?\d+)", code.text.get(name, ""))
            return int(value.group(1)) if value else None

        seen, left = set(), list(code.offsets)
        while left:
            name = left.pop()
            # A loaded index is a row again; where it was loaded from is an address of its own.
            if name in seen or code.operator.get(name) in (None, "tt.load", "tt.addptr"):
                continue
            seen.add(name)
            left += code.operands[name]
            narrow = code.operator[name] == "arith.muli" and re.search(r": (tensor<[\dx]*)?i32>?$", code.text[name])
            if narrow and not any(factor == "%groups" or constant(factor) in harmless for factor in code.operands[name]):
                found.append(code.text[name])
    return found


def intermediate_code(launch: Launch) -> str:
    """A launch as Triton's intermediate code, calls inlined."""
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    from smalt.profiling.kernels.chips import CHIPS
    from smalt.profiling.kernels.compile import specialize

    target = CHIPS[launch.target].gpu_target()
    compiler = make_backend(target)
    options = compiler.parse_options({"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True})
    source = ASTSource(launch.kernel, *specialize(launch.kernel, launch.args, launch.constants))
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    module = source.make_ir(target, options, compiler.get_codegen_implementation(options), compiler.get_module_map(), context)
    stages = {}
    compiler.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


@jit
def _planted_kernel(x, out, stride, BLOCK: tl.constexpr, WHERE: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WHERE == "before":
        offset = t.to(tl.int64) * stride
    elif WHERE == "after":
        offset = (t * stride).to(tl.int64)
    else:
        offset = t * 0
        for _ in range(BLOCK):
            offset += t * 24
    tl.store(out + t, tl.load(x + offset))


def _attention_launches(size, dtype):
    from smalt.kernels.attention_kernels import launch_backward, launch_forward

    T, H, K = 100, 6, 3
    meta = {"dtype": dtype, "device": "meta"}
    q, k, v, dout = (torch.empty(heads, T, size, **meta).transpose(0, 1) for heads in (H, K, K, H))
    bounds, lse = torch.empty(3, T, dtype=torch.int32, device="meta"), torch.empty(H, T, device="meta")
    for softcap in (0.0, 2.0):
        launch_forward(q, k, v, bounds, 1.0, softcap)
        launch_backward(q, k, v, bounds, bounds, torch.empty(T, H, size, **meta), lse, dout, lse, 1.0, softcap)


def main() -> None:
    """Print, as JSON, the narrow products of each launch: in a process of its own, since this one interprets kernels."""
    from smalt.profiling.kernels.cases import CASES

    # The tiles of the interpreter are small, so that no stride is one.
    rows = [row for file in sorted(TABLES.glob("*.json")) for row in json.loads(file.read_text())]
    rows = [row | {"target": TARGET} for row in rows if row["target"] == "interpreter"]
    launches = [(call, size) for case in CASES for size in case.sizes for call in case.launches]
    launches += [(_attention_launches, size) for size in (72, 128)]
    found = {}
    with recording(TARGET, rows) as record:
        for call, size in launches:
            call(size, torch.bfloat16)
    x = torch.empty(9, device="meta")
    for where in ("before", "after", "loop"):
        config = Config({"BLOCK": 16}, 4, 1)
        record.append(Launch(_planted_kernel, (1,), (x, x, 7), {"BLOCK": 16, "WHERE": where}, config, f"planted {where}", TARGET))
    for launch in record:
        harmless = {*range(1, 9), *launch.config.tiles.values()}
        found.setdefault(launch.name, []).extend(narrow_products(intermediate_code(launch), harmless))
    print(json.dumps(found))


@pytest.mark.slow
def test_products_that_lead_to_an_address_are_formed_in_64_bits():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert not found.pop("planted before")
    assert len(found.pop("planted after")) == 1
    assert len(found.pop("planted loop")) == 1
    assert {"attention_forward", "attention_dq", "attention_dkv"} <= found.keys()
    assert {name: products for name, products in found.items() if products} == {}


if __name__ == "__main__":
    main()
