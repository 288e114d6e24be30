"""Overlap on two gloo processes of one thread each: which collectives of FSDP2 are in flight while the rank computes, by their traces.

    at once        FSDP2 as it is on a CPU: it waits for each all-gather where it launches it, prefetched or not
    prefetch       the next block's all-gather is launched before a block computes, forward and backward, and waited for when needed
    reduce each    prefetch; gradients are reduced in the backward pass of every microbatch
    reduce last    prefetch; they are reduced in that of the last one only (set_requires_gradient_sync)

All contestants live in the same two processes and take turns, in an order that rotates from round to round. A turn is a step to warm
up and some steps that are recorded. Counts say what overlaps; they are a matter of order. Times are of this machine, where transfers
and arithmetic share the cores, so that what is covered is not simply won. FSDP2 waits for every reduce-scatter on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from smalt.parallel.compat import set_unshard_async

from .record import TraceRecorder
from .trace_report import overlap_report
from .traces import read_traces

PROCESSES, BLOCKS, WIDTH, ROWS, MICROBATCHES = 2, 4, 384, 256, 3
Step = Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """One way to run a step. make: given the mesh (one axis, ``fsdp``), builds what runs one optimiser step, backward included."""

    name: str
    make: Callable[[DeviceMesh], Step]


class Block(nn.Module):
    """A residual MLP, [T, C] to [T, C]: 8 C^2 parameters."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return x_TC + self.down(torch.relu(self.up(x_TC)))


def sharded_model(mesh: DeviceMesh, prefetch: bool, blocks: int = BLOCKS, width: int = WIDTH) -> nn.Sequential:
    """Blocks that FSDP2 shards one by one. prefetch: gather the next block's parameters while one computes."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(blocks)))
    parts = [fully_shard(block, mesh=mesh) for block in model]
    for module in [*parts, fully_shard(model, mesh=mesh)]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if prefetch:
        for block, following in pairwise(parts):
            block.set_modules_to_forward_prefetch([following])
        set_unshard_async(model, True)
    return model


def training_step(mesh: DeviceMesh, prefetch: bool, microbatches: int = 1, reduce_each: bool = False) -> Step:
    """A step of AdamW over several microbatches of random rows."""
    model = sharded_model(mesh, prefetch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows_TC = torch.randn(ROWS, WIDTH)

    def step() -> None:
        for microbatch in range(microbatches):
            model.set_requires_gradient_sync(reduce_each or microbatch == microbatches - 1)  # type: ignore[operator]
            model(rows_TC).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTESTANTS = (
    Contestant("at once", lambda mesh: training_step(mesh, prefetch=False)),
    Contestant("prefetch", lambda mesh: training_step(mesh, prefetch=True)),
    Contestant("reduce each", lambda mesh: training_step(mesh, prefetch=True, microbatches=MICROBATCHES, reduce_each=True)),
    Contestant("reduce last", lambda mesh: training_step(mesh, prefetch=True, microbatches=MICROBATCHES)),
)


def bench_overlap(rounds: int, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """Run the contest; returns a dict that JSON can hold, ready for :func:`print_report`.

    rounds: turns of every contestant; steps: recorded in each; folder: where the traces stay, ``round-0/at-once/rank-00000.json.gz``
    and so on; a temporary one when None. Of every contestant: milliseconds a step (step, compute, communication, exposed), each as
    quartiles over rounds of the mean over ranks; and of each collective its count in a step of a rank, and how many of those were in
    flight during compute. Raises RuntimeError with what the processes said where they fail.
    """
    if rounds < 1 or steps < 1:
        raise ValueError(f"rounds = {rounds} and steps = {steps}: both must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        command += ["-m", "smalt.profiling.bench_overlap", str(folder), str(rounds), str(steps)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the processes of bench overlap failed:\n{done.stderr}")
        reports = {c.name: [overlap_report(read_traces(_turn(folder, n, c))) for n in range(rounds)] for c in CONTESTANTS}
    return {
        "torch": torch.__version__,
        "setting": {
            "processes": PROCESSES, "threads": 1, "blocks": BLOCKS, "width": WIDTH, "rows": ROWS,
            "microbatches": MICROBATCHES, "rounds": rounds, "steps": steps,
        },
        "contestants": [_summary(name, found) for name, found in reports.items()],
    }  # fmt: skip


def _turn(folder: Path, number: int, contestant: Contestant) -> Path:
    return folder / f"round-{number}" / contestant.name.replace(" ", "-")


def _summary(name: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    times = {}
    for shown, key in (("step", "window"), ("compute", "compute"), ("communication", "communication"), ("exposed", "exposed")):
        rounds = [1e3 * r["together"][key] / r["together"]["num_steps"] for r in reports]
        times[f"{shown}_ms"] = np.quantile(rounds, (0.25, 0.5, 0.75)).tolist()
    steps = sum(r["together"]["num_steps"] for r in reports)
    kinds: dict[str, dict[str, float]] = {}
    for row in (row for r in reports for row in r["together"]["labels"]):
        into = kinds.setdefault(f"{row['kind']}, {row['label'] or 'unnamed'}", {"count": 0.0, "overlapped": 0.0, "exposed_ms": 0.0})
        into["count"] += row["count"] / steps
        into["overlapped"] += row["overlapped"] / steps
        into["exposed_ms"] += 1e3 * row["exposed"] / steps
    return {"name": name, **times, "collectives": dict(sorted(kinds.items()))}


def print_report(result: dict[str, Any]) -> None:
    """The tables of :func:`bench_overlap`'s result, for people."""
    console, setting, contestants = Console(), result["setting"], result["contestants"]
    console.print(
        f"torch {result['torch']}, {setting['processes']} gloo processes of {setting['threads']} thread, {setting['blocks']} blocks "
        f"of width {setting['width']}, {setting['rows']} rows, {setting['rounds']} rounds of {setting['steps']} recorded steps; "
        f"reduce each and reduce last: {setting['microbatches']} microbatches"
    )
    keys = ("step_ms", "compute_ms", "communication_ms", "exposed_ms")
    title = "milliseconds a step: median (quartiles over rounds)"
    times = Table("", *(Column(k.removesuffix("_ms"), justify="right") for k in keys), title=title)
    for c in contestants:
        times.add_row(c["name"], *(f"{c[k][1]:.0f} ({c[k][0]:.0f}-{c[k][2]:.0f})" for k in keys))
    console.print(times)
    title = "collectives in flight during compute, of all of a step"
    counts = Table("", *(Column(c["name"], justify="right", no_wrap=True) for c in contestants), title=title)
    for name in dict.fromkeys(name for c in contestants for name in c["collectives"]):
        found = [c["collectives"].get(name) for c in contestants]
        counts.add_row(name, *(f"{f['overlapped']:.3g} of {f['count']:.3g}" if f else "" for f in found))
    console.print(counts)


def main(folder: Path, rounds: int, steps: int) -> None:
    """What each of the processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    contest = [(c, c.make(mesh)) for c in CONTESTANTS]
    for _, step in contest:
        step()  # optimiser state, FSDP2's buffers, oneDNN's primitives
    for number in range(rounds):
        shift = number % len(contest)
        for contestant, step in contest[shift:] + contest[:shift]:
            recorder = TraceRecorder(_turn(folder, number, contestant), dist.get_rank(), 2, steps, {"fsdp": mesh.get_group()})
            for _ in range(steps + 1):
                step()
                recorder.step()
            recorder.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
