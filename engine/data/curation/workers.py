"""Runs a function over chunks on several processes: results come in order, and only so many wait at a time."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Literal

from ...errors import UserError
from ..records import Records
from .config import CurationConfig
from .job import Chunk, Examined, Indices, Job, Row, build_steps

Task = Literal["examine", "rows"]
Run = Callable[[Task, Iterable[Chunk]], Iterator[list[Examined] | list[Row]]]
_job: Job | None = None


@contextmanager
def workers(job: Job, indices: Indices) -> Iterator[Run]:
    """A function that maps a task over chunks, in this process or in several. A process that dies is a UserError."""
    count = job.config.num_processes
    if count == 1:
        yield lambda task, chunks: (getattr(job, task)(chunk) for chunk in chunks)
        return
    # A fork of this process would inherit the locks of its threads (Arrow's, the tokenizer's); a fork of a fresh server does not.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(count, context, _start, (job.config, job.sources, indices)) as pool:
        try:
            yield lambda task, chunks: _in_order(pool, task, chunks, 2 * count)
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the curation has died, perhaps for want of memory: try fewer --processes, or a smaller chunk"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(config: CurationConfig, sources: dict[str, Records], indices: Indices) -> None:
    global _job
    _job = Job(config, sources, build_steps(config, indices))


def _work(task: Task, chunk: Chunk) -> list[Examined] | list[Row]:
    assert _job is not None
    return getattr(_job, task)(chunk)


def _in_order(pool: ProcessPoolExecutor, task: Task, chunks: Iterable[Chunk], ahead: int) -> Iterator[list[Examined] | list[Row]]:
    waiting: deque[Future[list[Examined] | list[Row]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_work, task, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
