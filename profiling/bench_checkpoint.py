"""What a save costs training: the same steps with and without one in progress, taking turns.

A block is a few optimiser steps on one pack of random tokens; in every second block a save begins before the first step. What the
saving block takes longer is what training lost: the call itself and the slow-down of the steps beside the writing thread. The pack
is made long enough that a step takes a given time, so that the share of a step means something on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from smalt.model import Document, LanguageConfig, ModelConfig, PackedBatch, VisionConfig, build_model, pack

from .tables import print_table

SIZES = ModelConfig(
    vision=VisionConfig(num_layers=2, width=64, num_heads=4, ffn=256, patch=4, tile=16),
    language=LanguageConfig(num_layers=6, width=384, num_heads=6, num_kv_heads=2, head_dim=64, ffn=1536, vocabulary=8192),
)
DOCUMENT = 128


class Writer(Protocol):
    """What is measured: begins a save, and ends it."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None: ...
    def poll(self) -> None: ...
    def wait(self) -> None: ...


@dataclass(frozen=True)
class Round:
    """Seconds. plain: a block without a save; saving: one with, the call included; call: of the save; late: from the end of the
    block to that of its save."""

    plain: float
    saving: float
    call: float
    late: float


def bench_checkpoint(
    config: ModelConfig,
    writer: Writer,
    state: Callable[[torch.optim.Optimizer, Mapping[torch.nn.Parameter, str]], dict[str, Tensor]],
    *,
    rounds: int,
    steps: int,
    step_seconds: float,
    threads: int,
) -> dict[str, Any]:
    """Measure, on the CPU; returns a dict that JSON can hold, ready for :func:`print_report`.

    state: what is saved of an optimiser, by the names of parameters; steps: of a block; step_seconds: what a step takes at least;
    threads: of torch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trainer = _Trainer(config, step_seconds)
        names = {p: name for name, p in trainer.model.named_parameters()}
        saved = {**{f"model.{name}": p.data for p, name in names.items()}, **state(trainer.optimizer, names)}
        # The first save allocates; the second is what every later one is, here with nothing beside it.
        for number in range(2):
            started = time.perf_counter()
            writer.save(number, saved, {})
            writer.wait()
        alone = time.perf_counter() - started
        measured = [_round(trainer, writer, saved, number, steps) for number in range(rounds)]
    finally:
        torch.set_num_threads(before)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in saved.values()),
        "setting": {"tokens": len(trainer.batch.tokens), "steps": steps, "rounds": rounds, "threads": threads},
        "save_alone": alone,
        "rounds": [_row(r, steps) for r in measured],
    }


class _Trainer:
    """A model, AdamW and one pack, of which a step takes at least ``step_seconds``."""

    def __init__(self, config: ModelConfig, step_seconds: float):
        self.model, self.config = build_model(config, seed=0), config
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        length = 2 * DOCUMENT
        while True:
            self.batch = self._batch(length)
            self.steps(1)
            if (seconds := self.steps(2) / 2) >= step_seconds:
                return
            length = DOCUMENT * (1 + int(length * min(8.0, 1.1 * step_seconds / seconds)) // DOCUMENT)

    def _batch(self, length: int) -> PackedBatch:
        rng, vocabulary = np.random.default_rng(0), self.config.language.vocabulary
        nothing = np.zeros(0, np.int64)
        documents = [
            Document(rng.integers(0, vocabulary, DOCUMENT), np.ones(DOCUMENT, bool), nothing, np.zeros(0), nothing.reshape(0, 2))
            for _ in range(length // DOCUMENT)
        ]
        return pack(documents, length, self.config.image_attention, self.config.vision.tile)

    def steps(self, number: int, between: Callable[[], None] = lambda: None) -> float:
        """Seconds of that many optimiser steps, each followed by ``between``."""
        started = time.perf_counter()
        for _ in range(number):
            self.model(self.batch).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            between()
        return time.perf_counter() - started


def _round(trainer: _Trainer, writer: Writer, saved: dict[str, Tensor], number: int, steps: int) -> Round:
    """One block of each kind; which comes first alternates."""
    plain = trainer.steps(steps) if number % 2 == 0 else 0.0
    started = time.perf_counter()
    writer.save(number + 2, saved, {})
    call = time.perf_counter() - started
    saving = call + trainer.steps(steps, writer.poll)
    ended = time.perf_counter()
    writer.wait()
    late = time.perf_counter() - ended
    return Round(plain or trainer.steps(steps), saving, call, late)


def _row(measured: Round, steps: int) -> dict[str, float]:
    """The round by step: seconds, and the share of a step that a save costs."""
    step, lost = measured.plain / steps, measured.saving - measured.plain
    return {
        "step": step,
        "step_beside_save": (measured.saving - measured.call) / steps,
        "call": measured.call,
        "lost": lost,
        "call_share": measured.call / step,
        "lost_share": lost / step,
        "late": measured.late,
    }


def print_report(result: dict[str, Any]) -> None:
    """The table of :func:`bench_checkpoint`'s result, for people."""
    console, setting, rows = Console(highlight=False), result["setting"], result["rounds"]
    size = result["bytes"] / 2**20
    console.print(
        f"{result['parameters']:,} parameters, {size:,.0f} MiB a checkpoint, packs of {setting['tokens']} tokens, "
        f"{setting['threads']} threads of torch\n"
        f"a save with nothing beside it takes {result['save_alone']:.2f} s, {size / result['save_alone']:,.0f} MiB/s\n"
        f"blocks of {setting['steps']} steps, with a save beside them and without, in turns; seconds a step, and what a save costs\n"
    )
    table = Table("", "step", "beside a save", "the call", "lost in all", "of a step", box=None)
    for number, row in enumerate(rows, 1):
        table.add_row(f"round {number}", *_cells(row))
    for name, share in (("quartile", 0.25), ("median", 0.5), ("quartile", 0.75)):
        table.add_row(name, *_cells({key: float(np.quantile([row[key] for row in rows], share)) for key in _COLUMNS}))
    print_table(console, table)
    shares = np.quantile([row["call_share"] for row in rows], (0.25, 0.5, 0.75))
    console.print(f"\nthe call alone is {shares[1]:.1%} ({shares[0]:.1%} to {shares[2]:.1%}) of a step")
    if late := sum(row["late"] > 0.01 for row in rows):
        console.print(f"in {late} of {len(rows)} rounds the save outlasted the steps beside it: give more --steps")


_COLUMNS = ("step", "step_beside_save", "call", "lost", "lost_share")


def _cells(row: dict[str, float]) -> list[str]:
    return [f"{row[key]:.1%}" if key == "lost_share" else f"{row[key]:.3f}" for key in _COLUMNS]
