"""Steps of packed batches, made ahead by a thread and worker processes.

The ranks share the work. Each measures its part of a window of samples; they tell each other what they found, and plan the same steps
from it. Each then builds the packs of its own replica, and they tell each other what became of those. So no rank reads the whole
stream, all of them know the counts of every step, and what one of them has otherwise than another ends the run, on all, by name.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from smalt.model import Document, PackedBatch, pack
from smalt.model.cost import Cost

from ..errors import BadRecord, UserError
from .balance import deal_packs
from .mixture import WindowWeights
from .packing import Packer, PackerState, Piece, StepPlan
from .reading import READING_CAUSES, Draw, Measured, Part, Reader, SkippedSample, Unlike
from .sharing import Closing, Exchange, Sharing, Told
from .stream import SampleStream
from .workers import Workers, result_of

# Samples that a worker measures at a time.
CHUNK = 16
# Steps in a row of which nothing can be decoded, after which the run ends.
EMPTY_STEPS = 2
# Seconds that the end of a stage waits for the other ranks' threads; they end by themselves when theirs does.
LAST_EXCHANGE = 10.0


@dataclass(frozen=True)
class SampleId:
    """A document of a step. record: its number in its source; position: its index in the stage's stream."""

    source: str
    record: int
    position: int


@dataclass(frozen=True)
class StepBatch:
    """What one optimiser step needs. Counts and ``samples`` are of the whole step, over all ranks; ``packs`` are this replica's.

    firsts: index in ``samples`` of the first document of each pack, in which the others follow; spread: cost of the replica that has
    most to do, as a multiple of the mean.
    """

    packs: list[PackedBatch]
    firsts: list[int]
    loss_tokens: float
    tokens: int
    documents: Counter[str]
    samples: list[SampleId]
    fill: float
    spread: float
    skipped: list[SkippedSample]
    state: PackerState


@dataclass(frozen=True)
class Packing:
    """How a stage packs its steps; the sections data and stages of the config say what each means. cost: of the stage's model."""

    length: int
    num_packs: int
    window: int
    long_documents: Literal["skip", "split"]
    image_attention: Literal["bidirectional", "causal"]
    tile: int
    cost: Cost

    def pack(self, documents: list[Document | SkippedSample]) -> PackedBatch:
        kept = [one for one in documents if isinstance(one, Document)]
        return pack(kept, self.length, self.image_attention, self.tile)

    def packer(self, measure: Callable[[Sequence[int]], list[Measured | SkippedSample]], state: PackerState | None = None) -> Packer:
        return Packer(measure, self.length, self.num_packs, self.window, self.long_documents, self.cost, self.image_attention, state)


@dataclass(frozen=True)
class Place:
    """Of this rank among all, and of its replica among those that take different packs."""

    rank: int
    size: int
    replica: int
    num_replicas: int


class Loader:
    """Iterates over StepBatch, for ever where the stream has no end; a UserError says where it has. ``close`` ends the thread and the
    workers; an error in them is raised by the next step, on all ranks. weights: of the stream's sources, where they change; prefetch:
    steps that are made ahead; first_step: the number of the first one, for errors; done: steps of the stage before it."""

    def __init__(
        self,
        stream: SampleStream,
        reader: Reader,
        packing: Packing,
        place: Place,
        exchange: Exchange,
        state: PackerState | None = None,
        *,
        weights: WindowWeights | None = None,
        num_workers: int = 0,
        prefetch: int = 1,
        first_step: int = 1,
        done: int = 0,
    ):
        self.stream, self.packing, self.place, self.exchange, self.state = stream, packing, place, exchange, state
        self.weights, self.planned = weights, done
        self.prefetch, self.step, self.empty_steps = prefetch, first_step, 0
        self.workers = Workers(reader, num_workers)
        self.ahead: deque[tuple[StepPlan, list[list[int]], list[Future[list[Document | SkippedSample]]]]] = deque()
        # This rank's part of the next window, which is measured while steps are built from those before it.
        self.measuring: tuple[list[Draw], list[Future[list[Measured | SkippedSample]]]] = [], []
        self.ready: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=1)
        self.closed = threading.Event()
        self.sharing = Sharing(exchange, place.rank, self.closed)
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
        self.thread.join(LAST_EXCHANGE if self.place.size > 1 else None)
        self.workers.close()
        if not self.thread.is_alive():
            self.exchange.close()

    # The thread.

    def _work(self) -> None:
        try:
            packer = self.packing.packer(self._measure, self.state)
            while True:
                while len(self.ahead) < self.prefetch and (plan := packer.next()) is not None:
                    self._begin(plan)
                if not self.ahead:
                    raise UserError(
                        f"step {self.step}: each source was shown as often as epochs of the stage allows, after {self.planned} of "
                        "its steps; lower its steps to that, or raise its epochs"
                    )
                if not self._hand_over(self._finish(*self.ahead.popleft())):
                    self.sharing.share(lambda: None)  # the others are in their next exchange, or come to it: it ends them too
                self.step += 1
        except Closing:
            self._hand_over(UserError("another rank has ended its part of the run"))
        except Told as told:
            self._hand_over(told.error)
        except Exception as error:  # of this rank alone, or of all alike
            with contextlib.suppress(Exception):  # the others may be gone
                self.sharing.tell(error)
            self._hand_over(error)

    def _hand_over(self, item: StepBatch | Exception) -> bool:
        """Give something to the thread that trains, when it comes for it; False where that has closed this one."""
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return True
        return False

    def _measure(self, samples: Sequence[int]) -> list[Measured | SkippedSample]:
        """What the samples are, of a window those that there are; this rank measures every size-th."""
        if isinstance(samples, range):
            self._begin_window(samples.start)
        samples = self.stream.available(samples)
        futures = self._measuring(samples)
        shares = self.sharing.share(lambda: [found for future in futures for found in result_of(future)])
        found: list[Any] = [None] * len(samples)
        for rank, share in enumerate(shares):
            found[rank :: self.place.size] = share
        if self.workers.count and isinstance(samples, range):
            self._measuring(self.stream.available(range(samples.stop, samples.stop + len(samples))))
        return self._second_opinions(samples, found)

    def _begin_window(self, first: int) -> None:
        """Weights for the samples from ``first`` on, as soon as training has posted what they follow from."""
        if self.weights is None:
            return
        while (mix := self.weights.at(self.planned + 1)) is None:
            if self.closed.is_set():
                self.sharing.share(lambda: None)  # ends the others' threads and this one
        self.stream.change(first, mix)

    def _measuring(self, samples: Sequence[int]) -> list[Future[list[Measured | SkippedSample]]]:
        """Of this rank's part of the samples; begun anew where other weights have made them other ones meanwhile."""
        draws = [self.stream[sample] for sample in samples[self.place.rank :: self.place.size]]
        if self.measuring[0] != draws:
            self.measuring = draws, self._ask(draws)
        return self.measuring[1]

    def _ask(self, draws: Sequence[Draw]) -> list[Future[list[Measured | SkippedSample]]]:
        return [self.workers.measure(draws[low : low + CHUNK]) for low in range(0, len(draws), CHUNK)]

    def _second_opinions(self, samples: Sequence[int], found: list[Measured | SkippedSample]) -> list[Measured | SkippedSample]:
        """What one rank could not read is tried by one that is far from it. Raises UserError where that can: a disk is missing."""
        size = self.place.size
        doubtful = [i for i, one in enumerate(found) if isinstance(one, SkippedSample) and one.cause in READING_CAUSES]
        if size == 1 or not doubtful:
            return found
        others = {i: (i % size + max(1, size // 2)) % size for i in doubtful}
        mine = [i for i in doubtful if others[i] == self.place.rank]
        again = [self.stream[samples[i]] for i in mine]
        shares = self.sharing.share(lambda: [one for future in self._ask(again) for one in result_of(future)])
        opinions = [iter(share) for share in shares]
        for i in doubtful:
            opinion = next(opinions[others[i]])
            if opinion != found[i]:
                raise self._differ(opinion, f"on rank {others[i]}", found[i], i % size)
        return found

    def _begin(self, plan: StepPlan) -> None:
        """Give what this replica builds of a step to the workers."""
        dealt = deal_packs(np.array([sum(piece.cost for piece in one) for one in plan.packs]), self.place.num_replicas)
        futures = [self.workers.build([self._part(piece) for piece in plan.packs[number]]) for number in dealt[self.place.replica]]
        self.stream.forget(plan.state.oldest)
        self.planned += 1
        self.ahead.append((replace(plan, state=replace(plan.state, log=self.stream.log())), dealt, futures))

    def _part(self, piece: Piece) -> Part:
        return Part(self.stream[piece.sample], piece.document, piece.low, piece.high)

    def _built(self, future: Future[list[Document | SkippedSample]]) -> list[Document | SkippedSample]:
        try:
            return result_of(future)
        except Unlike as unlike:
            raise self._differ(unlike.measured, "where it was measured", unlike.found, self.place.rank) from unlike

    def _differ(self, one: Measured | SkippedSample, where: str, other: Measured | SkippedSample, rank: int) -> UserError:
        return UserError(
            f"step {self.step}: the ranks read different data: record {one.record} of source {one.source!r} is {one} {where} and "
            f"{other} on rank {rank}; give every machine the same files, then --resume"
        )

    def _finish(self, plan: StepPlan, dealt: list[list[int]], futures: list[Future[list[Document | SkippedSample]]]) -> StepBatch:
        built: list[list[Document | SkippedSample]] = []

        def build() -> _Outcome:
            built.extend(self._built(future) for future in futures)
            return _Outcome.of(self.place.replica, dealt[self.place.replica], built, plan)

        targets, dropped = self._agreed(self.sharing.share(build))
        self._check_usable(plan, dropped)
        pieces = [piece for number, one in enumerate(plan.packs) for i, piece in enumerate(one) if (number, i) not in dropped]
        costs = np.array([sum(piece.cost for number in numbers for piece in plan.packs[number]) for numbers in dealt])
        tokens = sum(map(len, pieces))
        kept = [sum((number, i) not in dropped for i in range(len(one))) for number, one in enumerate(plan.packs)]
        return StepBatch(
            packs=[self.packing.pack(made) for made in built],
            firsts=[sum(kept[:number]) for number in dealt[self.place.replica]],
            loss_tokens=float(targets),
            tokens=tokens,
            documents=Counter(piece.document.source for piece in pieces),
            samples=[SampleId(piece.document.source, piece.document.record, piece.sample) for piece in pieces],
            fill=tokens / (self.packing.num_packs * self.packing.length),
            spread=float(costs.max() / costs.mean()),
            skipped=[*plan.skipped, *dropped.values()],
            state=plan.state,
        )

    def _check_usable(self, plan: StepPlan, dropped: dict[tuple[int, int], SkippedSample]) -> None:
        """Raise BadRecord when nothing could be decoded of several steps in a row: the data is wrong, not a record."""
        self.empty_steps = self.empty_steps + 1 if len(dropped) == sum(map(len, plan.packs)) else 0
        if self.empty_steps == EMPTY_STEPS:
            causes = ", ".join(f"{n} x {cause}" for cause, n in Counter(one.cause for one in dropped.values()).most_common())
            first = next(iter(dropped.values()))
            raise BadRecord(
                "no usable record",
                f"nothing of {EMPTY_STEPS} steps in a row could be decoded (of the last: {causes}); record {first.record} of source "
                f"{first.source!r}: {first.detail}",
            )

    def _agreed(self, outcomes: list[_Outcome]) -> tuple[int, dict[tuple[int, int], SkippedSample]]:
        """Targets of the whole step, and what is dropped from it, by pack and place in it. Raises UserError where ranks differ."""
        by_replica: dict[int, _Outcome] = {}
        for rank, outcome in enumerate(outcomes):
            if outcome.plan != outcomes[0].plan:
                raise UserError(
                    f"step {self.step}: rank {rank} has packed the same data otherwise than rank 0; install the same versions on "
                    "every machine, then --resume"
                )
            if by_replica.setdefault(outcome.replica, outcome) != outcome:
                raise UserError(
                    f"step {self.step}: rank {rank} has decoded other images than the ranks that share its packs; give every machine "
                    "the same files and the same version of Pillow, then --resume"
                )
        dropped = {at: one for outcome in by_replica.values() for at, one in outcome.dropped.items()}
        return sum(outcome.targets for outcome in by_replica.values()), {at: dropped[at] for at in sorted(dropped)}


@dataclass(frozen=True)
class _Outcome:
    """What became of the packs of a replica. targets: tokens that the loss counts; dropped: by number of the pack and place in it;
    plan: the same on every rank that has planned the same step."""

    replica: int
    targets: int
    dropped: dict[tuple[int, int], SkippedSample]
    plan: int

    @staticmethod
    def of(replica: int, numbers: list[int], built: list[list[Document | SkippedSample]], plan: StepPlan) -> _Outcome:
        made = {(number, i): one for number, pack in zip(numbers, built, strict=True) for i, one in enumerate(pack)}
        dropped = {at: one for at, one in made.items() if isinstance(one, SkippedSample)}
        targets = sum(num_targets(one) for one in made.values() if isinstance(one, Document))
        rows = [[(piece.sample, piece.low, piece.high) for piece in pack] for pack in plan.packs]
        return _Outcome(replica, targets, dropped, zlib.crc32(repr(rows).encode()))


def num_targets(document: Document) -> int:
    """Tokens that the loss counts: the first of a document is never predicted."""
    return int(document.targets[1:].sum())
