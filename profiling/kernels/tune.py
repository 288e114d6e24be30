"""``smalt kernels tune``: launch configurations measured on this machine's GPU, for the launch tables of its chip.

Each row of the table is tuned by the first of ``WORKLOADS`` that launches it. The row that ships runs against the best guesses of
launch_model.py. Each computes the whole operation, with all other kernels as they ship, and must compute what the shipped row does.
Timed are launches alone, by the clock of ``smalt bench kernels``: those that take the row, and those whose work follows from its
tiles, such as the sum of the partial results that a kernel leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from smalt.kernels.launch import TABLES, Config, Launch, configuration, configured_for, launch, recording, target

from ..bench import no_gpu
from .bench import reason
from .bench_cases import Absent, Call, Given
from .bench_time import Device, Gpu, Runner, race, summary
from .configure import Row, choice, describe, place, read_rows, write_rows
from .launch_model import KERNELS, ranked
from .launch_model import row as row_of
from .tune_workloads import DTYPES, WORKLOADS, Workload

GAIN = 0.02  # of the shipped row's time; what gains less may be noise
RACE_SECONDS = 0.5
# Of the largest number of a result: some roundings to bf16; in fp32 sums in another order, which may nearly cancel.
TOLERANCE = {16: 2.0**-6, 32: 2.0**-9}


# The command


@dataclass(frozen=True)
class Tuned:
    """One row: that which ships and that which is best (the same where none gains enough), their median times in seconds, the
    workload, how many were timed, and a line for each that dropped out."""

    shipped: Row
    chosen: Row
    shipped_seconds: float
    seconds: float
    workload: str
    timed: int
    dropped: tuple[str, ...] = ()

    def line(self) -> str:
        before = f"{describe(self.shipped)}, {self.shipped_seconds * 1e6:.1f} us"
        if self.chosen == self.shipped:
            return f"{before}, stays: of {self.timed} none is over {GAIN:.0%} faster ({self.workload})"
        after = f"{choice(self.chosen)}, {self.seconds * 1e6:.1f} us"
        return f"{before} -> {after}, x {self.shipped_seconds / self.seconds:.2f} ({self.workload})"


def tune_kernels(
    kernel: str | None = None, candidates: int = 8, write: bool = False, folder: Path = TABLES, say: Callable[[str], None] = print
) -> None:
    """Tune on the current GPU and say what came of each row; with ``write`` each better row goes into its table at once.

    Raises ValueError without a GPU, and as :func:`tune` does.
    """
    if problem := no_gpu():
        raise ValueError(f"{problem}; run this on the GPU that is to be tuned. `smalt kernels configure` needs none")
    for outcome in tune(Gpu(), kernel, candidates):
        if isinstance(outcome, str):
            say(f"not tuned  {outcome}")
            continue
        say(outcome.line())
        for line in outcome.dropped:
            say(f"  dropped  {line}")
        if write and outcome.chosen != outcome.shipped:
            for path in put_row(outcome.chosen, folder):
                say(f"  written  {path}")


def tune(
    device: Device, kernel: str | None = None, candidates: int = 8, workloads: Iterable[Workload] = WORKLOADS
) -> Iterator[Tuned | str]:
    """Tune the rows of the device's chip, one after the other; for what is not tuned a line that names it and says why.

    kernel: only this one; candidates: guesses of the model beside the shipped row. Raises ValueError for an unknown kernel or no
    candidates.
    """
    names = [k.name for k in KERNELS]
    if kernel not in (None, *names):
        raise ValueError(f"unknown kernel {kernel!r}; choose among {', '.join(names)}")
    if candidates < 1:
        raise ValueError(f"{candidates} candidates; expected 1 or more")
    chip = target(torch.empty(0, device=device.name))
    table = [r for r in read_rows() if r["target"] == chip]
    wanted = names if kernel is None else [kernel]
    yield from (f"{name} on {chip}: the launch table has no row of it" for name in wanted if all(r["kernel"] != name for r in table))
    left = [r for r in table if r["kernel"] in wanted]
    for workload in workloads:
        if not left:
            break
        device.clear()
        try:
            given = workload.inputs(device.name)
            reached = _reached(workload.runner(given), chip, table, left)
        except Exception as error:
            yield f"by {workload.name}: {reason(error)}"
            continue
        for shipped in reached:
            left.remove(shipped)
            yield _tune_row(shipped, workload, given, device, table, candidates)
    yield from (f"{place(r)}: no workload launches it" for r in left)


def _tune_row(shipped: Row, workload: Workload, given: Given, device: Device, table: list[Row], candidates: int) -> Tuned | str:
    """The race for one row."""
    (model,) = (k for k in KERNELS if k.name == shipped["kernel"])
    at = shipped["target"], shipped["bits"], shipped["size"]
    guesses = [row_of(model, *at, guess) for guess in ranked(model, *at)[:candidates]]
    rows = {choice(row): row for row in (shipped, *guesses)}  # the shipped one first
    own = choice(shipped)
    contenders: dict[str, _Contender] = {}
    dropped: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        dropped[name] = f"{name}: {reason(error)}"
        contenders.pop(name, None)
        device.clear()

    truth: list[Tensor] = []
    for name, row in rows.items():
        try:
            contender, results = _prepare(workload, given, [row if r == shipped else r for r in table], row)
            truth = truth or results
            _check_same(results, truth, TOLERANCE[workload.bits])
            contenders[name] = contender
        except Exception as error:
            failed(name, error)
    launches = zip(contenders, _timed(list(contenders.values())), strict=True)
    runners = {name: Runner(Call(partial(_replay, timed)), ("step",)) for name, timed in launches}
    race(dict(runners), device, RACE_SECONDS, failed)
    if own in dropped:
        return f"{place(shipped)}: the row that ships, {dropped[own]} ({workload.name})"
    seconds = {name: summary(runners[name].times)["step"]["median"] for name in contenders}
    best = min(seconds, key=lambda name: seconds[name])
    chosen = best if seconds[best] < seconds[own] * (1 - GAIN) else own
    return Tuned(shipped, rows[chosen], seconds[own], seconds[chosen], workload.name, len(seconds), tuple(dropped.values()))


# A contender


@dataclass
class _Contender:
    """The launches of an operation with one row, which configuration among them is the row's, and the call that they belong to, by
    which memory lives that an optimiser's launches know by address only."""

    launches: list[Launch]
    config: Config
    call: Call


def _prepare(workload: Workload, given: Given, table: list[Row], row: Row) -> tuple[_Contender, list[Tensor]]:
    """A contender that is warm, and what the operation computes with it: outputs and gradients. Raises what compiling or running
    raises."""
    runner = workload.runner(given)
    torch.manual_seed(0)  # all get the same upstream gradients
    with configured_for(row["target"], table):
        outputs = runner.forward()
        gradients = runner.backward(outputs) if runner.differentiates else ()
        results = [x.detach().clone() for x in (*outputs, *gradients) if x is not None]
        outputs = runner.forward()
    launches, (config,) = _record(runner, row["target"], table, [row], outputs)
    _replay(launches)  # fills what kernels leave for each other
    return _Contender(launches, config, runner.call), results


def _reached(runner: Runner, chip: str, table: list[Row], rows: list[Row]) -> list[Row]:
    """Those of ``rows`` that the launches of an operation take."""
    launches, configs = _record(runner, chip, table, rows)
    taken = {id(one.config) for one in launches}
    return [row for row, config in zip(rows, configs, strict=True) if id(config) in taken]


def _record(
    runner: Runner, chip: str, table: list[Row], rows: list[Row], outputs: list[Tensor] | None = None
) -> tuple[list[Launch], list[Config]]:
    """The launches of all parts, and for each of ``rows`` the very object that launches which take it have as configuration.

    outputs: of a forward pass that ran, for the backward pass to start from; without them its numbers are anything.
    """
    with recording(chip, table) as launches:
        recorded = runner.forward()
        if runner.differentiates:
            runner.backward(outputs or recorded)
        configs = [configuration(r["kernel"], r["size"], torch.empty(0, dtype=DTYPES[r["bits"]])) for r in rows]
    return launches, configs


def _replay(launches: list[Launch]) -> tuple[()]:
    for one in launches:
        launch(one.name, one.kernel, one.grid, *one.args, config=one.config, **one.constants)
    return ()


def _timed(contenders: list[_Contender]) -> list[list[Launch]]:
    """Of each contender the launches that take its row, and those of other kernels whose work is not the same for all."""
    work: list[dict[str, list]] = [{} for _ in contenders]
    for contender, mine in zip(contenders, work, strict=True):
        for one in contender.launches:
            mine.setdefault(one.name, []).append((one.grid, [tuple(x.shape) if torch.is_tensor(x) else x for x in one.args]))
    own = {one.name for contender in contenders for one in contender.launches if one.config is contender.config}
    follow = {name for mine in work for name in mine if any(mine[name] != theirs.get(name) for theirs in work)} - own
    return [[one for one in c.launches if one.config is c.config or one.name in follow] for c in contenders]


def _check_same(results: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    """Raises Absent where a result is not what the shipped row computes: max|a - b| / max|b| over the tolerance."""
    for i, (got, want) in enumerate(zip(results, truth, strict=True)):
        if want.numel() and not torch.equal(got, want):
            error = ((got.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-30)).item()
            if not error <= tolerance:
                raise Absent(f"computes something else than the shipped row: output or gradient {i} differs by {error:.1g}")


# Rows of launch tables


def put_row(row: Row, folder: Path = TABLES) -> list[Path]:
    """Write a row in place of that with its kernel, target, bits and size; all others stay. Returns the files that changed."""
    alike = [r for r in read_rows(folder) if all(r[key] == row[key] for key in ("kernel", "target", "bits"))]
    return write_rows([row if r["size"] == row["size"] else r for r in alike], folder)
