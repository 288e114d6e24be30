"""Turns a stalled collective into an error that names the rank, the collective and the line that issued it, within a set time.

Each process has a daemon thread. It publishes the process's heart (step, line, what it waits for) to the store of the run, over a
connection of its own, since a blocked connection would block it. It raises an alarm when no step has ended for ``timeout`` and one
collective has not moved for the second half of that; every rank then answers with its whole state, and the first to have all answers
writes the report and ends with exit code ``STALLED``; the others follow, so that torchrun starts the group again. The rank to blame
is often the one that does not wait; the report names it first.

A report comes between 1 and 1.6 times ``timeout`` after the last step, plus ``GRACE``: ``group_timeout`` is longer.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from . import stalls
from .compat import own_connection, recorded_collectives
from .stalls import Collective, Heart

# The exit code of a stalled run, that of a temporary failure.
STALLED = 75
# The first step of a stage compiles, tunes and fills caches: its limit is so many times longer.
FIRST_STEP = 3.0
# Seconds that a rank may take to answer an alarm; a process that says nothing for so long is called silent.
GRACE = 6.0
# A heart beats so often within the limit, at least every LONGEST_TICK seconds.
TICKS, LONGEST_TICK = 20, 2.0
# Seconds that a heart may wait for the store.
STORE_TIMEOUT = timedelta(seconds=10)


def group_timeout(timeout: timedelta) -> timedelta:
    """The timeout of process groups under a watchdog of ``timeout``: the watchdog, which knows more, speaks first."""
    return 2 * FIRST_STEP * timeout + timedelta(seconds=60)


class Watchdog:
    """Watches this process; a context manager. The thread that starts it is the one that trains.

    timeout: the longest time between two calls of ``beat`` while a collective waits; 0, or a single process, turns it off.
    store: that of the run, whose keys belong to this life of the processes. report: a file that reports are appended to.
    """

    def __init__(self, world_rank: int, world_size: int, timeout: timedelta, store: dist.Store | None, report: Path | None = None):
        self.rank, self.size, self.report = world_rank, world_size, report
        self.timeout = timeout.total_seconds()
        self.tick = min(self.timeout / TICKS, LONGEST_TICK)
        self._store: dist.Store | None = None
        if store is not None and world_size > 1 and self.timeout > 0:
            self._store = dist.PrefixStore("watchdog", own_connection(store))
            self._store.set_timeout(STORE_TIMEOUT)
        self._names: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
        self._training_thread = threading.get_ident()
        self._count = self._step = 0
        # The first record with stacks imports a part of torch, for seconds: not while training goes on, nor in the answering thread.
        self._frames = threading.Thread(target=recorded_collectives, args=(True,), name="watchdog stacks", daemon=True)
        self._ending = False
        self._pauses: list[str] = []
        self._state, self._at = "running", ""
        self._since, self._patience = time.monotonic(), FIRST_STEP
        # When each unfinished collective was first seen; when each rank's count was last seen to change.
        self._seen: dict[tuple[str, str, int | None], float] = {}
        self._heard: dict[int, tuple[int, float]] = {}
        self._alarm: float | None = None

    def name_group(self, group: dist.ProcessGroup, name: str) -> None:
        """Call a group ``name`` in reports."""
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        known = self._names.get(group.group_name)
        self._names[group.group_name] = f"{known.partition(' [')[0]}/{name} [{ranks}]" if known else f"{name} [{ranks}]"

    def name_mesh(self, mesh: DeviceMesh) -> None:
        """Call the groups of a mesh by its axes; those of a flattened mesh by its one axis."""
        for axis in mesh.mesh_dim_names or ():
            self.name_group(mesh.get_group(axis), axis)

    def start(self) -> None:
        """Begin to watch. The limit until the first ``beat`` is ``FIRST_STEP`` times the timeout."""
        self._training_thread, self._since = threading.get_ident(), time.monotonic()
        if self._store is not None:
            self._publish(full=False)
            self._thread.start()

    def beat(self, step: int, patience: float = 1.0) -> None:
        """Call between steps. step: how many are done; patience: the limit of the step that begins, in timeouts."""
        self._step, self._patience, self._since = step, patience, time.monotonic()

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Work of unknown length (evaluation, a save): as long as one live rank is in it, no rank calls a wait a stall.

        A rank that dies in it is still reported by ranks that wait outside of it; the timeouts of the groups hold in any case.
        """
        self._pauses.append(reason)
        try:
            yield
        finally:
            self._pauses.pop()
            self._since = time.monotonic()

    def stop(self) -> None:
        """Cease to watch; this rank is said to have ended."""
        self._leave_with("ended")

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            return self.stop()
        if self._ending:
            # The others of the run have ended a moment before this process does, and their connections closed.
            self._thread.join()
        frames = stalls.stack_of_error(traceback)
        self._at = stalls.place(frames)
        if isinstance(error, Exception) and any(stalls.is_distributed(f) for f in frames):
            self._state = f"{stalls.LOST} {stalls.caller(frames)}: {_first_line(error)}"
            if self._store is not None:
                self._explain()
        else:
            self._state = f"failed with {type(error).__name__}: {_first_line(error)}"
        self._leave_with(self._state)

    def _explain(self) -> None:
        """Say which collective failed, and what became of the other ranks: of a dead one gloo says only that a connection closed."""
        head = f"rank {self.rank} {self._state}: in step {self._step + 1} at {self._at}"
        self._say(f"{head}\n  asking the other ranks, {GRACE:.0f} s", file=False)
        try:
            assert self._store is not None
            self._store.set("alarm", str(self.rank))
            self._read()
            time.sleep(GRACE + 2 * self.tick)
            hearts = self._read()
            del hearts[self.rank]
            if self._store.add("explained", 1) == 1:
                self._say(f"{head}\n{stalls.describe(hearts, self._silent())}")
            # The others look at the same time, and this process may hold the store.
            time.sleep(self.tick + 1)
        except (RuntimeError, OSError) as error:
            self._say(f"{head}\n  what the other ranks do is not known: {_no_store(error)}")

    def _leave_with(self, state: str) -> None:
        self._state = state
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(self.tick):
            try:
                self._watch()
            except (RuntimeError, OSError) as error:
                if (waiting := self._stalled()) and not self._pauses:
                    self._say(f"{self._headline(waiting)}\n  what the other ranks do is not known: {_no_store(error)}")
                    self._end()
        try:
            self._publish(full=False)
        except (RuntimeError, OSError):
            # The process that holds the store may have ended first.
            return

    def _watch(self) -> None:
        """One look: publish, and judge if this rank waits too long."""
        assert self._store is not None
        alarm = self._store.check(["alarm"])
        self._publish(full=alarm)
        if alarm and self._store.check(["tripped"]):
            self._say(f"rank {self.rank} ends too; it was in step {self._step + 1} at {self._place()}", file=False)
            self._end()
        if waiting := self._stalled():
            self._judge(waiting)
        else:
            self._call_off()

    def _publish(self, full: bool) -> None:
        assert self._store is not None
        self._count += 1
        state = self._state if self._state != "running" or not self._pauses else f"paused for {', '.join(self._pauses)}"
        heart = Heart(self._count, self._step + 1, state, self._place())
        if full:
            stacks = stalls.training_stacks(self._training_thread)
            entries = recorded_collectives(stacks=self._frames.ident is not None and not self._frames.is_alive())
            waiting = stalls.unfinished(entries, self._names) or [c for s in stacks if (c := stalls.waiting_by_stack(s))][:1]
            stack = [] if waiting or self._at else [stalls.line(f) for f in stacks[0][: stalls.STACK]]
            heart = Heart(self._count, self._step + 1, state, heart.at, waiting, stalls.newest(entries, self._names), stack)
        self._store.set(f"heart/{self.rank}", heart.to_json())

    def _stalled(self) -> Collective | None:
        """The collective that has not moved for half the limit, if no step has ended for the whole of it.

        Both: a long step with collectives that move is slow, and a background thread may wait long while steps go on.
        """
        now, limit = time.monotonic(), self.timeout * self._patience
        if self._pauses or self._state != "running" or now - self._since < limit / 2:
            self._seen.clear()
            return None
        waiting = stalls.unfinished(recorded_collectives(stacks=False), self._names)
        if not waiting:
            waiting = [c for s in stalls.training_stacks(self._training_thread) if (c := stalls.waiting_by_stack(s))]
        found = {(c.kind, c.group, c.number): c for c in waiting}
        self._seen = {key: self._seen.get(key, now) for key in found}
        oldest = min(self._seen, key=self._seen.__getitem__, default=None)
        if oldest is not None and now - self._seen[oldest] > limit / 4 and self._frames.ident is None:
            self._frames.start()
        if oldest is None or now - self._since < limit or now - self._seen[oldest] < limit / 2 - 2 * self.tick:
            return None
        return found[oldest]

    def _judge(self, waiting: Collective) -> None:
        """Raise the alarm; once the ranks have had time to answer, end the run, unless a live rank is in a pause."""
        assert self._store is not None
        hearts, silent = self._read(), self._silent()
        if not silent and any(h is not None and h.state.startswith("paused") for h in hearts.values()):
            self._call_off()
            return
        self._store.set("alarm", str(self.rank))
        if self._alarm is None:
            self._alarm = time.monotonic()
        if time.monotonic() - self._alarm < GRACE:
            return
        # One rank reports; a second report of the same stall would only differ in who waits for whom.
        if self._store.add("tripped", 1) == 1:
            self._say(f"{self._headline(waiting)}\n{stalls.describe(hearts, silent)}")
            self._end()

    def _call_off(self) -> None:
        if self._alarm is not None:
            assert self._store is not None
            self._alarm = None
            self._store.delete_key("alarm")

    def _headline(self, waiting: Collective) -> str:
        seconds = time.monotonic() - self._since
        return f"rank {self.rank} waits in {waiting}; no step has ended for {seconds:.0f} s (watchdog: {self.timeout:g} s)"

    def _read(self) -> dict[int, Heart | None]:
        """The heart of every rank; None for those without one."""
        assert self._store is not None
        keys = [f"heart/{rank}" for rank in range(self.size)]
        here = [True] * self.size if self._store.check(keys) else [self._store.check([key]) for key in keys]
        found = iter(self._store.multi_get([key for key, there in zip(keys, here, strict=True) if there]))
        hearts = {rank: Heart.from_json(next(found).decode()) if there else None for rank, there in enumerate(here)}
        now = time.monotonic()
        for rank, heart in hearts.items():
            if heart is not None and self._heard.get(rank, (-1, 0.0))[0] != heart.count:
                self._heard[rank] = heart.count, now
        return hearts

    def _silent(self) -> set[int]:
        """Ranks whose count has not changed for ``GRACE`` while this rank looked; clocks of machines are not compared."""
        return {rank for rank, (_, since) in self._heard.items() if rank != self.rank and time.monotonic() - since >= GRACE}

    def _place(self) -> str:
        return self._at or stalls.place(stalls.training_stacks(self._training_thread)[0])

    def _say(self, text: str, file: bool = True) -> None:
        sys.stderr.write(f"watchdog: {text}\n")
        sys.stderr.flush()
        if file and self.report is not None:
            try:
                self.report.parent.mkdir(parents=True, exist_ok=True)
                with self.report.open("a") as out:
                    out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            except OSError as error:
                sys.stderr.write(f"watchdog: the report could not be written to {self.report}: {error.strerror}\n")
                sys.stderr.flush()

    def _end(self) -> NoReturn:
        self._ending = True
        # Not before the others have seen it: this process may hold the store, and torchrun kills all when the first one ends.
        time.sleep(self.tick + 1)
        # Not sys.exit: the training thread is blocked in C++ and would never hear of it.
        os._exit(STALLED)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _no_store(error: Exception) -> str:
    return f"the store of the run cannot be reached ({_first_line(error)}); the process or machine that holds it may be gone"
