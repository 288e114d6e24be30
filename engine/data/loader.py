"""Steps of packed batches, made ahead in a thread; every rank plans the same step and builds its own packs."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from smalt.model import Document, PackedBatch, pack

from .agreement import Account
from .packing import Packer, PackerState, StepPlan
from .stream import SampleId, SkippedSample


@dataclass(frozen=True)
class StepBatch:
    """What one optimiser step needs. Counts and ``samples`` are of the whole step, over all ranks; ``packs`` are this replica's;
    ``account`` is of what this rank has read for it, and how that was packed."""

    packs: list[PackedBatch]
    loss_tokens: float
    tokens: int
    documents: Counter[str]
    samples: list[SampleId]
    fill: float
    skipped: list[SkippedSample]
    state: PackerState
    account: Account


class Loader:
    """Iterates over StepBatch for ever. ``close`` ends the thread; an error in it is raised by the next step."""

    def __init__(
        self,
        packer: Packer,
        rank: int,
        world: int,
        image_attention: Literal["bidirectional", "causal"],
        tile: int,
        prefetch: int,
    ):
        self.packer, self.rank, self.world = packer, rank, world
        self.image_attention, self.tile = image_attention, tile
        self.ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        item = self.ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _work(self) -> None:
        try:
            while self._put(self._build(self.packer.next())):
                pass
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> bool:
        while not self.closed.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _build(self, plan: StepPlan) -> StepBatch:
        documents = [d for one in plan.packs for d in one]
        tokens = sum(map(len, documents))
        return StepBatch(
            packs=[pack(p, self.packer.length, self.image_attention, self.tile) for p in plan.packs[self.rank :: self.world]],
            loss_tokens=float(sum(num_targets(d) for d in documents)),
            tokens=tokens,
            documents=Counter(d.source for d in documents),
            samples=[SampleId(d.source, d.record, at) for d, (at, _) in zip(documents, plan.keys, strict=True)],
            fill=tokens / (len(plan.packs) * self.packer.length),
            skipped=plan.skipped,
            state=plan.state,
            account=Account.of(plan.read, [map(len, plan.packs), *plan.keys, map(len, documents)]),
        )


def num_targets(document: Document) -> int:
    """Tokens that the loss counts: the first of a document is never predicted."""
    return int(document.targets[1:].sum())
