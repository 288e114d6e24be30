"""How the processes of a run find each other in a key-value store, where the keys of processes that have died may still be."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# For all to come; also of process groups, where no watchdog speaks earlier.
TIMEOUT = timedelta(minutes=10)
SECONDS_BETWEEN_BEATS = 2.0


def open_store() -> dist.Store:
    """The store of torchrun, or, where something else has set its variables, one that rank 0 holds."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # Not through torch's rendezvous, some versions of which put the keys under this process's count of restarts.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]


def meet_in_store(store: dist.Store, rank: int, size: int, restarts: int, timeout: timedelta = TIMEOUT) -> tuple[dist.Store, bool]:
    """The part of the store that belongs to this life of the processes, and, for rank 0, whether any process had one before.

    Processes that are started again find the keys of dead ones, addresses among them. The number of restarts does not tell lives
    apart: each torchrun of several counts those that its own workers caused. So every process says hello under a name of its own,
    rank 0 answers under that name with one for all, and goes on when all have come. No process of an earlier life is left then:
    every torchrun ends its workers before it meets the others. Raises RuntimeError, naming the ranks that did not come.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"hello/{rank}", me)
        life = _wait_for_answer(store, f"answer/{me}", timeout)
        store.set(f"{life}/here/{rank}", str(restarts))
        return dist.PrefixStore(life, store), restarts > 0
    life, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, size)), set[str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"{life}/here/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]) and (name := store.get(f"hello/{other}").decode()) not in answered:
                answered.add(name)
                store.set(f"answer/{name}", life)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, sorted(missing)))} did not come within {timeout.total_seconds():g} s")
        time.sleep(0.02)
    before = [int(store.get(f"{life}/here/{other}")) for other in range(1, size)]
    return dist.PrefixStore(life, store), max([restarts, *before]) > 0


def _wait_for_answer(store: dist.Store, key: str, timeout: timedelta) -> str:
    try:
        store.wait([key], timeout)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"rank 0 did not come within {timeout.total_seconds():g} s, or its store is gone: {error}") from error
    return store.get(key).decode()


@contextmanager
def alive(store: dist.Store, name: str) -> Iterator[None]:
    """While it is open, processes in :func:`wait_for_alive` of that name wait, however long it takes."""
    closed = threading.Event()

    def count() -> None:
        while not closed.wait(SECONDS_BETWEEN_BEATS):
            store.add(f"{name}/beats", 1)

    thread = threading.Thread(target=count, name=f"alive in {name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        store.set(f"{name}/over", "")


def wait_for_alive(store: dist.Store, name: str, timeout: timedelta = TIMEOUT) -> None:
    """Return when rank 0, which opens :func:`alive` of that name, has closed it. Raises RuntimeError when it has given no sign of life
    for ``timeout``."""
    began = heard = time.monotonic()
    beats = 0
    while not store.check([f"{name}/over"]):
        if (now := store.add(f"{name}/beats", 0)) != beats:
            beats, heard = now, time.monotonic()
        if time.monotonic() - heard > timeout.total_seconds():
            raise RuntimeError(f"rank 0 has given no sign of life for {timeout.total_seconds():g} s; this rank waits for its {name}")
        # Often while it may soon be over, seldom when many wait long.
        time.sleep(min(1.0, 0.02 + 0.1 * (time.monotonic() - began)))
