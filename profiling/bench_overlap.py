"""Overlap on two gloo processes of one thread each: which collectives are in flight while the rank computes, by their traces.

Sharded data parallel (FSDP2), blocks of two products:

    at once        FSDP2 as it is on a CPU: it waits for each all-gather where it launches it, prefetched or not
    prefetch       the next block's all-gather is launched before a block computes, forward and backward, and waited for when needed
    reduce each    prefetch; gradients are reduced in the backward pass of every microbatch
    reduce last    prefetch; they are reduced in that of the last one only (set_requires_gradient_sync)

Context parallel, a small model over one pack. Every row of it sees every key, so that the ranks' work is even however rows are dealt:

    keys whole     a layer gathers all keys and values, and then computes (context_chunks = 1)
    keys in parts  chunk by chunk, the next on its way while one computes; backward, likewise, their gradients (context_chunks = 4)

All contestants live in the same two processes and take turns, in an order that rotates from round to round. A turn is a step to warm
up and some steps that are recorded. Counts say what overlaps; they are a matter of order. Times are of this machine, where transfers
and arithmetic share the cores, so that what is covered is not simply won. FSDP2 waits for every reduce-scatter on a CPU.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
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

from smalt.model import LanguageConfig, ModelConfig, PackedBatch, VisionConfig
from smalt.parallel import ParallelConfig, ParallelModel
from smalt.parallel.compat import set_unshard_async
from smalt.parallel.mesh import World, build_meshes

from .processes import PROCESSES, run_module
from .record import TraceRecorder
from .tables import print_table
from .trace_report import overlap_report
from .traces import read_traces

BLOCKS, WIDTH, ROWS, MICROBATCHES = 4, 384, 256, 3
PACK = 2048
MODEL = ModelConfig(
    vision=VisionConfig(num_layers=1, width=16, num_heads=1, ffn=16, patch=2, tile=4),
    language=LanguageConfig(num_layers=2, width=256, num_heads=4, num_kv_heads=4, head_dim=64, ffn=512, vocabulary=512),
)
Step = Callable[[], None]


@dataclass(frozen=True)
class Contestant:
    """One way to run a step. make: given the mesh (one axis, ``fsdp``), builds what runs one step, backward included; axis: whose
    collectives are looked at."""

    name: str
    make: Callable[[DeviceMesh], Step]
    axis: str = "fsdp"


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


def context_step(mesh: DeviceMesh, chunks: int) -> Step:
    """Forward and backward of ``MODEL`` over one pack whose rows are shared out over all processes."""
    parallel = ParallelConfig(cp=mesh.size(), context_chunks=chunks).sized(mesh.size())
    world = World(dist.get_rank(), mesh.size(), torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
    model = ParallelModel(MODEL, world, 0, torch.float32, ("vision", "projector", "language"), PACK)
    tokens, side = torch.arange(PACK) % MODEL.language.vocabulary, MODEL.vision.tile
    every_key = torch.zeros(PACK, dtype=torch.int32), torch.full((PACK,), PACK, dtype=torch.int32)
    pack = PackedBatch(
        tokens, torch.arange(PACK, dtype=torch.int32), *every_key, tokens.roll(-1), torch.ones(PACK),
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, side, side),
    )  # fmt: skip

    def step() -> None:
        model.accumulate([pack], lambda nll, shard: (nll * shard.loss_weight).sum() / PACK)
        for parameter in model.parameters():
            parameter.grad = None

    return step


CONTESTANTS = (
    Contestant("at once", lambda mesh: training_step(mesh, prefetch=False)),
    Contestant("prefetch", lambda mesh: training_step(mesh, prefetch=True)),
    Contestant("reduce each", lambda mesh: training_step(mesh, prefetch=True, microbatches=MICROBATCHES, reduce_each=True)),
    Contestant("reduce last", lambda mesh: training_step(mesh, prefetch=True, microbatches=MICROBATCHES)),
    Contestant("keys whole", lambda mesh: context_step(mesh, 1), "cp"),
    Contestant("keys in parts", lambda mesh: context_step(mesh, 4), "cp"),
)


def bench_overlap(rounds: int, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """Run the contest; returns a dict that JSON can hold, ready for :func:`print_report`.

    rounds: turns of every contestant; steps: recorded in each; folder: where the traces stay, ``round-0/at-once/rank-00000.json.gz``
    and so on; a temporary one when None. Of every contestant: milliseconds a step (step, compute, communication, exposed), each as
    quartiles over rounds of the mean over ranks; and of each collective its count in a step of a rank, how many of those were in
    flight during compute, and for how many milliseconds of a step without it, as quartiles. Raises RuntimeError with what the
    processes said where they fail.
    """
    if rounds < 1 or steps < 1:
        raise ValueError(f"rounds = {rounds} and steps = {steps}: both must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        run_module("smalt.profiling.bench_overlap", folder, rounds, steps)
        reports = {c.name: [overlap_report(read_traces(_turn(folder, n, c))) for n in range(rounds)] for c in CONTESTANTS}
    return {
        "torch": torch.__version__,
        "setting": {
            "processes": PROCESSES, "threads": 1, "blocks": BLOCKS, "width": WIDTH, "rows": ROWS,
            "microbatches": MICROBATCHES, "pack": PACK, "context_layers": MODEL.language.num_layers,
            "context_width": MODEL.language.width, "rounds": rounds, "steps": steps,
        },
        "contestants": [_summary(c, reports[c.name]) for c in CONTESTANTS],
    }  # fmt: skip


def _turn(folder: Path, number: int, contestant: Contestant) -> Path:
    return folder / f"round-{number}" / contestant.name.replace(" ", "-")


def _summary(contestant: Contestant, reports: list[dict[str, Any]]) -> dict[str, Any]:
    times = {
        f"{shown}_ms": _quartiles(1e3 * r["together"][key] / r["together"]["num_steps"] for r in reports)
        for shown, key in (("step", "window"), ("compute", "compute"), ("communication", "communication"), ("exposed", "exposed"))
    }
    # By collective, then by round: what a step of a rank has.
    found: dict[str, list[dict[str, float]]] = {}
    for number, together in enumerate(r["together"] for r in reports):
        for row in together["labels"]:
            name = f"{row['kind']}, {row['label'] or row['axis']}"
            rounds = found.setdefault(name, [{"count": 0.0, "overlapped": 0.0, "exposed": 0.0} for _ in reports])
            for key in rounds[number]:
                rounds[number][key] += row[key] / together["num_steps"]
    kinds = {
        name: {
            "count": float(np.mean([r["count"] for r in rounds])), "overlapped": float(np.mean([r["overlapped"] for r in rounds])),
            "exposed_ms": _quartiles(1e3 * r["exposed"] for r in rounds),
        }
        for name, rounds in sorted(found.items())
    }  # fmt: skip
    return {"name": contestant.name, "axis": contestant.axis, **times, "collectives": kinds}


def _quartiles(values: Iterable[float]) -> list[float]:
    return np.quantile(list(values), (0.25, 0.5, 0.75)).tolist()


def print_report(result: dict[str, Any]) -> None:
    """The tables of :func:`bench_overlap`'s result, for people."""
    console, setting, contestants = Console(), result["setting"], result["contestants"]
    console.print(
        f"torch {result['torch']}, {setting['processes']} gloo processes of {setting['threads']} thread, "
        f"{setting['rounds']} rounds of {setting['steps']} recorded steps; "
        f"fsdp: {setting['blocks']} blocks of width {setting['width']}, {setting['rows']} rows, reduce each and reduce last "
        f"{setting['microbatches']} microbatches; "
        f"cp: a pack of {setting['pack']}, {setting['context_layers']} layers of width {setting['context_width']}"
    )
    keys = ("step_ms", "compute_ms", "communication_ms", "exposed_ms")
    title = "milliseconds a step: median (quartiles over rounds)"
    times = Table("", *(Column(k.removesuffix("_ms"), justify="right") for k in keys), title=title)
    for c in contestants:
        times.add_row(c["name"], *(_spread(c[k], ".0f") for k in keys))
    print_table(console, times)
    sharded, context = ([c for c in contestants if c["axis"] == axis] for axis in ("fsdp", "cp"))
    title = "collectives in flight during compute, of all of a step"
    counts = Table("", *(Column(c["name"], justify="right", no_wrap=True) for c in sharded), title=title)
    for name in dict.fromkeys(name for c in sharded for name in c["collectives"]):
        counts.add_row(name, *(_count(c["collectives"].get(name)) for c in sharded))
    print_table(console, counts)
    title = "the same of cp, and milliseconds of a step in which they are in flight without compute"
    names = ("all_gather", "without compute", "reduce_scatter", "without compute")
    parts = Table("", *(Column(n, justify="right") for n in names), title=title)
    for c in context:
        found = [c["collectives"][name] for name in ("all_gather, cp", "reduce_scatter, cp")]
        parts.add_row(c["name"], *(cell for f in found for cell in (_count(f), _spread(f["exposed_ms"], ".0f"))))
    print_table(console, parts)


def _count(found: dict[str, Any] | None) -> str:
    return f"{found['overlapped']:.3g} of {found['count']:.3g}" if found else ""


def _spread(quartiles: list[float], form: str) -> str:
    low, middle, high = (f"{value:{form}}" for value in quartiles)
    return f"{middle} ({low}-{high})"


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
