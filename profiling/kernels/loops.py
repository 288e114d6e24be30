"""The loops of machine code, what an iteration of each issues, and what that allows of the chip's peak.

    code -> basic blocks -> dominators -> natural loops -> the innermost ones -> instructions by class -> cycles by pipe

Counts are of one warp. Both sides of a branch inside a loop count. Loops that only wait on a barrier are not counted as loops, and
their instructions not at all.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from .chips import SCHEDULERS, Chip

CLASSES = ("matrix", "special", "fp32", "convert", "integer", "uniform", "memory", "shuffle", "control")


@dataclass(frozen=True)
class Instruction:
    """kind: one of CLASSES; mask: compares or selects; flop: of a matrix instruction, the share of one warp (``whole``: of the block);
    scale: its rate over that of bf16; bytes: that a warp moves to or from shared memory or L1; pipe, cycles: of a scheduler."""

    opcode: str
    kind: str
    predicated: bool = False
    target: str = ""
    ends: bool = False
    mask: bool = False
    flop: int = 0
    whole: bool = False
    scale: float = 1.0
    bytes: int = 0
    pipe: str = ""
    cycles: float = 1.0


@dataclass(frozen=True)
class Code:
    """instructions of all functions, one after another; labels: where they point; starts: the first of each function."""

    instructions: list[Instruction]
    labels: dict[str, int]
    starts: list[int]


# NVIDIA: SASS, as nvdisasm prints it


def _opcodes(names: str) -> frozenset[str]:
    return frozenset(names.split())


_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+|\.text\.\S+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_MATRIX = re.compile(r"^([HIBDQO]G?MMA|UTC\w*MMA)$")
_CONTROL = _opcodes(
    "ACQBULK ARRIVES BAR BMOV BPT BRA BRX BRXU BREAK BSSY BSYNC CALL DEPBAR ELECT ERRBAR EXIT FENCE JMP JMX KILL LDGDEPBAR "
    "MEMBAR NANOSLEEP NOP PREEXIT RET SYNCS UCGABAR_ARV UCGABAR_WAIT UTCBAR UTMACMDFLUSH WARPGROUP WARPSYNC YIELD"
)
_CONVERT = _opcodes("F2F F2FP F2I F2IP FRND I2F I2FP")
_FP32 = _opcodes("DADD DFMA DMUL FADD FADD2 FADD32I FCHK FFMA FFMA2 FFMA32I FMNMX FMNMX3 FMUL FMUL2 FMUL32I FSWZADD")
_HALF = _opcodes("HADD2 HADD2_32I HFMA2 HFMA2_MMA HMNMX2 HMUL2")
_MASK = _opcodes("DSETP FSEL FSET FSETP HSET2 HSETP2 ISETP P2R PLOP3 R2P SEL")
_SHUFFLE = _opcodes("MATCH MOVM REDUX SHFL VOTE")
_MEMORY = re.compile(r"^(LD|ST|RED|ATOM|UTMA|UBLK|UTCCP|CCTL|QSPC|UTCATOM)(?!.*DEPBAR)")


def parse_sass(text: str, chip: Chip) -> Code:
    """The output of ``nvdisasm -c`` for a cubin."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    starts: list[int] = []
    immediates: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
            if label[1].startswith(".text."):
                starts.append(len(instructions))
        elif match := _LINE.match(line):
            predicate, opcode, suffix, operands = match.groups()
            if moved := re.fullmatch(r"(UR\d+), 0x([0-9a-f]+)", operands):
                immediates[moved[1]] = int(moved[2], 16)
            elif written := re.match(r"(UR\d+),", operands):
                immediates.pop(written[1], None)
            instructions.append(_sass(opcode, suffix, operands, predicate or "", immediates, chip))
    return Code(instructions, labels, starts or [0])


def _sass(opcode: str, suffix: str, operands: str, predicate: str, immediates: dict[str, int], chip: Chip) -> Instruction:
    full = opcode + suffix
    if predicate == "!PT":
        return Instruction(full, "control")  # never runs; the compiler's way to wait
    if _MATRIX.match(opcode):
        flop, whole = _matrix_flop(opcode, suffix, operands, immediates)
        scale = 2.0 if opcode[0] in "IQO" or "QMMA" in opcode else 0.5 if "TF32" in suffix else 1.0
        return Instruction(full, "matrix", flop=flop, whole=whole, scale=scale, pipe="matrix", cycles=0.0)
    if opcode in _CONTROL:
        target = _TARGET.search(operands)
        unconditional = not predicate and (opcode != "BRA" or (not suffix and operands.startswith("`")))
        ends = opcode in ("BRA", "EXIT", "RET", "BRX", "BRXU", "JMP", "KILL") and unconditional
        jumps = opcode in ("BRA", "JMP")
        return Instruction(full, "control", bool(predicate), target[1] if target and jumps else "", ends)
    cost = SCHEDULERS * chip.warp_size
    if opcode == "MUFU":
        return Instruction(full, "special", pipe="special", cycles=cost / chip.special)
    if opcode in _CONVERT or (opcode == "HADD2" and ".F32" in suffix):
        # F2FP packs on the ALU pipe, HADD2.F32 is an FP16 addition; the others share the unit of the special functions.
        pipe, lanes = {"F2FP": ("alu", chip.alu), "HADD2": ("fma", chip.fma)}.get(opcode, ("special", chip.special))
        return Instruction(full, "convert", pipe=pipe, cycles=cost / lanes)
    if opcode in _FP32 or opcode in _HALF:
        on_alu = opcode.startswith(("FMNMX", "FCHK", "HMNMX"))
        cycles = cost / (chip.alu if on_alu else chip.fma) * (2 if opcode in ("FFMA2", "FADD2", "FMUL2") else 1)
        return Instruction(full, "fp32", pipe="alu" if on_alu else "fma", cycles=cycles)
    if opcode in _SHUFFLE:
        return Instruction(full, "shuffle", pipe="shared", cycles=cost / chip.shuffle)
    if _MEMORY.match(opcode):
        moved = _bytes(opcode, suffix, chip)
        return Instruction(full, "memory", bytes=moved, pipe="shared", cycles=max(1.0, SCHEDULERS * moved / chip.bandwidth))
    if opcode.startswith(("U", "R2UR", "S2UR", "VOTEU", "REDUX")):
        return Instruction(full, "uniform")
    # IMAD runs on half of the FP32 lanes, everything else on integers on the ALU pipe: 64 lanes either way.
    pipe = "fma" if opcode.startswith("IMAD") else "alu"
    return Instruction(full, "integer", mask=opcode in _MASK, pipe=pipe, cycles=cost / chip.alu)


def _matrix_flop(opcode: str, suffix: str, operands: str, immediates: dict[str, int]) -> tuple[int, bool]:
    """FLOP of a matrix instruction, and whether they are the block's rather than a warp's."""
    if "GMMA" in opcode and (shape := re.search(r"\.(\d+)x(\d+)x(\d+)", suffix)):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k // 4, False  # a warpgroup of 4 warps issues it together
    if opcode.startswith("UTC"):
        # tcgen05: M and N stand in the instruction descriptor, K is 32 bytes.
        descriptor = re.search(r"idesc\[(UR\d+)\]", operands)
        value = immediates.get(descriptor[1], 0) if descriptor else 0
        m, n, wide = (value >> 24 & 0x1F) << 4, (value >> 17 & 0x3F) << 3, value >> 7 & 7 == 2
        return 2 * m * n * (32 if "QMMA" in opcode else 8 if wide else 16), True
    if shape := re.match(r"\.168(\d+)\b", suffix):
        return 2 * 16 * 8 * int(shape[1]), False
    if suffix.startswith(".884"):
        return 2 * 8 * 8 * 4, False
    return 0, False


def _bytes(opcode: str, suffix: str, chip: Chip) -> int:
    """Bytes that a warp moves; 0 for what goes another way (constants, tensor memory, bulk copies by the engine)."""
    if opcode in ("LDSM", "STSM"):
        matrices = re.search(r"\.M\w*88\.(\d)", suffix) or re.search(r"\.(\d)$", suffix)
        return 128 * int(matrices[1] if matrices else 1)
    if opcode not in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "LD", "ST"):
        return 0
    width = re.search(r"\.(?:LTC)?(?:[US]?(8|16)|(32|64|128|256))\b", suffix)
    return chip.warp_size * (int(width[1] or width[2]) if width else 32) // 8


# AMD: assembly, as LLVM prints it

_AMD_LABEL = re.compile(r"^(\.LBB\w+|[A-Za-z_]\w*):")
_AMD_LINE = re.compile(r"^\t([a-z]\w+)(?:\s+(.*?))?\s*(?:;.*)?$")
_AMD_KINDS = (
    ("matrix", r"v_s?mfma_|v_wmma_"),
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("convert", r"v_cvt_"),
    ("fp32", r"v_(pk_)?(add|sub|subrev|mul|mac|fma|fmac|mad|max|max3|maximum3|min|min3|med3|ldexp)_(legacy_)?f(16|32|64)"),
    ("shuffle", r"ds_(swizzle|permute|bpermute)|v_permlane|v_\w+_dpp$|v_(readlane|writelane|readfirstlane)"),
    ("memory", r"ds_|global_|buffer_|flat_|scratch_|s_load|s_buffer_load"),
    ("control", r"s_(waitcnt|barrier|branch|cbranch|nop|endpgm|sleep|setprio|sched_|clause|code_end)"),
    ("uniform", r"s_"),
    ("integer", r"v_"),
)
_AMD_KIND = [(kind, re.compile(pattern)) for kind, pattern in _AMD_KINDS]


def parse_amdgcn(text: str) -> Code:
    """The assembly that Triton makes for an AMD chip."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    starts: list[int] = []
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(instructions)
            if not label[1].startswith("."):
                starts.append(len(instructions))
        elif match := _AMD_LINE.match(line):
            opcode, operands = match[1], match[2] or ""
            kind = next((kind for kind, pattern in _AMD_KIND if pattern.match(opcode)), None)
            if kind is None:
                continue
            shape = re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode)
            flop = 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0
            jump = operands if opcode.startswith(("s_branch", "s_cbranch")) else ""
            ends = opcode in ("s_branch", "s_endpgm")
            mask = opcode.startswith(("v_cmp", "v_cndmask"))
            instructions.append(Instruction(opcode, kind, target=jump, ends=ends, mask=mask, flop=flop))
    return Code(instructions, labels, starts or [0])


# Loops


def innermost_loops(code: Code) -> list[list[Instruction]]:
    """The bodies of the loops that hold no other loop, those with most matrix work first, then the longest."""
    bodies = {header: body for header, body in _natural_loops(code).items() if not _only_waits(code, body)}
    waits = [body for body in _natural_loops(code).values() if _only_waits(code, body)]
    waiting = set().union(*waits)
    inner = [b for b in bodies.values() if not any(other < b for other in bodies.values())]
    loops = [[code.instructions[i] for i in sorted(body - waiting)] for body in inner]
    return sorted(loops, key=lambda loop: (-sum(i.flop for i in loop), -len(loop)))


def _only_waits(code: Code, body: set[int]) -> bool:
    # A barrier in shared memory, or the allocation of tensor memory.
    return len(body) <= 8 and any(code.instructions[i].opcode.startswith(("SYNCS", "UTCATOMSWS")) for i in body)


def _natural_loops(code: Code) -> dict[int, set[int]]:
    """The instructions (by number) of each natural loop, by the number of its first."""
    count = len(code.instructions)
    leaders = {*code.starts, *code.labels.values()} | {i + 1 for i, x in enumerate(code.instructions) if x.ends or x.target}
    first = sorted(i for i in leaders if i < count)
    number = {start: b for b, start in enumerate(first)}
    last = [*(start - 1 for start in first[1:]), count - 1]
    after: list[list[int]] = []
    for b, end in enumerate(last):
        x = code.instructions[end]
        goes = [number[code.labels[x.target]]] if x.target and code.labels.get(x.target, count) < count else []
        after.append(goes if x.ends or b + 1 == len(first) else [*goes, b + 1])
    dominators = _dominators(after, [number[s] for s in code.starts if s in number])
    before: list[list[int]] = [[] for _ in first]
    for b, goes in enumerate(after):
        for to in goes:
            before[to].append(b)
    loops: dict[int, set[int]] = {}
    for b, goes in enumerate(after):
        for header in goes:
            if b in dominators and dominators[b] >> header & 1:
                body, todo = {header}, [b]
                while todo:
                    if (block := todo.pop()) not in body:
                        body.add(block)
                        todo += [p for p in before[block] if p in dominators]
                loops.setdefault(first[header], set()).update(i for block in body for i in range(first[block], last[block] + 1))
    return loops


def _dominators(after: list[list[int]], roots: list[int]) -> dict[int, int]:
    """For each block that can be reached, the set of its dominators as bits."""
    order: list[int] = []
    seen: set[int] = set()
    todo = [(root, False) for root in roots]
    while todo:
        block, done = todo.pop()
        if done:
            order.append(block)
        elif block not in seen:
            seen.add(block)
            todo += [(block, True), *((to, False) for to in after[block])]
    before: dict[int, list[int]] = {b: [] for b in seen}
    for b in seen:
        for to in after[b]:
            before[to].append(b)
    everything = (1 << len(after)) - 1
    dominators = {b: 1 << b if b in roots else everything for b in seen}
    changed = True
    while changed:
        changed = False
        for b in reversed(order):
            if b in roots:
                continue
            common = everything
            for p in before[b]:
                common &= dominators[p]
            if common | 1 << b != dominators[b]:
                dominators[b], changed = common | 1 << b, True
    return dominators


# Counts and bounds


def count(loop: list[Instruction], chip: Chip, num_warps: int) -> dict[str, Any]:
    """What an iteration issues, a JSON object: total, by class, mask; with matrix instructions on a chip whose rates are known, also
    cycles (an SM's, by pipe, of one block) and the bound on percent of peak, ``overlap`` and ``alone``.

    overlap: the pipes and the issue slots run side by side, the longest counts; alone: one after another, all count.
    """
    kinds = Counter(i.kind for i in loop)
    found: dict[str, Any] = {"total": len(loop), **{k: kinds[k] for k in CLASSES if kinds[k]}, "mask": sum(i.mask for i in loop)}
    work = sum(i.flop / i.scale * (1 if i.whole else num_warps) for i in loop)
    if not work or not chip.matrix:
        return found
    share = num_warps / SCHEDULERS
    cycles: defaultdict[str, float] = defaultdict(float)
    for i in loop:
        cycles[i.pipe or "other"] += i.cycles * share
    cycles["matrix"] = work / chip.matrix
    issue = len(loop) * share
    return {
        **found,
        "cycles": {pipe: round(n) for pipe, n in sorted(cycles.items()) if pipe != "other"} | {"issue": round(issue)},
        "overlap": round(100 * cycles["matrix"] / max(issue, *cycles.values()), 1),
        "alone": round(100 * cycles["matrix"] / sum(cycles.values()), 1),
    }
