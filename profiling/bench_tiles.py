"""The vision tower data parallel inside the group that shares a pack, against the tower on every rank of it, on two gloo processes.

Over cp = 2, and over tp = 2:

    shared        each tile goes through the tower on one rank; its embeddings are exchanged (parallel.tiles = "shared")
    replicated    every rank sees all tiles of the pack, and exchanges nothing (parallel.tiles = "replicated")

All live in the same two processes of one thread each and take turns, in an order that rotates from round to round; ratios are taken
round by round. A step is forward, backward, clipping and AdamW over one pack. Where other programs take the cores, the time of a step
says little; the CPU time of both processes together says what work was saved.

Beside it stands the ratio of FLOPs (smalt.model.cost), what a machine would give on which nothing else takes time; and that of the 3B
model at 32K tokens, by cp, tiles and the length of documents.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from smalt.model import PRESETS, Document, LanguageConfig, ModelConfig, PackedBatch, VisionConfig, pack
from smalt.model.cost import Cost, Workload, model_cost
from smalt.parallel import ParallelConfig, ParallelModel
from smalt.parallel.mesh import World, build_meshes

from .processes import PROCESSES, run_module
from .tables import print_table

# 16 tokens a tile; with 48 tiles in 2,048 tokens a third of the FLOPs is vision.
MODEL = ModelConfig(
    vision=VisionConfig(num_layers=4, width=192, num_heads=4, ffn=768, patch=14, tile=112),
    language=LanguageConfig(num_layers=4, width=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn=1024, vocabulary=4096),
)
DOCUMENTS = 4
# An image of 1512 x 1512 is 16 tiles and a thumbnail: packs of two, five and nine of them, as one document, or as documents of 4K.
PAPER, PAPER_TOKENS, PAPER_CP, PAPER_TILES, PAPER_DOCUMENTS = "bluelm_3b", 32_768, (4, 8), (34, 85, 153), (32_768, 4096)


@dataclass(frozen=True)
class Contestant:
    """A layout over all processes. axis: "cp" or "tp"; tiles: "shared" or "replicated"."""

    axis: str
    tiles: str


CONTESTANTS = tuple(Contestant(axis, tiles) for axis in ("cp", "tp") for tiles in ("shared", "replicated"))


def rank_flops(cost: Cost, work: Workload, size: int, tiles: str) -> float:
    """FLOPs of the rank that has most of a pack's work, of the ``size`` ranks of a cp x tp group; rows and pairs are shared evenly."""
    seen = work.tiles if tiles == "replicated" else -(-work.tiles // size)
    return cost(Workload(work.tokens / size, work.pairs / size, max(1, seen)))  # a rank without a tile sees a blank one


def flops_ratio(cost: Cost, work: Workload, size: int) -> float:
    """How many times faster "shared" is than "replicated" where FLOPs are all that takes time."""
    return rank_flops(cost, work, size, "replicated") / rank_flops(cost, work, size, "shared")


def bench_tiles(rounds: int, steps: int, tokens: int, tiles: int, config: ModelConfig = MODEL) -> dict[str, Any]:
    """Run the contest; returns a dict that JSON can hold, ready for :func:`print_report`.

    rounds: turns of every contestant; steps: in each; tokens, tiles: of the pack. Of each axis: seconds a step and CPU seconds, shared
    and replicated, and their ratios, all as quartiles over rounds; and the ratio by FLOPs. Raises ValueError for tiles that do not
    fit the pack, RuntimeError with what the processes said where they fail.
    """
    if rounds < 1 or steps < 1:
        raise ValueError(f"rounds = {rounds} and steps = {steps}: both must be at least 1")
    batch = make_pack(config, tokens, tiles)
    for contestant in CONTESTANTS:
        _layout(contestant).check_model(config, tokens)
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps([config.model_dump(), rounds, steps, tokens, tiles]))
        run_module("smalt.profiling.bench_tiles", task)
        turns = json.loads((Path(folder) / "turns.json").read_text())
    cost, work = model_cost(config), work_of(batch)
    return {
        "torch": torch.__version__,
        "setting": {
            "processes": PROCESSES, "threads": 1, "rounds": rounds, "steps": steps, "tokens": tokens, "tiles": tiles,
            "image_rows": len(batch.image_index), "vision_share": vision_share(cost, work),
        },
        "axes": [_summary(axis, turns, flops_ratio(cost, work, PROCESSES)) for axis in ("cp", "tp")],
        "paper": paper_ratios(),
    }  # fmt: skip


def paper_ratios() -> list[dict[str, Any]]:
    """The ratios by FLOPs of packs of the 3B model. document: tokens of each of a pack's documents, which are causal throughout."""
    config = PRESETS[PAPER]
    cost, rows = model_cost(config), []
    for document in PAPER_DOCUMENTS:
        for tiles in PAPER_TILES:
            work = Workload(PAPER_TOKENS, PAPER_TOKENS * (document + 1) / 2, tiles)
            rows.append(
                {
                    "document": document, "tiles": tiles, "image_rows": tiles * config.vision.tokens_per_tile, "tokens": PAPER_TOKENS,
                    "vision_share": vision_share(cost, work), "ratios": {str(cp): flops_ratio(cost, work, cp) for cp in PAPER_CP},
                }
            )  # fmt: skip
    return rows


def vision_share(cost: Cost, work: Workload) -> float:
    """Of the FLOPs of a pack on one process, those of the tower and the projector."""
    return cost.tile * work.tiles / cost(work)


def work_of(batch: PackedBatch) -> Workload:
    return Workload(len(batch.tokens), int((batch.kv_end.long() - batch.kv_start).sum()), len(batch.tiles))


def make_pack(config: ModelConfig, tokens: int, tiles: int) -> PackedBatch:
    """Documents of equal length: an image of its share of the tiles, then text; random numbers, the same in every process."""
    rng, length, each = np.random.default_rng(0), tokens // DOCUMENTS, config.vision.tokens_per_tile
    documents = []
    for share in np.array_split(np.arange(tiles), DOCUMENTS):
        rows = len(share) * each
        if rows > length:
            raise ValueError(
                f"{len(share)} tiles of {each} tokens do not fit a document of {length}: {tokens} tokens in {DOCUMENTS} documents; "
                "take fewer tiles or more tokens"
            )
        pixels = rng.standard_normal((len(share), 3, config.vision.tile, config.vision.tile), dtype=np.float32)
        targets = np.arange(length) >= rows
        ids = rng.integers(0, config.language.vocabulary, length)
        spans = np.array([[0, rows]] if rows else [], np.int64).reshape(-1, 2)
        documents.append(Document(ids, targets, np.arange(rows), pixels, spans))
    return pack(documents, tokens, config.image_attention, config.vision.tile)


def _summary(axis: str, turns: dict[str, list[dict[str, float]]], flops: float) -> dict[str, Any]:
    shared, replicated = (turns[f"{axis}, {tiles}"] for tiles in ("shared", "replicated"))
    found: dict[str, Any] = {"axis": axis, "flops_ratio": flops}
    for key in ("seconds", "cpu_seconds"):
        one, other = ([turn[key] for turn in of] for of in (shared, replicated))
        ratios = [b / a for a, b in zip(one, other, strict=True)]
        for name, values in ((f"shared_{key}", one), (f"replicated_{key}", other), (f"{key}_ratio", ratios)):
            found[name] = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return found


def print_report(result: dict[str, Any]) -> None:
    """The tables of :func:`bench_tiles`'s result, for people."""
    console, setting = Console(), result["setting"]
    console.print(
        f"torch {result['torch']}, {setting['processes']} gloo processes of {setting['threads']} thread, "
        f"{setting['rounds']} rounds of {setting['steps']} steps; "
        f"a pack of {setting['tokens']} tokens, {setting['image_rows']} of them of {setting['tiles']} tiles; "
        f"vision is {setting['vision_share']:.0%} of the FLOPs"
    )
    names = ("shared, s", "replicated, s", "ratio", "of CPU time", "of FLOPs")
    title = "a step: median (quartiles over rounds)"
    measured = Table("", *(Column(n, justify="right") for n in names), title=title)
    for row in result["axes"]:
        keys = ("shared_seconds", "replicated_seconds", "seconds_ratio", "cpu_seconds_ratio")
        measured.add_row(f"{row['axis']} {setting['processes']}", *(_spread(row[k]) for k in keys), f"{row['flops_ratio']:.2f}")
    print_table(console, measured)
    columns = [Column(n, justify="right") for n in ("tiles", "image rows", "vision", *(f"cp {n}" for n in PAPER_CP))]
    ratios = Table("documents of", *columns, title=f"ratio of FLOPs, {PAPER}, {PAPER_TOKENS:,} tokens")
    for row in result["paper"]:
        shares = f"{row['image_rows'] / row['tokens']:.0%}", f"{row['vision_share']:.0%}"
        ratios.add_row(f"{row['document']:,}", str(row["tiles"]), *shares, *(f"{r:.2f}" for r in row["ratios"].values()))
    print_table(console, ratios)


def _spread(quartiles: Sequence[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


# What each of the processes runs


def _layout(contestant: Contestant) -> ParallelConfig:
    return ParallelConfig.model_validate({contestant.axis: PROCESSES, "tiles": contestant.tiles}).sized(PROCESSES)


class Trainer:
    """One layout of the model, which trains on one pack again and again."""

    def __init__(self, contestant: Contestant, config: ModelConfig, batch: PackedBatch):
        parallel = _layout(contestant)
        world = World(dist.get_rank(), PROCESSES, torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
        self.batch, self.total = batch, float(batch.loss_weight.sum())
        self.model = ParallelModel(config, world, 0, torch.float32, ("vision", "projector", "language"), len(batch.tokens))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        self.model.accumulate([self.batch], lambda nll, shard: (nll * shard.loss_weight).sum() / self.total)
        self.model.clip_gradients(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, steps: int) -> dict[str, float]:
        """Seconds a step until both processes are done, and CPU seconds of both."""
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        dist.all_reduce(used)
        return {"seconds": (time.perf_counter() - start) / steps, "cpu_seconds": float(used) / steps}


def main(task: Path) -> None:
    settings, rounds, steps, tokens, tiles = json.loads(task.read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = ModelConfig.model_validate(settings)
    batch = make_pack(config, tokens, tiles)
    contest = [(f"{c.axis}, {c.tiles}", Trainer(c, config, batch)) for c in CONTESTANTS]
    for _, trainer in contest:
        trainer.step()  # optimiser state, FSDP2's buffers, oneDNN's primitives
    turns: dict[str, list[dict[str, float]]] = {name: [] for name, _ in contest}
    for number in range(rounds):
        shift = number % len(contest)
        for name, trainer in contest[shift:] + contest[:shift]:
            turns[name].append(trainer.turn(steps))
    if dist.get_rank() == 0:
        (task.parent / "turns.json").write_text(json.dumps(turns))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
