"""``smalt kernels tune`` on the CPU: kernels run in the interpreter, and a made-up clock says how long a configuration takes."""

import dataclasses
import json
import shutil
from typing import NamedTuple

import pytest
import torch

from smalt.engine import cli
from smalt.kernels import backend
from smalt.kernels.launch import TABLES, observing
from smalt.kernels.rms_norm import rms_norm
from smalt.profiling.kernels import bench_cases, bench_time, tune, tune_workloads
from smalt.profiling.kernels.bench_cases import Operation, Shape
from smalt.profiling.kernels.bench_head import HEAD
from smalt.profiling.kernels.bench_rows import ADAMW, POLICY_LOSS, ROTARY
from smalt.profiling.kernels.bench_time import Gpu
from smalt.profiling.kernels.launch_model import KERNELS, Guess, ranked, row, sizes
from smalt.profiling.kernels.tune import Tuned
from smalt.profiling.kernels.tune_workloads import WORKLOADS, Workload

NOBODY = "no workload launches it"


class Clock:
    """A device on which a launch takes what ``cost`` says, by the name of its kernel and its configuration: a second if None.

    It observes all launches. One whose cost is an exception raises it; one of cost "wrong" takes no time, and doubles what follows of
    the operation.
    """

    name = "cpu"

    def __init__(self, cost):
        self.cost, self.now, self.wrong, self.log = cost, 0.0, False, []

    def __call__(self, name, config):
        cost = self.cost(name, config)
        if isinstance(cost, Exception):
            raise cost
        self.wrong |= cost == "wrong"
        self.now += {None: 1.0, "wrong": 0.0}.get(cost, cost)
        self.log.append(name)

    def fill(self, seconds):
        self.log.append("fill")

    def mark(self):
        return self.now

    def seconds(self, first, second):
        return second - first

    def wait(self):
        pass

    def clear(self):
        pass


class Doubled(torch.autograd.Function):
    """x and its gradient, each doubled where the clock says that the last launch went wrong."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x * 2 if clock.wrong else x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 2 if ctx.clock.wrong else dy, None


def norm(clock):
    """A norm of 8 rows of 24, at 16 bits."""

    def run(x, weight):
        clock.wrong = False
        return Doubled.apply(rms_norm(Doubled.apply(x, clock), weight, 1e-6), clock)

    def inputs(shape, device):
        return {"args": (bench_cases.leaf(8, 24, device=device), bench_cases.leaf(24, device=device))}

    operation = Operation("norm", "copy", (), inputs, lambda given: {}, (bench_cases.smalt(run),))
    return Workload(operation, Shape("8 x 24"), 16)


def tuned(monkeypatch, kernel, tiles, cost, **options):
    """What becomes of a kernel whose guesses have these tiles (of the interpreter's), each with 4 warps, and the clock."""
    monkeypatch.setattr(tune, "ranked", lambda *place: [Guess(one, 4, 1, 0.0) for one in tiles])
    monkeypatch.setattr(tune, "RACE_SECONDS", 0.0)
    monkeypatch.setattr(bench_time, "FEWEST", 2)
    clock = Clock(cost)
    with backend("triton"), observing(clock):
        return [*tune.tune(clock, kernel, workloads=[norm(clock)], **options)], clock


def by_block(kernel, costs):
    """The cost of a launch of the kernel by its BLOCK_T."""
    return lambda name, config: costs[config.tiles["BLOCK_T"]] if name == kernel else None


SHIPPED = {"ROWS": 8, "BLOCK_T": 4}
ONE, TWO, EIGHT = ({**SHIPPED, "BLOCK_T": n} for n in (1, 2, 8))


# The race


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rms_norm_forward", "rms_norm_backward"])
def test_the_fastest_wins(monkeypatch, kernel):
    (found, unreached), _ = tuned(monkeypatch, kernel, [ONE, SHIPPED, TWO], by_block(kernel, {4: 1.0, 1: 0.9, 2: 0.8}))
    assert found.shipped["tiles"] == SHIPPED
    assert found.chosen == {**found.shipped, "tiles": TWO}
    assert (found.shipped["kernel"], found.shipped["target"], found.shipped["bits"]) == (kernel, "interpreter", 16)
    assert (found.shipped_seconds, found.seconds) == pytest.approx((1.0, 0.8))
    assert (found.timed, found.dropped) == (3, ())
    assert found.line() == (
        f"{kernel} on interpreter, 16 bits, size 128: ROWS=8 BLOCK_T=4, 4 warps, 1 stages, 1000000.0 us -> "
        "ROWS=8 BLOCK_T=2, 4 warps, 1 stages, 800000.0 us, x 1.25 (norm, 8 x 24, 16 bits)"
    )
    assert unreached == f"{kernel} on interpreter, 32 bits, size 128: {NOBODY}"


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "wins"), [(0.981, False), (0.979, True)])
def test_noise_does_not_replace_what_ships(monkeypatch, seconds, wins):
    (found, _), _ = tuned(monkeypatch, "rms_norm_forward", [ONE], by_block("rms_norm_forward", {4: 1.0, 1: seconds}))
    assert (found.chosen["tiles"] == ONE) is wins
    assert found.seconds == pytest.approx(seconds if wins else 1.0)
    assert ("1000000.0 us, stays: of 2 none is over 2% faster" in found.line()) is not wins


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "result"), [("rms_norm_forward", 0), ("rms_norm_backward", 1)])
def test_what_fails_or_computes_something_else_is_dropped(monkeypatch, kernel, result):
    cost = by_block(kernel, {4: 1.0, 1: RuntimeError("out of resource: shared memory"), 2: "wrong", 8: 0.5})
    (found, _), _ = tuned(monkeypatch, kernel, [ONE, TWO, EIGHT], cost)
    assert found.chosen["tiles"] == EIGHT
    assert found.timed == 2
    assert found.dropped == (
        "ROWS=8 BLOCK_T=1, 4 warps, 1 stages: failed: RuntimeError: out of resource: shared memory",
        f"ROWS=8 BLOCK_T=2, 4 warps, 1 stages: computes something else than the shipped row: output or gradient {result} differs by 1",
    )


def test_what_fails_in_the_race_is_dropped(monkeypatch):
    launches = iter(range(100))

    def cost(name, config):
        late = name == "rms_norm_forward" and config.tiles == ONE and next(launches) == 3
        return RuntimeError("misaligned address") if late else None

    (found, _), _ = tuned(monkeypatch, "rms_norm_forward", [ONE], cost)
    assert found.chosen == found.shipped
    assert found.dropped == ("ROWS=8 BLOCK_T=1, 4 warps, 1 stages: failed: RuntimeError: misaligned address",)


def test_a_shipped_row_that_fails_is_said(monkeypatch):
    found, _ = tuned(monkeypatch, "rms_norm_forward", [ONE], by_block("rms_norm_forward", {4: RuntimeError("broken"), 1: 1.0}))
    where = "rms_norm_forward on interpreter, 16 bits, size 128: the row that ships, ROWS=8 BLOCK_T=4, 4 warps, 1 stages"
    assert found[0] == f"{where}: failed: RuntimeError: broken (norm, 8 x 24, 16 bits)"


def test_rounding_is_not_something_else():
    want = [torch.tensor([4.0, 1.0]), torch.tensor([1e-3])]
    tune._check_same([want[0] + 2.0**-5, want[1]], want, 2.0**-6)
    for wrong in ([want[0] + 2.0**-3, want[1]], [want[0], torch.zeros(1)], [want[0] * torch.nan, want[1]]):
        with pytest.raises(bench_cases.Absent, match="output or gradient"):
            tune._check_same(wrong, want, 2.0**-6)


def test_only_as_many_guesses_as_asked_for(monkeypatch):
    cost = by_block("rms_norm_forward", {4: 1.0, 1: 1.0, 2: 0.5})
    (found, _), _ = tuned(monkeypatch, "rms_norm_forward", [ONE, TWO], cost, candidates=1)
    assert (found.chosen, found.timed) == (found.shipped, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "tiles", "timed"),
    [
        ("rms_norm_forward", ONE, ["rms_norm_forward"]),
        ("rms_norm_backward", ONE, ["rms_norm_backward"]),
        ("rms_norm_backward", {**SHIPPED, "ROWS": 4}, ["rms_norm_backward", "column_sum"]),  # more partial sums
        ("column_sum", {"BLOCK_P": 2, "BLOCK_D": 32}, ["column_sum"]),
    ],
)
def test_timed_are_the_kernel_and_what_its_tiles_give_others_to_do(monkeypatch, kernel, tiles, timed):
    _, clock = tuned(monkeypatch, kernel, [tiles], lambda name, config: None)
    race = clock.log[clock.log.index("fill") :]
    assert race == ["fill", *timed] * (race.count("fill"))
    assert race.count("fill") == 2 * 2


def prepared(workload, kernel):
    """A contender of the interpreter's first row of a kernel, and what its workload computes."""
    table = [r for r in tune.read_rows() if r["target"] == "interpreter"]
    with backend("triton"):
        return tune._prepare(workload, workload.inputs("cpu"), table, next(r for r in table if r["kernel"] == kernel))


def test_launches_find_what_earlier_ones_leave():
    contender, (_, dx, dweight) = prepared(norm(Clock(None)), "column_sum")
    assert [one.name for one in contender.launches] == ["rms_norm_forward", "rms_norm_backward", "column_sum"]
    _, backward, total = contender.launches
    assert any(torch.is_tensor(x) and x.dtype == dx.dtype and torch.equal(x, dx) for x in backward.args)
    assert torch.equal(total.args[1], dweight)
    assert contender.config is total.config


def test_launches_find_what_torch_computes_between_them():
    workload = Workload(HEAD, Shape("", {"T": 8, "V": 24, "D": 16}), 32)
    contender, _ = prepared(workload, "linear_statistics_backward")
    (backward,) = (one for one in contender.launches if one.name == "linear_statistics_backward")
    hidden, weight, _, rows = backward.args[:4]
    assert torch.allclose(rows[0], (hidden @ weight.T).logsumexp(-1))


def test_an_optimiser_starts_anew_for_each():
    first, second = (prepared(Workload(ADAMW, Shape("", {"parameters": [(5, 7)], "dtype": None}), 16), "adamw")[1] for _ in range(2))
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], second[0])


def test_inputs_are_of_the_bits_of_their_workload_but_for_what_is_always_fp32():
    heads = {"T": 2, "H": 2, "K": 1, "D": 4}
    for operation, shape, dtypes in ((ROTARY, heads, [0, 0, 1, 1]), (POLICY_LOSS, {"T": 3}, [0, 0, 0, 0, 2, 0])):
        for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
            args = Workload(operation, Shape("", shape), bits).inputs("cpu")["args"]
            assert [x.dtype for x in args] == [(dtype, torch.float32, torch.int32)[n] for n in dtypes]
            assert args[0].is_leaf
            assert args[0].requires_grad


# What is tuned


SMALL = {"T": 16, "V": 64, "E": 32, "N": 64, "B": 1, "L": 32, "lengths": [16], "parameters": [(4, 4)]}


def test_workloads_reach_every_row_of_a_chip(monkeypatch):
    """Head dims and widths, and little else, decide which. The rows are the model's, of all kernels that it knows."""
    rows = [
        row(kernel, "sm_90", bits, size, ranked(kernel, "sm_90", bits, size)[0])
        for kernel in KERNELS
        for bits in kernel.bits
        for size in sizes(kernel, bits)
    ]
    small = [
        dataclasses.replace(w, shape=Shape(w.shape.name, {k: SMALL.get(k, v) for k, v in w.shape.sizes.items()})) for w in WORKLOADS
    ]
    monkeypatch.setattr(tune, "read_rows", lambda: rows)
    monkeypatch.setattr(tune, "target", lambda x: "sm_90")
    monkeypatch.setattr(tune, "_tune_row", lambda shipped, workload, *_: Reached(shipped, workload))
    with backend("triton"):
        found = [*tune.tune(Clock(None), workloads=small)]
    assert [one for one in found if not isinstance(one, Reached)] == []
    assert len(found) == len(rows)
    by_place = {(one.row["kernel"], one.row["bits"], one.row["size"]): one.workload for one in found}
    # Sums of partial results are fp32 whatever the workload.
    assert all(w.bits == bits for (name, bits, _), w in by_place.items() if name not in ("column_sum", "policy_loss_sums"))
    # The model's own widths, where several share a row.
    assert by_place["rms_norm_forward", 16, 4096].shape.name == "width 2560"
    assert by_place["layer_norm_backward", 16, 2048].shape.name == "width 1152"
    assert by_place["attention_dq", 16, 80].shape.name == "16 tiles, 16 heads of 72"
    assert by_place["attention_dq", 32, 128].shape.name == "documents, 8k, 20 / 4 heads of 128"


class Reached(NamedTuple):
    row: dict
    workload: Workload


def test_rows_that_nothing_launches_are_named():
    found = [*tune.tune(Clock(None), "column_sum", workloads=[])]
    assert found == [f"column_sum on interpreter, 32 bits, size 128: {NOBODY}"]


def test_a_kernel_without_rows_and_a_workload_that_fails_are_named(monkeypatch):
    monkeypatch.setattr(tune, "read_rows", lambda: json.loads((TABLES / "rms_norm.json").read_text()))
    monkeypatch.setattr(tune_workloads.Workload, "inputs", lambda self, device: 1 / 0)
    found = [*tune.tune(Clock(None), workloads=[norm(None)])]
    assert "adamw on interpreter: the launch table has no row of it" in found
    assert "by norm, 8 x 24, 16 bits: failed: ZeroDivisionError: division by zero" in found
    assert f"rms_norm_forward on interpreter, 16 bits, size 128: {NOBODY}" in found


def test_wrong_arguments():
    with pytest.raises(ValueError, match="unknown kernel 'adam'; choose among rms_norm_forward, "):
        next(tune.tune(Clock(None), "adam"))
    with pytest.raises(ValueError, match="0 candidates; expected 1 or more"):
        next(tune.tune(Clock(None), candidates=0))


# The command


def as_on_a_gpu(monkeypatch, outcomes):
    calls = []
    monkeypatch.setattr(tune, "no_gpu", lambda: "")
    monkeypatch.setattr(tune, "Gpu", lambda: "gpu")
    monkeypatch.setattr(tune, "tune", lambda *given: calls.append(given) or iter(outcomes))
    return calls


@pytest.mark.slow
def test_what_is_better_is_written_and_other_rows_stay(monkeypatch, tmp_path):
    folder = tmp_path / "tables"
    shutil.copytree(TABLES, folder)
    before = tune.read_rows(folder)
    row, other = [r for r in before if r["kernel"] == "rms_norm_forward" and r["target"] == "sm_90" and r["bits"] == 16][1:3]
    better = {**row, "num_warps": 2 * row["num_warps"]}
    outcomes = [Tuned(row, better, 2e-5, 1e-5, "w", 9, ("x: failed",)), "y: why", Tuned(other, other, 1e-5, 1e-5, "w", 9)]
    calls = as_on_a_gpu(monkeypatch, outcomes)
    said = []
    tune.tune_kernels("rms_norm_forward", 5, False, folder, said.append)
    assert calls == [("gpu", "rms_norm_forward", 5)]
    assert tune.read_rows(folder) == before
    assert said == [outcomes[0].line(), "  dropped  x: failed", "not tuned  y: why", outcomes[2].line()]
    tune.tune_kernels(None, 8, True, folder, said.append)
    assert [r for r in before if r not in tune.read_rows(folder)] == [row]
    assert tune.read_rows(folder) == [better if r == row else r for r in before]
    assert f"  written  {folder / 'rms_norm.json'}" in said


def test_the_command(monkeypatch, capsys):
    calls = as_on_a_gpu(monkeypatch, ["a: b"])
    cli.app.cli(args=["kernels", "tune", "--kernel", "adamw", "--candidates", "3"])
    assert calls == [("gpu", "adamw", 3)]
    assert capsys.readouterr().out == "not tuned  a: b\n"


def test_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["smalt", "kernels", "tune"])
    assert cli.main() == 1
    told = capsys.readouterr().err
    assert "error: timing kernels needs a GPU, and torch" in told
    assert "run this on the GPU that is to be tuned. `smalt kernels configure` needs none" in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    found = [*tune.tune(Gpu(), "column_sum", candidates=2)]
    assert [type(one) for one in found] == [Tuned]
    assert 0 < found[0].seconds <= found[0].shipped_seconds
