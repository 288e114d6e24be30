"""Worker processes that read, measure and decode records; without any, the thread that asks does it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

import torch

from smalt.model import Document

from ..errors import UserError
from .reading import Draw, Measured, Part, Reader, SkippedSample

# Of a process, set when it begins.
_reader: Reader


class Workers:
    """A reader in ``count`` processes; results come in any order. ``close`` ends the processes."""

    def __init__(self, reader: Reader, count: int):
        self.reader, self.count = reader, count
        self.pool = None
        if count:
            # Not a fork of this process: it has threads, and perhaps a GPU. The server imports once what each worker needs.
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self.pool = ProcessPoolExecutor(count, context, _begin, (reader,))
            for _ in range(count):  # all of them start now: the first step waits for them
                self.pool.submit(os.getpid)

    def measure(self, draws: Sequence[Draw]) -> Future[list[Measured | SkippedSample]]:
        return self._submit(_measure, self.reader.measure, draws)

    def build(self, parts: Sequence[Part]) -> Future[list[Document | SkippedSample]]:
        return self._submit(_build, self.reader.build, parts)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, remote: Callable[[Any], Any], here: Callable[[Any], Any], task: Any) -> Future[Any]:
        if self.pool is not None:
            try:
                return self.pool.submit(remote, task)
            except BrokenProcessPool as error:
                raise worker_died() from error
        done: Future[Any] = Future()
        try:
            done.set_result(here(task))
        except Exception as error:
            done.set_exception(error)
        return done


def result_of(future: Future[Any]) -> Any:
    """The result, once it is there. Raises what the work raised, and UserError for a worker that died."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise worker_died() from error


def worker_died() -> UserError:
    return UserError(
        "a worker process that reads data died, or was killed for the memory that it took; lower data.workers, data.prefetch or "
        "data.max_image_pixels, then --resume"
    )


def _begin(reader: Reader) -> None:
    global _reader
    _reader = reader
    torch.set_num_threads(1)
    # Who ends the run asks its main process; one that is told directly could not finish its last step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed closes no queue: its workers would wait for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)


def _measure(draws: Sequence[Draw]) -> list[Measured | SkippedSample]:
    return _reader.measure(draws)


def _build(parts: Sequence[Part]) -> list[Document | SkippedSample]:
    return _reader.build(parts)
