"""Time and memory of calls on a GPU.

A run is enqueued behind work that keeps the GPU busy longer than the host takes to enqueue it, so that a kernel of a few
microseconds is timed and not the gap before it. That work reads a buffer larger than the L2 cache, so that every part starts from
memory; were the buffer written instead, the kernel would be charged for writing it back. A part that waits for the GPU by itself uses
the backlog up, and its wait counts. Contestants take turns run by run, in an order that rotates, so that clocks drift alike for all.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .bench_cases import Call

FILLER_BYTES = 512 * 2**20
HOST_MARGIN, MOST_BACKLOG = 2.0, 0.05  # times the host's time; seconds
FEWEST, MOST = 7, 200  # rounds
WARM_UP = 3
QUANTILES = {"p20": 20, "median": 50, "p80": 80}


class Device(Protocol):
    """What timing needs of a device: work that takes about so long, marks on the stream, and memory."""

    name: str

    def fill(self, seconds: float) -> None: ...
    def mark(self) -> Any: ...
    def seconds(self, first: Any, second: Any) -> float: ...
    def wait(self) -> None: ...
    def start_peak(self) -> int: ...
    def peak(self) -> int: ...
    def clear(self) -> None: ...


class Gpu:
    """The current CUDA device."""

    name = "cuda"

    def __init__(self) -> None:
        self._filler = torch.zeros(FILLER_BYTES // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.empty((), dtype=torch.float32, device="cuda")
        self._fill_seconds = 1.0  # one pass; then as long as it takes once warm
        for _ in range(3):
            first = self.mark()
            self.fill(0.0)
            second = self.mark()
            self.wait()
            took = self.seconds(first, second)
        self._fill_seconds = took

    def fill(self, seconds: float) -> None:
        for _ in range(max(1, math.ceil(seconds / self._fill_seconds))):
            torch.sum(self._filler, dim=0, out=self._sum)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()

    def start_peak(self) -> int:
        """Bytes allocated now; the peak counts from here."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        self.wait()
        return torch.cuda.max_memory_allocated()

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class Runner:
    """A call with its upstream gradients and the least that the host took to enqueue it."""

    call: Call
    parts: tuple[str, ...]
    upstream: list[Tensor] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=lambda: {"forward": math.inf, "backward": math.inf})
    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def differentiates(self) -> bool:
        return "backward" in self.parts

    def forward(self) -> list[Tensor]:
        start = time.perf_counter()
        outputs = self.call.run()
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        self.host["forward"] = min(self.host["forward"], time.perf_counter() - start)
        return outputs

    def backward(self, outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        wanted = [y for y in outputs if y.requires_grad]
        if len(self.upstream) != len(wanted):
            self.upstream = [torch.randn(y.shape, device=y.device).to(y.dtype) if y.ndim else torch.ones_like(y) for y in wanted]
        start = time.perf_counter()
        gradients = torch.autograd.grad(wanted, self.call.leaves, self.upstream, allow_unused=True)
        self.host["backward"] = min(self.host["backward"], time.perf_counter() - start)
        return gradients

    def restore(self) -> None:
        if self.call.restore is not None:
            self.call.restore()


def warm_up(runner: Runner, device: Device) -> tuple[list[Tensor], dict[str, int]]:
    """Compile, find out what the host takes, and measure memory. Returns the outputs of the first run, detached, and the bytes:
    ``peak`` over what was there before, and ``workspace``, what of it are neither outputs nor gradients."""
    outputs = runner.forward()
    first = [y.detach().clone() for y in outputs]
    if runner.differentiates:
        runner.backward(outputs)
    runner.restore()
    memory = {}
    for _ in range(WARM_UP):
        del outputs
        before = device.start_peak()
        outputs = runner.forward()
        gradients = runner.backward(outputs) if runner.differentiates else ()
        results = {y.data_ptr(): y.numel() * y.element_size() for y in (*outputs, *gradients) if y is not None}
        peak = device.peak() - before
        memory = {"peak": peak, "workspace": max(0, peak - sum(results.values()))}
        del gradients
        runner.restore()
    return first, memory


def one_round(runner: Runner, device: Device) -> None:
    """One run of each part; the backward pass by itself starts from memory, as in a model, and not from what forward left in L2."""
    device.fill(min(HOST_MARGIN * runner.host["forward"], MOST_BACKLOG))
    marks = [device.mark()]
    outputs = runner.forward()
    marks.append(device.mark())
    if not runner.differentiates:
        _keep(runner, device, {runner.parts[0]: marks})
        return
    device.fill(min(HOST_MARGIN * runner.host["backward"], MOST_BACKLOG))
    marks.append(device.mark())
    runner.backward(outputs)
    marks.append(device.mark())
    del outputs
    runner.restore()
    device.fill(min(HOST_MARGIN * (runner.host["forward"] + runner.host["backward"]), MOST_BACKLOG))
    both = [device.mark()]
    runner.backward(runner.forward())
    both.append(device.mark())
    _keep(runner, device, {"forward": marks[:2], "backward": marks[2:], "both": both})


def _keep(runner: Runner, device: Device, marks: dict[str, list[Any]]) -> None:
    runner.restore()
    device.wait()
    for part, (first, second) in marks.items():
        runner.times.setdefault(part, []).append(device.seconds(first, second))


def race(runners: dict[str, Runner], device: Device, budget: float, failed: Callable[[str, Exception], None]) -> None:
    """All contestants by turns for about ``budget`` seconds, at least FEWEST rounds. One that fails leaves the race."""
    start, number = time.perf_counter(), 0
    while runners and number < MOST and (number < FEWEST or time.perf_counter() - start < budget):
        names = list(runners)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                one_round(runners[name], device)
            except Exception as error:
                del runners[name]
                failed(name, error)
        number += 1


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each part the median, the 20th and the 80th percentile in seconds, and how many runs they are of."""
    return {
        part: {**{name: float(np.percentile(values, q)) for name, q in QUANTILES.items()}, "runs": len(values)}
        for part, values in times.items()
    }


def roofline(device: Device, copy_bytes: int = 2**30, size: int = 8192, budget: float = 0.5) -> dict[str, float]:
    """What the machine does now: "copy" in bytes/s, those read and those written, and "matmul" in FLOP/s of a bf16 product."""
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device.name, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": Call(lambda: target.copy_(source)), "matmul": Call(lambda: a @ b)}
    work = {"copy": 2.0 * copy_bytes, "matmul": 2.0 * size**3}
    runners = {name: Runner(call, ("forward",)) for name, call in calls.items()}
    for runner in runners.values():
        warm_up(runner, device)
    race(dict(runners), device, budget, _raise)
    return {name: work[name] / summary(runner.times)["forward"]["median"] for name, runner in runners.items()}


def _raise(name: str, error: Exception) -> None:
    raise error
