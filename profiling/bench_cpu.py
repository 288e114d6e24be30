"""Smalt on a CPU beside transformers: the same model, the same documents, the same optimiser.

    transformers, random     random batches padded to their longest document, logits of all rows, its own loss
    transformers, by length  the same, documents of like length batched together (``group_by_length``)
    smalt, packs             documents laid end to end in packs

Each in fp32, the first and the last also under bf16 autocast. All start from the same weights (see internvl.py), and before the
clock starts the losses of both models on the same documents are compared, in fp32 and with InternVL's causal image attention.

A round is 50 batches' worth of documents, the window of ``group_by_length``, and all contestants train on the same ones. They
take turns of a few steps, in an order that rotates from round to round, so that a slow moment of the machine does not strike one
alone. Collating and packing are left out of everyone's time: a loader's workers do them. Useful tokens are those of documents,
image placeholders among them; rows are what is computed, padding included.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from smalt.kernels import IGNORE
from smalt.model import Document, ModelConfig, MultimodalModel, PackedBatch, build_model, pack
from smalt.model.batch import see_as

from .internvl import build_internvl, check_comparable
from .tables import print_table

ROUND_BATCHES, TURNS = 50, 10
SEED = 0
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Contestant:
    """One way to train. library: whose model; order: how documents become batches; bf16: under autocast or fp32."""

    library: str
    order: str
    bf16: bool

    @property
    def name(self) -> str:
        return f"{self.library}, {self.order}, {'bf16' if self.bf16 else 'fp32'}"


CONTESTANTS = (
    Contestant("transformers", "random", False),
    Contestant("transformers", "by length", False),
    Contestant("smalt", "packs", False),
    Contestant("transformers", "random", True),
    Contestant("smalt", "packs", True),
)


@dataclass(frozen=True)
class Batch:
    """What one step trains on. inputs: the model's; useful: tokens of documents; rows: rows computed, padding included."""

    inputs: Any
    useful: int
    rows: int


def bench_cpu(documents: list[Document], config: ModelConfig, *, pack_length: int, batch: int, rounds: int, threads: int) -> dict:
    """Run the contest; returns a dict that JSON can hold, ready for :func:`print_report`.

    pack_length: rows of a pack, of which Smalt trains one a step; batch: documents a step for transformers; with pack_length near
    batch x the mean length a step is the same work for all. rounds: how often everyone runs; threads: of torch.

    Rates are medians over rounds; ratios are taken round by round, each with its quartiles. Peak memory comes from a fresh
    process for each contestant: its highest resident set over a round of steps, less its resident set after imports, construction
    of the model and collation; so gradients, optimiser state and activations. Raises ValueError for a model that transformers
    cannot build or documents that do not fit, and ImportError without transformers.
    """
    import transformers

    _check(documents, config, pack_length)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        difference, parameters = _compare_models(documents[: min(len(documents), batch)], config)
        rates = _race(documents, config, pack_length, batch, rounds)
    finally:
        torch.set_num_threads(before)
    memory = {c.name: _memory_in_subprocess(i, documents, config, pack_length, batch, threads) for i, c in enumerate(CONTESTANTS)}
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "setting": {"pack_length": pack_length, "batch": batch, "rounds": rounds, "threads": threads},
        "parameters": parameters,
        "loss_difference": difference,
        "contestants": [_summary(c, rates[c.name], memory[c.name]) for c in CONTESTANTS],
        "ratios": [_ratio(c, rates) for c in CONTESTANTS if c.library == "transformers"],
    }


def _check(documents: list[Document], config: ModelConfig, pack_length: int) -> None:
    if not documents or max(map(len, documents)) > pack_length:
        raise ValueError(f"documents are needed, none longer than the pack of {pack_length}")
    check_comparable(config)
    image = _image_token(documents)
    for d in documents:
        if not np.array_equal(np.flatnonzero(d.tokens == image), d.image_index):
            raise ValueError(f"token {image} must stand in the image rows and nowhere else; not so in one of {d.source!r}")


# The race


def _race(documents: list[Document], config: ModelConfig, pack_length: int, batch: int, rounds: int) -> dict[str, list[dict]]:
    """For each contestant and round: useful tokens, rows and seconds."""
    trainers = {c: Trainer(c, config, _image_token(documents)) for c in CONTESTANTS}
    results: dict[str, list[dict]] = {c.name: [] for c in CONTESTANTS}
    # Round 0 warms up: optimiser state, thread pools, and oneDNN's primitives for every length.
    for number in range(rounds + 1):
        chosen = _round_documents(documents, batch, number)
        batches = {c: make_batches(c, chosen, config, pack_length, batch, number) for c in CONTESTANTS}
        seconds = dict.fromkeys(CONTESTANTS, 0.0)
        shift = number % len(CONTESTANTS)
        for turn in range(TURNS):
            for c in CONTESTANTS[shift:] + CONTESTANTS[:shift]:
                start = time.perf_counter()
                for b in batches[c][turn::TURNS]:
                    trainers[c].step(b.inputs)
                seconds[c] += time.perf_counter() - start
        for c in CONTESTANTS if number else ():
            useful, rows = sum(b.useful for b in batches[c]), sum(b.rows for b in batches[c])
            results[c.name].append({"useful": useful, "rows": rows, "steps": len(batches[c]), "seconds": seconds[c]})
    return results


def _round_documents(documents: list[Document], batch: int, number: int) -> list[Document]:
    return random.Random(number).sample(documents, min(len(documents), ROUND_BATCHES * batch))


class Trainer:
    """A contestant's model and optimiser; ``step`` is forward, backward and update."""

    def __init__(self, contestant: Contestant, config: ModelConfig, image_token: int):
        smalt = build_model(config, SEED)
        packs = contestant.library == "smalt"
        self.model = smalt if packs else build_internvl(smalt, image_token)
        self.loss: Callable[[Any, Any], Tensor] = _smalt_loss if packs else _transformers_loss
        self.bf16 = contestant.bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, inputs) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _smalt_loss(model: MultimodalModel, batch: PackedBatch) -> Tensor:
    return (model(batch) * batch.loss_weight).sum() / batch.loss_weight.sum()


def _transformers_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


# Batches


def make_batches(
    contestant: Contestant, documents: list[Document], config: ModelConfig, pack_length: int, batch: int, seed: int
) -> list[Batch]:
    """All documents as the contestant's batches, in a random order that the seed fixes."""
    if contestant.order == "packs":
        groups = _fill_packs(documents, pack_length)
    else:
        ordered = sorted(documents, key=len) if contestant.order == "by length" else documents
        groups = [ordered[low : low + batch] for low in range(0, len(ordered), batch)]
    random.Random(seed).shuffle(groups)
    if contestant.library == "smalt":
        packs = [pack(group, pack_length, config.image_attention, config.vision.tile) for group in groups]
        return [Batch(p, sum(map(len, group)), pack_length) for p, group in zip(packs, groups, strict=True)]
    padded = [_pad(group, _image_token(documents)) for group in groups]
    return [Batch(p, sum(map(len, group)), p["input_ids"].numel()) for p, group in zip(padded, groups, strict=True)]


def _fill_packs(documents: list[Document], pack_length: int) -> list[list[Document]]:
    """First fit, longest first: each document into the first pack with room."""
    packs: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        at = next((i for i, left in enumerate(room) if left >= len(document)), len(packs))
        if at == len(packs):
            packs.append([])
            room.append(pack_length)
        packs[at].append(document)
        room[at] -= len(document)
    return packs


def _pad(documents: list[Document], image_token: int) -> dict[str, Tensor]:
    """What a collator hands to transformers: input_ids, attention_mask and labels, int64 [B, longest], and the images' pixels."""
    shape = len(documents), max(map(len, documents))
    tokens = np.full(shape, int(image_token == 0), np.int64)  # any id but the image's
    mask, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    for row, d in enumerate(documents):
        tokens[row, : len(d)], mask[row, : len(d)] = d.tokens, 1
        labels[row, : len(d)] = np.where(d.targets, d.tokens, IGNORE)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if tiles := [torch.from_numpy(d.tiles) for d in documents if len(d.tiles)]:
        tensors["pixel_values"] = see_as(torch.cat(tiles), torch.float32)
    return tensors


def _image_token(documents: list[Document]) -> int:
    """The id in the image rows; -1 when there are no images."""
    return next((int(d.tokens[d.image_index[0]]) for d in documents if len(d.image_index)), -1)


def _compare_models(documents: list[Document], config: ModelConfig) -> tuple[float, dict[str, int]]:
    """The relative difference of the two models' losses on the same documents and weights, and their parameter counts."""
    image = _image_token(documents)
    smalt = build_model(config.model_copy(update={"image_attention": "causal"}), SEED)
    theirs = build_internvl(smalt, image)
    with torch.no_grad():
        ours = _smalt_loss(smalt, pack(documents, sum(map(len, documents)), "causal", config.vision.tile)).item()
        other = _transformers_loss(theirs, _pad(documents, image)).item()
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("transformers", theirs), ("smalt", smalt))}
    return abs(ours - other) / abs(other), count


# Memory


def _memory_in_subprocess(
    index: int, documents: list[Document], config: ModelConfig, pack_length: int, batch: int, threads: int
) -> float:
    """Peak MiB of contestant ``index``, measured by :func:`_measure_memory` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.pickle"
        path.write_bytes(pickle.dumps((index, _round_documents(documents, batch, 0), config, pack_length, batch, threads)))
        command = [sys.executable, "-m", "smalt.profiling.bench_cpu", str(path)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _measure_memory(path: Path) -> float:
    """MiB that a round of steps adds at its highest to what imports, the model and its batches take."""
    index, documents, config, pack_length, batch, threads = pickle.loads(path.read_bytes())
    torch.set_num_threads(threads)
    contestant = CONTESTANTS[index]
    trainer = Trainer(contestant, config, _image_token(documents))
    batches = make_batches(contestant, documents, config, pack_length, batch, 0)
    shortest = make_batches(contestant, [min(documents, key=len)], config, len(min(documents, key=len)), 1, 0)[0]
    with torch.no_grad():
        trainer.loss(trainer.model, shortest.inputs)  # whatever is imported at the first call belongs to the baseline
    baseline = _resident_mib("VmRSS")
    if PROC.exists():
        (PROC / "clear_refs").write_text("5")  # sets the peak back to the present size
    for b in batches:
        trainer.step(b.inputs)
    return _resident_mib("VmHWM") - baseline


def _resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process; not ru_maxrss on Linux, where a child starts with its parent's."""
    if PROC.exists():
        line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    import resource  # macOS: only the peak is to be had, in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# The result


def _summary(contestant: Contestant, results: list[dict], memory: float) -> dict:
    """Rates of one contestant: medians over the rounds."""
    return {
        "name": contestant.name,
        "tokens_per_s": median(r["useful"] / r["seconds"] for r in results),
        "rows_per_s": median(r["rows"] / r["seconds"] for r in results),
        "fill": sum(r["useful"] for r in results) / sum(r["rows"] for r in results),
        "tokens_per_step": sum(r["useful"] for r in results) / sum(r["steps"] for r in results),
        "peak_mib": memory,
    }


def _ratio(other: Contestant, results: dict[str, list[dict]]) -> dict:
    """What Smalt gains over another contestant of the same precision: in each round total = fill x speed; quartiles of each."""
    smalt = next(c for c in CONTESTANTS if c.library == "smalt" and c.bf16 == other.bf16)
    pairs = list(zip(results[smalt.name], results[other.name], strict=True))
    fill = [(s["useful"] / s["rows"]) / (o["useful"] / o["rows"]) for s, o in pairs]
    speed = [(s["rows"] / s["seconds"]) / (o["rows"] / o["seconds"]) for s, o in pairs]
    total = [f * v for f, v in zip(fill, speed, strict=True)]
    quartiles = (np.quantile(values, (0.25, 0.5, 0.75)).tolist() for values in (total, fill, speed))
    return {"of": smalt.name, "to": other.name, **dict(zip(("total", "fill", "speed"), quartiles, strict=True))}


def print_report(result: dict) -> None:
    """The tables of :func:`bench_cpu`'s result, for people."""
    console, setting, parameters = Console(), result["setting"], result["parameters"]
    console.print(
        f"torch {result['torch']}, transformers {result['transformers']}, {setting['threads']} threads, packs of "
        f"{setting['pack_length']}, batches of {setting['batch']}, {setting['rounds']} rounds\n"
        f"parameters: transformers {parameters['transformers']:,}, smalt {parameters['smalt']:,}; on the same weights and "
        f"documents their losses differ by {result['loss_difference']:.1e} of the loss\n"
    )
    table = Table("useful tokens", "per s", "per step", "fill", "rows/s", "peak MiB", box=None)
    for c in result["contestants"]:
        rate, step, rows, memory = (f"{c[key]:,.0f}" for key in ("tokens_per_s", "tokens_per_step", "rows_per_s", "peak_mib"))
        table.add_row(c["name"], rate, step, f"{c['fill']:.1%}", rows, memory)
    print_table(console, table)
    console.print()
    table = Table("smalt over", "total (quartiles)", "= fill", "x speed per row", "memory", box=None)
    peak = {c["name"]: c["peak_mib"] for c in result["contestants"]}
    for r in result["ratios"]:
        total, speed = (f"{mid:.2f} ({low:.2f}-{high:.2f})" for low, mid, high in (r["total"], r["speed"]))
        table.add_row(r["to"], total, f"{r['fill'][1]:.2f}", speed, f"{peak[r['of']] / peak[r['to']]:.2f}")
    print_table(console, table)


if __name__ == "__main__":
    print(json.dumps(_measure_memory(Path(sys.argv[1]))))
