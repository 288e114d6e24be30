"""``smalt bench kernels`` up to the launch: what it measures, against whom, how it counts, and what it writes.

Figures here are the tests' own, written to tmp_path; devices are made up, or the CPU.
"""

import dataclasses
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from smalt.model.config import PRESETS
from smalt.profiling import bench as command
from smalt.profiling.kernels import (
    bench,
    bench_attention,
    bench_cases,
    bench_head,
    bench_results,
)
from smalt.profiling.kernels.bench_cases import Absent, Call, Contestant, Operation, Shape
from smalt.profiling.kernels.bench_machine import Machine
from smalt.profiling.kernels.bench_results import BEGIN, read_results
from smalt.profiling.kernels.bench_time import Runner, race, roofline, summary, warm_up

BY_NAME = {operation.name: operation for operation in bench.OPERATIONS}


class Clock:
    """A device whose time is what calls say that they take; it logs what is asked of it."""

    name = "cpu"

    def __init__(self):
        self.now, self.log, self.bytes = 0.0, [], 100

    def fill(self, seconds):
        self.now += 5.0
        self.log.append("fill")

    def mark(self):
        self.log.append("mark")
        return self.now

    def seconds(self, first, second):
        return second - first

    def wait(self):
        pass

    def start_peak(self):
        return self.bytes

    def peak(self):
        return self.bytes + 1000

    def clear(self):
        self.log.append("clear")


class Cpu(Clock):
    """The CPU and its clock."""

    def fill(self, seconds):
        pass

    def mark(self):
        return time.perf_counter()


MACHINE = Machine("Test GPU 1", "no such one")


# What is measured


def test_shapes_are_those_of_the_model():
    language, vision = PRESETS["bluelm_3b"].language, PRESETS["bluelm_3b"].vision
    mine = bench_cases
    assert (mine.WIDTH, mine.FFN, mine.VOCABULARY) == (language.width, language.ffn, language.vocabulary)
    assert (mine.NUM_HEADS, mine.NUM_KV_HEADS, mine.HEAD_DIM) == (language.num_heads, language.num_kv_heads, language.head_dim)
    assert (mine.VISION_WIDTH, mine.VISION_FFN, mine.VISION_HEADS) == (vision.width, vision.ffn, vision.num_heads)
    assert (mine.PATCHES, mine.TILE_TOKENS) == (vision.grid**2, vision.tokens_per_tile)
    assert {256 * 32, 1024 * 32} == set(mine.PACKS.values())


@pytest.mark.slow
@pytest.mark.parametrize("operation", bench.OPERATIONS, ids=lambda o: o.name)
def test_every_shape_has_inputs_and_work(operation):
    assert operation.contestants[0].name == "smalt"
    assert operation.roofline in bench_results.UNITS
    assert len({s.name for s in operation.shapes}) == len(operation.shapes)
    for shape in operation.shapes:
        work = operation.work(operation.inputs(shape, "meta"))
        assert set(work) == set(operation.parts)
        assert all(w > 0 for w in work.values())
        assert "both" not in work or work["both"] == work["forward"] + work["backward"]


def work_of(name, shape):
    return BY_NAME[name].work(BY_NAME[name].inputs(shape, "meta"))


@pytest.mark.slow
def test_work_of_products():
    T, H, D = 16_384, 20, 128
    attention = BY_NAME["attention"].shapes
    assert work_of("attention", attention[0])["forward"] == 4 * H * D * T * (T + 1) // 2
    assert work_of("attention", attention[0])["backward"] == 10 * H * D * T * (T + 1) // 2
    assert work_of("attention", attention[1])["forward"] == 4 * 16 * 72 * 16 * 729**2
    assert work_of("linear_cross_entropy", BY_NAME["linear_cross_entropy"].shapes[0])["both"] == 6 * 8192 * 100_096 * 2560
    assert work_of("matmul", BY_NAME["matmul"].shapes[0])["both"] == 6 * 8192 * 2560 * 16_384


@pytest.mark.slow
def test_work_of_rows():
    x, w = 8192 * 2560 * 2, 2560 * 2
    assert work_of("rms_norm", BY_NAME["rms_norm"].shapes[0]) == {
        "forward": 2 * x + w,
        "backward": 3 * x + 2 * w,
        "both": 5 * x + 3 * w,
    }
    assert work_of("rms_norm with residual", BY_NAME["rms_norm"].shapes[0])["both"] == 8 * x + 3 * w
    f = 8192 * 8192 * 2
    assert work_of("swiglu", BY_NAME["swiglu"].shapes[0]) == {"forward": 3 * f, "backward": 5 * f, "both": 8 * f}
    heads, table = 8192 * 24 * 128 * 2, 2 * 8192 * 64 * 4
    assert work_of("rotary", BY_NAME["rotary"].shapes[0])["forward"] == 2 * heads + table
    numel = 100_096 * 2560 + 2 * (2 * 2560 + 2560 * (2560 + 1024) + 2560 * 2560 + 3 * 2560 * 8192)
    assert work_of("adamw", BY_NAME["adamw"].shapes[0]) == {"step": numel * 28}  # 7 numbers of 4 bytes


def test_documents_fill_the_pack_and_are_mixed():
    lengths = bench_cases.document_lengths(32_768)
    assert sum(lengths) == 32_768
    assert len(set(lengths)) > 10
    assert lengths == bench_cases.document_lengths(32_768)


def test_bounds():
    b = bench_cases.bounds([2, 4], image=3)
    assert (b.start, b.end) == ([0, 0, 2, 2, 2, 2], [1, 2, 5, 5, 5, 6])
    assert b.pairs == 1 + 2 + 3 + 3 + 3 + 4
    assert bench_cases.bounds([2, 1], causal=False).end == [2, 2, 3]


def test_first_shapes_come_first_and_names_are_checked():
    order = [(o.name, s.name) for o, s in bench.chosen((), False)]
    assert len(order) == sum(len(o.shapes) for o in bench.OPERATIONS)
    assert [name for name, _ in order[: len(bench.OPERATIONS)]] == [o.name for o in bench.OPERATIONS]
    assert [(o.name, s.name) for o, s in bench.chosen(["gelu"], True)] == [("gelu", BY_NAME["gelu"].shapes[0].name)]
    with pytest.raises(ValueError, match="unknown operation 'gelo'; choose among adamw, attention"):
        bench.chosen(["gelo"], False)


# The contestants


SMALL = {
    "T": 40, "D": 48, "V": 96, "E": 32, "N": 24, "B": 3, "L": 16, "H": 4, "K": 2, "parameters": [(5, 3), (7,)],
    "lengths": [24, 9, 7], "image": 5,
}  # fmt: skip


def small(operation, shape):
    """The shape with sizes that a CPU takes in no time; what is equal or zero stays so."""
    changes = {k: v for k, v in SMALL.items() if shape.sizes.get(k)}
    if operation.name == "attention" and len(set(shape["lengths"])) == 1:
        changes["lengths"] = [11] * min(2, len(shape["lengths"]))
    if shape.sizes.get("H", 0) == shape.sizes.get("K"):
        changes["H"] = changes["K"]
    if operation.name == "matmul":
        changes["K"] = 32
    return Shape(shape.name, {**shape.sizes, **changes})


EXCUSES = ("nothing to fuse", "product that eager calls", "does not support backward on CPU")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile compiles nothing, and what needs a GPU is not installed."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    find = bench_cases.importlib.util.find_spec
    away = ("liger_kernel", "flash_attn", "apex")
    monkeypatch.setattr(bench_cases.importlib.util, "find_spec", lambda name: None if name in away else find(name))


@pytest.mark.slow
@pytest.mark.parametrize("operation", bench.OPERATIONS, ids=lambda o: o.name)
def test_contestants_compute_what_smalt_computes(operation, uncompiled):
    for shape in {s.name.split(",")[0]: s for s in operation.shapes}.values():
        rows = bench.measure(operation, small(operation, shape), Cpu(), MACHINE, 0.0)
        assert [row["contestant"] for row in rows] == [c.name for c in operation.contestants]
        for row in rows:
            measured = row["absent"] is None
            if (
                row["contestant"] in ("smalt", "torch eager", "torch.compile", "FlexAttention", "torch fused")
                or "chunks" in row["contestant"]
            ):
                assert measured or any(told in row["absent"] for told in EXCUSES), row
            if row["contestant"] in ("Liger", "flash-attn", "apex"):
                assert not measured
                assert "failed" not in row["absent"]
            assert set(row["times"]) == (set(operation.parts) if measured else set())
            json.dumps(row)


def test_a_baseline_that_computes_something_else_is_absent(uncompiled):
    wrong = Operation(
        "wrong", "copy", (Shape("one"),), lambda s, d: {"args": (torch.ones(3, requires_grad=True),)},
        lambda given: dict.fromkeys(("forward", "backward", "both"), 12.0),
        (bench_cases.smalt(lambda x: 2 * x), bench_cases.eager(lambda x: 2.1 * x), bench_cases.compiled(lambda x: x[:2])),
    )  # fmt: skip
    rows = bench.measure(wrong, wrong.shapes[0], Cpu(), MACHINE, 0.0)
    assert rows[0]["absent"] is None
    assert rows[1]["absent"] == "computes something else: output 0 differs by 0.05, relative RMS"


def test_absent_libraries_say_why(monkeypatch, tmp_path):
    given = {"args": (torch.ones(2, 3, requires_grad=True),)}
    specs = {}
    monkeypatch.setattr(bench_cases.importlib.util, "find_spec", lambda name: specs.get(name))
    for contestant in (bench_cases.liger(lambda ops, x: x), bench_cases.apex(lambda m, x: x, "apex.optimizers", "amp_C")):
        with pytest.raises(Absent, match=r"^not installed$"):
            contestant.prepare(given)
    specs["apex"] = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with pytest.raises(Absent, match="another project than NVIDIA's"):
        bench_cases.require_apex("apex.optimizers", "amp_C")
    (tmp_path / "normalization").mkdir()
    with pytest.raises(Absent, match="without its CUDA extension amp_C"):
        bench_cases.require_apex("apex.optimizers", "amp_C")


def attention_given(index):
    operation = BY_NAME["attention"]
    return operation.inputs(small(operation, operation.shapes[index]), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("operation", [o for o in bench.OPERATIONS if "backward" in o.parts], ids=lambda o: o.name)
def test_what_is_compiled_compiles_without_a_break(operation, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: whole(f, backend="aot_eager", **given))
    shape = small(operation, operation.shapes[0])
    for contestant in operation.contestants:
        if contestant.name.startswith("torch.compile"):
            torch.compiler.reset()
            try:
                runner = Runner(contestant.prepare(operation.inputs(shape, "cpu")), operation.parts)
            except Absent:
                continue
            runner.backward(runner.forward())


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BY_NAME["attention"].shapes)))
def test_flex_attention_sees_the_same_keys(index):
    given = attention_given(index)
    given["args"] = tuple(x.detach() for x in given["args"])  # it has no backward pass on a CPU
    with torch.no_grad():
        want, got = (prepare(given).run() for prepare in (bench_attention._smalt, bench_attention._flex))
    bench.check_agreement([got], [want])


def test_varlen_is_called_as_this_torch_wants_it(monkeypatch):
    def with_groups(q, k, v, at_q, at_k, most_q, most_k, *, window_size=(-1, -1), enable_gqa=False):
        return (at_q.tolist(), most_q, window_size, enable_gqa, k.shape[1])

    def without(q, k, v, at_q, at_k, most_q, most_k, is_causal=False):
        return is_causal, k.shape[1], k.is_leaf

    monkeypatch.setattr(bench_attention, "varlen_function", lambda: with_groups)
    got = bench_attention._varlen(attention_given(2))
    assert got.run() == ([0, 24, 33, 40], 24, (-1, 0), True, 2)
    assert bench_attention._varlen(attention_given(1)).run() == ([0, 11, 22], 11, (-1, -1), False, 2)
    monkeypatch.setattr(bench_attention, "varlen_function", lambda: without)
    got = bench_attention._varlen(attention_given(2))
    assert got.run() == (True, 4, True)
    assert "keys expanded to all heads outside the timing" in got.note
    with pytest.raises(Absent, match="images"):
        bench_attention._varlen(attention_given(4))


def test_a_torch_without_linear_cross_entropy_has_none(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(Absent, match=r"^torch .* has none$"):
        bench_head._torch_chunked({"args": ()})


@pytest.mark.slow
def test_chunks_take_the_memory_of_smalts_buffers():
    hidden, weight = (torch.empty(n, 2560, dtype=torch.bfloat16, device="meta") for n in (8192, 100_096))
    rows = bench_head.chunk_rows(hidden, weight)
    words = bench_head.chunk_of_words(100_096, 2, 256)
    smalt = 8192 * words * 2 + 8192 * 2560 * 4
    assert rows % 64 == 0
    assert smalt <= 2 * rows * 100_096 * 2 < smalt * 1.3


def test_reasons():
    assert bench.reason(Absent("has none")) == "has none"
    assert bench.reason(torch.OutOfMemoryError("x")) == "out of memory"
    assert bench.reason(ImportError("no name f\nmore")) == "this version has none: no name f"
    assert bench.reason(RuntimeError("bad | thing")) == "failed: RuntimeError: bad | thing"


# Timing


def ticking(clock, log, name, forward, backward):
    """A runner whose forward and backward pass take so long on a clock."""

    class Tick(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.now += forward
            clock.log.append(f"{name} forward")
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            clock.now += backward
            clock.log.append(f"{name} backward")
            return dy * 2

    x = torch.ones(3, requires_grad=True)
    restore = lambda: clock.log.append(f"{name} restore")  # noqa: E731
    return Runner(Call(lambda: Tick.apply(x), (x,), restore), ("forward", "backward", "both"))


def test_a_part_is_timed_behind_a_backlog_and_inputs_are_put_back():
    clock = Clock()
    race({"a": (runner := ticking(clock, clock.log, "a", 2.0, 3.0))}, clock, 0.0, pytest.fail)
    assert summary(runner.times) == {
        part: {"p20": t, "median": t, "p80": t, "runs": 7} for part, t in (("forward", 2.0), ("backward", 3.0), ("both", 5.0))
    }
    parts = ["fill", "mark", "a forward", "mark", "fill", "mark", "a backward", "mark", "a restore"]
    both = ["fill", "mark", "a forward", "a backward", "mark", "a restore"]
    assert clock.log == 7 * (parts + both)


def test_contestants_take_turns_and_a_failing_one_leaves():
    clock, failed = Clock(), []
    runners = {name: ticking(clock, clock.log, name, 1.0, 1.0) for name in "abc"}
    count = iter(range(9))
    whole = runners["b"].call.run
    runners["b"].call.run = lambda: whole() if next(count) < 2 else 1 / 0
    race(dict(runners), clock, 0.0, lambda name, error: failed.append((name, type(error))))
    order = [entry[0] for entry in clock.log if entry.endswith("restore")][::2]
    assert "".join(order[:7]) == "abc" + "ca" + "ac"
    assert failed == [("b", ZeroDivisionError)]
    assert len(runners["a"].times["both"]) == len(runners["c"].times["both"]) == 7


def test_memory_is_counted_from_the_inputs_on():
    x = torch.ones(3, requires_grad=True)
    runner = Runner(Call(lambda: x * 2, (x,)), ("forward", "backward", "both"))
    outputs, memory = warm_up(runner, Clock())
    assert torch.equal(outputs[0], torch.full((3,), 2.0))
    assert memory == {"peak": 1000, "workspace": 1000 - 2 * 12}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "run_tests", lambda: ("not run", []))
    assert command.bench_kernels(tmp_path, only=["gelu"], quick=True) == 0
    (result,) = read_results(tmp_path)
    for row in result["rows"]:
        if row["absent"] is None:
            assert all(0 < t["p20"] <= t["median"] <= t["p80"] for t in row["times"].values())
            assert bench_results.percent(row, "both", result["roofline"]) < 110


def test_percentiles():
    assert summary({"forward": [float(x) for x in range(11)]}) == {"forward": {"p20": 2.0, "median": 5.0, "p80": 8.0, "runs": 11}}


def test_roofline_counts_bytes_both_ways():
    class Seconds(Clock):
        def seconds(self, first, second):
            return 2.0

    found = roofline(Seconds(), copy_bytes=1000, size=10, budget=0.0)
    assert found == {"copy": 1000.0, "matmul": 1000.0}


# The command


def test_it_needs_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["kernels", "--out", str(tmp_path)]) == 1
    assert "error: timing kernels needs a GPU, and torch" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_red_blocks_the_numbers(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(command, "no_gpu", lambda: "")
    monkeypatch.setattr(command, "run_gate", lambda *_: ["rms_norm: output 0: RMS error 1"])
    monkeypatch.setattr(command, "run_tests", pytest.fail)
    monkeypatch.setattr(command, "measure_all", pytest.fail)
    assert command.bench_kernels(tmp_path / "out", write=True, docs=tmp_path / "k.md", say=said.append) == 1
    assert any("nothing was measured" in line for line in said)
    assert "  rms_norm: output 0: RMS error 1" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(command, "run_gate", lambda *_: [])
    monkeypatch.setattr(command, "run_tests", lambda: ("red", ["pytest: FAILED x"]))
    assert command.bench_kernels(tmp_path / "out", say=said.append) == 1
    assert "  pytest: FAILED x" in said


def test_from_the_measurement_to_the_page(monkeypatch, tmp_path, uncompiled):
    """All of the command, on the CPU, with one small operation."""
    gelu = dataclasses.replace(BY_NAME["gelu"], shapes=(Shape("tiny", {"T": 8, "D": 8}),))
    broken = dataclasses.replace(gelu, name="broken", contestants=(Contestant("smalt", lambda given: 1 / 0),))
    monkeypatch.setattr(bench, "OPERATIONS", (gelu,))
    monkeypatch.setattr(bench, "roofline", lambda device: {"copy": 1e9, "matmul": 1e12})
    monkeypatch.setattr(command, "no_gpu", lambda: "")
    monkeypatch.setattr(command, "check", lambda say: ({"checks": 1, "pytest": "not run"}, []))
    monkeypatch.setattr(command, "Gpu", Cpu)
    monkeypatch.setattr(command.Machine, "current", lambda: MACHINE)
    said, page = [], tmp_path / "kernels.md"
    page.write_text("# Kernels\n")
    assert command.bench_kernels(tmp_path / "out", write=True, docs=page, say=said.append) == 0
    (result,) = read_results(tmp_path / "out")
    assert result["whole"]
    assert {row["contestant"]: row["absent"] for row in result["rows"]} == {
        "smalt": None, "torch eager": None, "torch.compile": None, "Liger": "has no such kernel",
    }  # fmt: skip
    assert result["rows"][0]["memory"] == {"peak": 1000, "workspace": 1000 - 2 * 8 * 8 * 2}
    assert result["versions"]["torch"] == torch.__version__
    text = page.read_text()
    assert text.startswith(f"# Kernels\n\n{BEGIN}")
    assert "**gelu**, tiny" in text
    assert command.bench_kernels(tmp_path / "out", measure=False, write=True, docs=page, say=said.append) == 0
    assert page.read_text() == text

    monkeypatch.setattr(bench, "OPERATIONS", (gelu, broken))
    assert command.bench_kernels(tmp_path / "late", seconds=-1.0, say=said.append) == 0
    (late,) = read_results(tmp_path / "late")
    assert not late["whole"]
    assert late["left"] == [["gelu", "tiny"], ["broken", "tiny"]]
    assert command.bench_kernels(tmp_path / "broken", only=["broken"], say=said.append) == 1
    assert "error: Smalt was not measured: broken, tiny: failed: ZeroDivisionError: division by zero" in said


@pytest.mark.slow
def test_runs_with_torch_triton_and_numpy_alone(tmp_path):
    code = """
import importlib.metadata, sys
torchs = {"torch", "triton", "numpy", "smalt", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"}
torchs |= {"setuptools", "typing-extensions", "typing_extensions"}
for module, distributions in importlib.metadata.packages_distributions().items():
    if not torchs & {name.lower() for name in distributions}:
        sys.modules[module] = None
from smalt.profiling.bench import main
print(main(["kernels", "--no-measure", "--out", sys.argv[1]]))
print(main(["kernels", "--out", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| attention | one causal document of 16k, 20 / 4 heads of 128 | not measured |" in done.stdout
    if not torch.cuda.is_available():
        assert done.stdout.endswith("sees none\n1\n")


def test_the_smalt_command_is_the_same(monkeypatch, tmp_path):
    from smalt.engine import cli

    calls = []
    monkeypatch.setattr(command, "bench_kernels", lambda *args: calls.append(args) or 3)
    with pytest.raises(SystemExit) as end:
        cli.app.cli(args=["bench", "kernels", "--out", str(tmp_path), "--only", "gelu", "--only", "adamw", "--quick", "--no-measure"])
    assert end.value.code == 3
    assert calls == [(Path(tmp_path), ("gelu", "adamw"), True, False, False, bench.SECONDS)]
