"""What ``smalt kernels tune`` runs: operations of the benchmark, of its sizes or others, that together launch every row of a chip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from smalt.kernels.attention import attention, attention_plan
from smalt.kernels.policy_loss import sequence_log_ratio_sums

from .bench_attention import ATTENTION
from .bench_cases import (
    FFN,
    HEAD_DIM,
    PACKS,
    PATCHES,
    TILES,
    VISION_HEADS,
    VISION_WIDTH,
    WIDTH,
    Call,
    Contestant,
    Given,
    Operation,
    Shape,
    call,
    document_lengths,
    leaf,
    smalt,
)
from .bench_head import DISTILLATION, HEAD, MATMUL
from .bench_rows import ADAMW, ADD_RMS_NORM, DECODE_ATTENTION, LAYER_NORM, NORM_ROTARY, POLICY_LOSS, ROTARY, SWIGLU
from .bench_time import Runner
from .cases import SOFTCAP

DTYPES = {16: torch.bfloat16, 32: torch.float32}


@dataclass(frozen=True)
class Workload:
    """An operation, one shape, and of how many bits its numbers are."""

    operation: Operation
    shape: Shape
    bits: int

    @property
    def name(self) -> str:
        return f"{self.operation.name}, {self.shape.name}, {self.bits} bits"

    def inputs(self, device: str) -> Given:
        """Inputs in which all that had the first one's dtype is of ``bits``; for an optimiser, which makes its own, the dtype."""
        torch.manual_seed(0)
        given, dtype = self.operation.inputs(self.shape, device), DTYPES[self.bits]
        if "dtype" in given:
            return {**given, "dtype": dtype}
        kind = given["args"][0].dtype
        alike = [torch.is_tensor(x) and x.dtype == kind for x in given["args"]]
        args = (
            x.detach().to(dtype).requires_grad_(x.requires_grad) if same else x for x, same in zip(given["args"], alike, strict=True)
        )
        return {**given, "args": tuple(args)}

    def runner(self, given: Given) -> Runner:
        """Smalt's contestant, with state of its own."""
        return Runner(self.operation.contestants[0].prepare(given), self.operation.parts)


def _at(operation: Operation, name: str, **sizes: Any) -> tuple[Operation, Shape]:
    """The operation at its first shape, but for these sizes."""
    return operation, Shape(name, {**operation.shapes[0].sizes, **sizes})


def _capped_attention(given: Given) -> Call:
    start, end = given["start"], given["end"]
    plan = attention_plan(start, end, len(start))
    return call(lambda q, k, v: attention(q, k, v, start, end, plan=plan, softcap=SOFTCAP), given["args"])


def _with_bias(shape: Shape, device: str) -> Given:
    return {"args": (*MATMUL.inputs(shape, device)["args"], leaf(shape["N"], device=device))}


def _sequences(shape: Shape, device: str) -> Given:
    logprob, old, _, weight, provenance, _ = POLICY_LOSS.inputs(shape, device)["args"]
    lengths = torch.tensor(document_lengths(shape["T"]))
    index = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    return {"args": (logprob.detach(), old, weight, provenance, index, len(lengths))}


CAPPED = replace(ATTENTION, name="attention with soft cap", contestants=(Contestant("smalt", _capped_attention),))
BIASED = replace(MATMUL, name="matmul with bias", inputs=_with_bias)
SEQUENCES = replace(
    POLICY_LOSS, name="sequence_log_ratio", inputs=_sequences, contestants=(smalt(sequence_log_ratio_sums),), parts=("forward",)
)
_PACK = document_lengths(PACKS["8k"])
_VISION = {"lengths": [PATCHES] * TILES["16 tiles"], "causal": False, "H": VISION_HEADS, "K": VISION_HEADS}
# The first that launches a row tunes it. So of widths that share one (fp32 has fewer rows than 16 bits) the model's own comes first.
_SHAPES: tuple[tuple[Operation, Shape], ...] = (
    *(
        case
        for operation in (ATTENTION, CAPPED)
        for case in (
            _at(operation, "documents, 8k, 20 / 4 heads of 128", lengths=_PACK),
            _at(operation, "16 tiles, 16 heads of 72", **_VISION, D=VISION_WIDTH // VISION_HEADS),
            *(_at(operation, f"documents, 8k, 20 / 4 heads of {D}", lengths=_PACK, D=D) for D in (64, 256)),
        )
    ),
    *(_at(DECODE_ATTENTION, f"64 sequences, heads of {D}", D=D) for D in (HEAD_DIM, 80, 256)),
    # Rows of a pack, or of its heads: as many numbers as the model's width makes, or more.
    *(_at(ADD_RMS_NORM, f"width {D}", D=D, T=max(1, WIDTH // D) * PACKS["8k"]) for D in (WIDTH, HEAD_DIM, 2048, 8192)),
    *(_at(LAYER_NORM, f"width {D}", D=D, T=max(1, WIDTH // D) * PACKS["8k"]) for D in (VISION_WIDTH, HEAD_DIM, 4096, 8192)),
    _at(ROTARY, "8k"),
    _at(NORM_ROTARY, "8k"),
    _at(SWIGLU, "8k"),
    _at(HEAD, "8k"),
    _at(DISTILLATION, "8k"),
    _at(BIASED, "8k"),
    _at(POLICY_LOSS, "32k", T=PACKS["32k"]),
    _at(SEQUENCES, "32k", T=PACKS["32k"]),
    _at(ADAMW, f"{FFN} x {FFN}", parameters=[(FFN, FFN)]),
)
WORKLOADS = tuple(Workload(operation, shape, bits) for operation, shape in _SHAPES for bits in DTYPES)
