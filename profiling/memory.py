"""What a rank of a layout holds, counted from the tensors that the layout makes, without a GPU and for any number of ranks.

The model is built on the meta device over torch's fake process group. Counted are weights, gradients and AdamW's two moments in
fp32, the weights in bf16 that are gathered at a time (the root, and two of the largest blocks: one computes, the next one comes),
whole gradients in fp32 that wait for the last pack of a step, and what full activation checkpointing keeps, the input of every block.
Not counted: what one block computes with, the tiles and their activations, buffers of collectives, fragmentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from smalt.model import PRESETS, LanguageConfig, ModelConfig
from smalt.parallel import ParallelConfig, ParallelModel, World
from smalt.parallel.compat import fake_process_group
from smalt.parallel.layout import local_part
from smalt.parallel.mesh import build_meshes

from .tables import print_table

DOCS = Path(__file__).resolve().parent.parent / "docs" / "parallel.md"
MARKS = "<!-- smalt memory -->", "<!-- end -->"
GIB = 2**30
# Decoders of the sizes of Llama 3.2 1B and 3.1 8B, with the tower of the preset.
MODELS = {
    "1B": ModelConfig(
        language=LanguageConfig(
            num_layers=16, width=2048, num_heads=32, num_kv_heads=8, head_dim=64, ffn=8192, vocabulary=128_256
        )
    ),
    "bluelm_3b": PRESETS["bluelm_3b"],
    "8B": ModelConfig(
        language=LanguageConfig(
            num_layers=32, width=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14_336, vocabulary=128_256, tie_embeddings=False
        )
    ),
}  # fmt: skip
LAYOUTS = [
    (1, {}),
    (8, {}),
    (8, {"tp": 2}),
    (64, {}),
    (64, {"dp": 8}),
    (64, {"cp": 4}),
    (64, {"pp": 2}),
    (512, {"dp": 8, "cp": 4, "tp": 2}),
]
LENGTHS = (4096, 32_768)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank of the world that holds most. kept: inputs of blocks under full checkpointing, by sequence length; waiting:
    whole gradients, while packs of a step add up; pipelined: there are always several."""

    parameters: int
    weights: int
    gradients: int
    state: int
    gathered: int
    waiting: int
    pipelined: bool
    kept: dict[int, int]

    def total(self, length: int) -> int:
        """All that is counted, for packs of a length; without a pipeline one a step."""
        waiting = self.waiting if self.pipelined else 0
        return self.weights + self.gradients + self.state + self.gathered + waiting + self.kept[length]


def rank_memory(model: ModelConfig, size: int, parallel: ParallelConfig, lengths: tuple[int, ...] = LENGTHS) -> RankMemory:
    """Of a layout on ``size`` ranks. Raises ValueError where the model does not fit it."""
    parallel = parallel.sized(size)
    per_stage = size // parallel.pp
    ranks = [_of_rank(model, size, stage * per_stage, parallel, lengths) for stage in range(parallel.pp)]
    return max(ranks, key=lambda r: r.total(max(lengths)))


def _of_rank(model: ModelConfig, size: int, rank: int, parallel: ParallelConfig, lengths: tuple[int, ...]) -> RankMemory:
    with fake_process_group(rank, size):
        world = World(rank, size, torch.device("meta"), parallel, build_meshes(parallel, "cpu") if size > 1 else None)
        built = ParallelModel(model, world, 0, torch.float32, ("vision", "projector", "language"), max(lengths))
        own = sum(local_part(p).numel() for p in built.parameters())
        tp = parallel.tp
        units: dict[str, int] = {}
        for name, p in built.named_parameters():
            unit = ".".join(name.split(".")[:3]) if ".blocks." in name else "root"
            units[unit] = units.get(unit, 0) + p.numel() // (tp if unit != "root" and name.startswith("language") else 1)
        blocks = sorted((n for unit, n in units.items() if unit != "root"), reverse=True)
        root = units.get("root", 0) // tp
        gathered = 0 if size == 1 else 2 * (root + sum(blocks if parallel.keeps_gathered else blocks[:2]))
        whole = 0 if size == 1 else 4 * (root + sum(blocks))
        num_blocks = sum(len(part.language.blocks) for part in built.parts)
        # A pipeline under 1F1B keeps the microbatches that are on their way: as many as ranks, on the first.
        waiting = parallel.pp - world.coordinates["pp"] if parallel.pp > 1 else 1
        kept = {n: 4 * num_blocks * waiting * model.language.width * n // (parallel.cp * tp) for n in lengths}
        total = sum(p.numel() for p in built.parameters())
        return RankMemory(total, 4 * own, 4 * own, 8 * own, gathered, whole, parallel.pp > 1, kept)


def memory_table() -> list[list[str]]:
    """Rows of the table of docs/parallel.md, in GiB."""
    rows = []
    for name, model in MODELS.items():
        for size, axes in LAYOUTS:
            parallel = ParallelConfig(**axes).sized(size)  # type: ignore[arg-type]
            found = rank_memory(model, size, parallel)
            sizes = {"pp": parallel.pp, "dp": parallel.dp, "fsdp": parallel.fsdp, "cp": parallel.cp, "tp": parallel.tp}
            layout = " x ".join(f"{axis}{n}" for axis, n in sizes.items() if n != 1) or "one GPU"
            held = [found.weights + found.gradients + found.state, found.gathered, found.waiting, *found.kept.values()]
            totals = [found.total(length) for length in LENGTHS]
            rows.append([name, str(size), layout, *(f"{b / GIB:.1f}" for b in [*held, *totals])])
    return rows


HEADER = ["model", "GPUs", "axes", "weights, gradients, AdamW", "gathered", "waiting", "kept, 4K", "kept, 32K", "sum, 4K", "sum, 32K"]


def print_memory(rows: list[list[str]]) -> None:
    table = Table(title="GiB on the fullest rank", caption="bf16 arithmetic, fp32 weights and state, full activation checkpointing")
    for i, column in enumerate(HEADER):
        table.add_column(column, justify="left" if i in (0, 2) else "right")
    for row in rows:
        table.add_row(*row)
    print_table(Console(highlight=False), table)


def write_docs(rows: list[list[str]], path: Path = DOCS) -> None:
    """Put the table between its marks in docs/parallel.md."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---:|---|" + "---:|" * (len(HEADER) - 3)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    start, end = map(re.escape, MARKS)
    text = path.read_text()
    body = MARKS[0] + "\n" + "\n".join(lines) + "\n" + MARKS[1]
    path.write_text(re.sub(f"{start}.*?{end}", lambda _: body, text, flags=re.DOTALL))
