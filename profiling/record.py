"""Recording: some steps of a run as a Chrome trace of torch.profiler, one file a rank, with what ``smalt trace`` needs to read it."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from smalt.parallel.compat import recorded_collectives

STEP = "smalt step "
"""A recorded step is an annotation of this name and its number."""


def recording_folder(folder: Path, first_step: int, num_steps: int, done: int) -> Path:
    """Where a run that goes on after step ``done`` puts its recording, not yet made: ``folder/step-00000006``, by its first step.

    A run that was killed and goes on takes steps again, perhaps on other ranks: where they have been recorded before, the name goes on
    with -2, so that no folder holds files of two lives. Asked-for steps that are over and were never recorded are named on stderr.
    """
    first, last = max(first_step, done + 1), first_step + num_steps - 1
    if num_steps and done >= first_step and not (folder / _name(first_step)).exists():
        rest = f"only {first} to {last} are" if first <= last else "none is"
        said = f"steps {first_step} to {last} were to be recorded (logging.trace_steps); the run goes on after step {done}: {rest}"
        sys.stderr.write(f"warning: {said}\n")
    names = (_name(first) + (f"-{life}" if life > 1 else "") for life in count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _name(step: int) -> str:
    return f"step-{step:08d}"


class TraceRecorder:
    """Records steps ``first_step`` to ``first_step + num_steps - 1`` into ``folder/rank-00003.json.gz``.

    :meth:`step` is called after every optimiser step, :meth:`close` at the end. With ``num_steps`` 0 both do nothing. A run that ends
    early leaves a trace of the steps it finished. The profiler warms up over the step before the first, where there is one.

    axes: process groups by the name of their mesh axis. A group that is not among them is named by its description, which DeviceMesh
    sets to ``mesh_NAME``; a mesh whose axis spans all ranks may have the default group, which only this can name. Of several names of
    one group the first counts. done: steps taken before (a resumed run): of those to be recorded only later ones are.

    On a GPU the device is synchronised before the first and at the end of the last recorded step, so that they hold their kernels.
    Profiling costs time, of which short operations feel most: a recorded step is slower than others.
    """

    def __init__(
        self, folder: Path, rank: int, first_step: int, num_steps: int,
        axes: Mapping[str, dist.ProcessGroup] | None = None, done: int = 0,
    ):  # fmt: skip
        self.path, self.rank, self.done, self.axes = folder / f"rank-{rank:05d}.json.gz", rank, done, axes or {}
        self.first = max(first_step, done + 1)
        self.num_steps = max(0, first_step + num_steps - self.first)
        self.profiler: profile | None = None
        self.annotation: record_function | None = None
        self.launches: list[dict[str, Any]] = []
        self.since_ns = 0
        self._begin()

    def step(self) -> None:
        """An optimiser step is over."""
        if self.num_steps == 0:
            return
        self.done += 1
        if self.annotation is not None:
            if self.done == self.first + self.num_steps - 1:
                self._write()
                return
            self.annotation.__exit__(None, None, None)
            self._keep_launches()
        self._begin()

    def close(self) -> None:
        """Write the finished steps, if that has not been done; without one there is no file."""
        if self.profiler is not None and self.done >= self.first:
            self._write()
        elif self.profiler is not None:
            # torch ends a warm-up by starting and stopping at once.
            if self.annotation is None:
                self.profiler.start_trace()
            else:
                self.annotation.__exit__(None, None, None)
            self.profiler.stop_trace()
            self.profiler, self.annotation = None, None
        self.num_steps = 0

    def _begin(self) -> None:
        """Warm up, or record, the step to come, if it is its turn."""
        coming = self.done + 1
        if self.num_steps == 0 or not self.first - 1 <= coming < self.first + self.num_steps:
            return
        if self.profiler is None:
            cuda = torch.cuda.is_initialized()
            # Shapes are where the bytes of a collective on gloo come from.
            self.profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], record_shapes=True)
            self.profiler.prepare_trace()
        if coming == self.first:
            _synchronize()
            self.since_ns = time.time_ns()
            self.profiler.start_trace()
        if coming >= self.first:
            self.annotation = record_function(f"{STEP}{coming}")
            self.annotation.__enter__()

    def _write(self) -> None:
        """End the recording and write the file, whole or not at all."""
        assert self.profiler is not None
        assert self.annotation is not None
        _synchronize()
        self.annotation.__exit__(None, None, None)
        self._keep_launches()
        self.profiler.add_metadata_json("smalt", json.dumps(self._metadata()))
        self.profiler.stop_trace()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Names that no reader takes for a trace.
        plain, packed = self.path.with_suffix(".plain"), self.path.with_suffix(".partial")
        self.profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        packed.rename(self.path)
        self.profiler, self.annotation, self.num_steps = None, None, 0

    def _metadata(self) -> dict[str, Any]:
        size = dist.get_world_size() if dist.is_initialized() else 1
        groups: dict[str, dict[str, Any]] = {}
        for axis, group in self.axes.items():
            groups.setdefault(group.group_name, {"axis": axis, "ranks": dist.get_process_group_ranks(group)})
        # A step that close() cut short has its annotation too; last_step is the last that counts.
        return {"rank": self.rank, "world_size": size, "last_step": self.done, "groups": groups, "launches": self.launches}

    def _keep_launches(self) -> None:
        """Take the new launches from gloo's flight recorder, which keeps only the newest of all."""
        if not dist.is_initialized() or torch.cuda.is_initialized():
            return
        for entry in recorded_collectives(stacks=False):
            if entry["time_created_ns"] >= self.since_ns:
                group, description = entry["process_group"]
                sizes = max(_elements(entry["input_sizes"]), _elements(entry["output_sizes"]))
                self.launches.append(
                    {
                        "name": entry["profiling_name"], "group": group, "description": description,
                        "time_ns": entry["time_created_ns"], "elements": sizes, "dtype": (entry["input_dtypes"] or [""])[0],
                    }
                )  # fmt: skip
        self.since_ns = time.time_ns()


def _elements(sizes: list[list[int]]) -> int:
    return sum(torch.Size(size).numel() for size in sizes)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
