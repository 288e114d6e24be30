"""``smalt kernels check`` on real binaries: kernels of known content, compiled here, and the command from end to end."""

import json
import os
import subprocess
import sys

import pytest

from smalt.kernels.launch import recording
from smalt.profiling.kernels import check as module
from smalt.profiling.kernels.cases import CASES, DTYPES
from smalt.profiling.kernels.check import Outcome, check, compare, run_tasks, write_table
from smalt.profiling.kernels.chips import CHIPS
from smalt.profiling.kernels.loops import count, innermost_loops, parse_sass
from smalt.profiling.kernels.others import OTHERS
from smalt.profiling.kernels.report import print_outcome, write_docs
from smalt.profiling.kernels.worker import launch_rows as launch_rows_of_the_house

pytest.importorskip("triton")

KERNELS = """
import torch, triton
import triton.language as tl
from smalt.kernels.launch import Config, Launch

@triton.jit
def product(a, b, c, K, sa, sb, sc, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, K, D):
        acc = tl.dot(tl.load(a + m[:, None] * sa + (k + d)[None, :]), tl.load(b + (k + d)[:, None] * sb + n[None, :]), acc)
    tl.store(c + m[:, None] * sc + n[None, :], acc)

@triton.jit
def powers(x, y, n, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n):
        z = tl.load(x + k * BLOCK + i)
        total += tl.where(i + k < n, z, 1.5) if MASK else tl.exp2(z)
    tl.store(y + i, total)

@triton.jit
def crowded(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(x + BLOCK + i)
    for _ in range(n):
        a, b = a * b + 1, b * a - 2
    tl.store(y + i, a)
    tl.store(y + BLOCK + i, b)

@triton.jit(do_not_specialize=["free"])
def arguments(x, y, none, one, even, odd, big, free, number, flag, pair, C: tl.constexpr = 3):
    tl.store(x, tl.load(y) + even)

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

def launches(target):
    def of(kernel, args, stages=1, warps=4, **constants):
        return Launch(kernel, (1,), args, constants, Config({}, warps, stages), kernel.__name__, target)

    h = meta(4096, 4096, dtype=torch.bfloat16)
    x = meta(1 << 20)
    yield "product", of(product, (h, h, meta(4096, 4096), 4096, 4096, 4096, 4096), 2 if target == "gfx942" else 3, M=128, N=128, D=64)
    yield "powers", of(powers, (x, x, 4096), BLOCK=1024, MASK=False)
    yield "masked", of(powers, (x, x, 4096), BLOCK=1024, MASK=True)
    if target == "sm_90":
        yield "crowded", of(crowded, (x, x, 48), BLOCK=16384)
        yield "too much", of(product, (h, h, meta(4096, 4096), 4096, 4096, 4096, 4096), 5, M=128, N=256, D=64)
"""
MAIN = """
import json, sys, kernels_of_the_test as k
from smalt.profiling.kernels.compile import compile_launch, specialize
from smalt.profiling.kernels.machine_code import figures
targets = ("sm_80", "sm_90", "sm_100", "gfx942")
figures_of = {t: {n: figures(compile_launch(x).kernel, t) for n, x in k.launches(t)} for t in targets}

from triton.backends.compiler import BaseBackend
from triton._C.libtriton import native_specialize_impl
x = k.meta(8, dtype=k.torch.float16)
args = x, x[1:], None, 1, 32, 33, 2**40, 16, 0.5, True, (x, 1, 7, None)
signature, fixed, attributes = specialize(k.arguments, args, {})
names = [p.name for p in k.arguments.params]
own = [[signature[n], (i,) in attributes] for i, n in enumerate(names[:10]) if n != "y"]
def triton(name, value):
    kind, seen = native_specialize_impl(BaseBackend, value, False, name != "free", True)
    return [kind, seen == "D"]
theirs = [triton(n, v) for n, v in zip(names[:10], args) if n != "y"]
inner = [[list(at) for at in found if len(at) > 1] for found in (fixed, attributes)]
member = [signature["pair"], *inner, (1,) in attributes]
print(json.dumps({"found": figures_of, "own": own, "theirs": theirs, "pair": member, "C": fixed[(11,)]}))
"""


def without_interpreter():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Figures of the kernels above by target and name, and what ``specialize`` says beside what Triton says."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels_of_the_test.py").write_text(KERNELS)
    (folder / "main.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=folder, env=without_interpreter(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def row(figures, target="sm_90", **changed):
    identity = {"kernel": "k", "case": "k", "target": target, "dtype": "bf16", "size": 64, "constants": {}, "tiles": {"BLOCK": 128}}
    return {**identity, "num_warps": 4, "num_stages": 1, **figures, **changed}


def outcome(*rows, triton="3.9.0"):
    return Outcome(rows=list(rows), triton=triton)


# Real binaries


@pytest.mark.slow
@pytest.mark.parametrize(("target", "kind"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")])
def test_the_kind_of_matrix_instruction(compiled, target, kind):
    found = compiled["found"][target]
    assert found["product"]["matrix"] == kind
    assert found["powers"]["matrix"] == ""
    assert found["product"]["spills"] == 0
    assert 30 < found["product"]["registers"] < 256
    assert found["product"]["shared"] >= 2 * (128 + 128) * 64
    if target != "gfx942":
        assert found["product"]["copies"] > 0
        assert found["powers"]["copies"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("target", "matrix", "rate"), [("sm_80", 64, 2048), ("sm_90", 8, 4096), ("sm_100", 4, 8192)])
def test_the_matrix_work_of_a_loop_is_that_of_its_tile(compiled, target, matrix, rate):
    loop = compiled["found"][target]["product"]["loops"][0]
    # A warp of four: sm_80 does 128 x 128 x 64 in products of 16 x 8 x 16, two warpgroup products of 64 x 128 x 16 on sm_90.
    assert loop["matrix"] == {"sm_80": 4 * matrix // 2, "sm_90": matrix, "sm_100": matrix}[target]
    assert loop["cycles"]["matrix"] == 2 * 128 * 128 * 64 // rate
    assert loop["cycles"]["issue"] == loop["total"]
    assert loop["total"] == sum(loop.get(kind, 0) for kind in ("matrix", "special", "fp32", "convert", "integer", "uniform")) + sum(
        loop.get(kind, 0) for kind in ("memory", "shuffle", "control")
    )
    assert 0 < loop["alone"] < loop["overlap"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize(("target", "threads"), [("sm_80", 128), ("sm_90", 128), ("sm_100", 128), ("gfx942", 256)])
def test_a_loop_of_known_content(compiled, target, threads):
    each = 1024 // threads
    powers, masked = compiled["found"][target]["powers"]["loops"], compiled["found"][target]["masked"]["loops"]
    assert powers
    assert masked
    # The compiler unrolls; what remains of the last iterations is a loop of one.
    assert min(loop["special"] for loop in powers) == each
    for loop in powers:
        times = loop["special"] // each
        assert loop["special"] == each * times
        # Additions of two numbers at once halve their count.
        assert loop["fp32"] in (each * times, each * times // 2)
        assert loop["mask"] <= 2
    assert all("special" not in loop for loop in masked)
    assert each <= min(loop["mask"] for loop in masked) <= 2 * each + 2


@pytest.mark.slow
def test_spills_and_too_much_shared_memory_are_violations(compiled, tmp_path):
    crowded, large = (compiled["found"]["sm_90"][name] for name in ("crowded", "too much"))
    assert crowded["stack"] > 0
    found = outcome(row(crowded), row(large, tiles={"BLOCK": 256}))
    compare(found, tmp_path / "none.json")
    first, second = map(str, found.violations[:1] + found.violations[-1:])
    assert "k on sm_90, bf16 64 BLOCK=128, 4 warps, 1 stages: spills: " in first
    assert f"shared memory: {large['shared']} bytes of {227 * 1024}" in second
    assert print_outcome(found) == 1


@pytest.mark.slow
def test_arguments_are_specialised_as_triton_does(compiled):
    assert compiled["own"] == compiled["theirs"]
    kind, constants, multiples, view_at_2_bytes = compiled["pair"]
    assert kind == ["*fp16", "constexpr", "i32", "constexpr"]
    assert (constants, multiples, view_at_2_bytes) == ([[10, 1], [10, 3]], [[10, 0]], False)
    assert compiled["C"] == 3


def launch_rows(**tiles):
    row = {"target": "sm_90", "num_warps": 4, "num_stages": 1}
    return [{**row, "kernel": "column_sum", "bits": 32, "size": 4096, "tiles": {"BLOCK_P": 32, "BLOCK_D": 64, **tiles}}]


@pytest.mark.slow
def test_the_command(tmp_path):
    rows, table = tmp_path / "rows.json", tmp_path / "table.json"
    rows.write_text(json.dumps(launch_rows()))
    command = [sys.executable, "-m", "smalt.engine.cli", "kernels", "check", "--kernel", "column_sum", "--target", "sm_90"]
    command += ["--rows", str(rows), "--table", str(table), "--no-beside"]

    def run(*more, **environment):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env={**os.environ, "COLUMNS": "250", **environment}, check=False
        )
        return done.returncode, done.stdout + done.stderr

    code, said = run("--write", TRITON_INTERPRET="1")
    assert code == 0, said
    assert "column_sum" in said
    kept = json.loads(table.read_text())
    assert {r["kernel"] for r in kept["rows"]} == {"column_sum"}
    code, said = run()
    assert (code, "all rules hold" in said) == (0, True), said
    count = len(kept["rows"])
    assert f"{count} from Triton's cache" in said

    for r in kept["rows"]:
        r["registers"] -= 1
    table.write_text(json.dumps(kept))
    code, said = run()
    assert code == 1
    grown = f"registers: was {kept['rows'][0]['registers']}, is {kept['rows'][0]['registers'] + 1}"
    assert f"column_sum on sm_90, bf16 2560 BLOCK_P=32 BLOCK_D=64, 4 warps, 1 stages: {grown}" in said

    table.write_text(json.dumps({**kept, "triton": "3.6.0"}))
    code, said = run()
    assert code == 0, said
    assert grown in said
    assert "another version" in said

    code, said = run("--target", "sm_75")
    assert code == 1
    assert "unknown target 'sm_75'" in said


@pytest.mark.slow
def test_missing_unreached_and_broken_configurations_are_named(tmp_path):
    rows = tmp_path / "rows.json"
    unreached = {
        "kernel": "no_such_kernel",
        "target": "sm_90",
        "bits": 16,
        "size": 8,
        "tiles": {"A": 1},
        "num_warps": 4,
        "num_stages": 1,
    }
    rows.write_text(json.dumps([*launch_rows(BLOCK_D=48), unreached]))
    found = check(targets=["sm_90"], rows=rows, table=tmp_path / "none.json", beside=False)
    said = "\n".join(map(str, found.violations))
    assert "rms_norm_forward on sm_90, bf16 2560: compilation: no launch configuration for sm_90, 16 bits: add a row" in said
    assert "column_sum on sm_90, bf16 2560: compilation: does not compile: " in said
    assert "no_such_kernel on sm_90, 16 bits, size 8: coverage: no case compiles this launch configuration" in said
    assert not found.rows


@pytest.mark.slow
def test_a_row_that_the_models_sizes_do_not_reach_is_compiled_too(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([*launch_rows(), {**launch_rows(BLOCK_D=128)[0], "size": 64}]))
    found = check("column_sum", ["sm_90"], rows, tmp_path / "none.json", beside=False)
    assert not found.violations
    assert {(r["size"], r["tiles"]["BLOCK_D"]) for r in found.rows} >= {(64, 128), (2560, 64)}


@pytest.mark.slow
def test_liger_beside(tmp_path):
    pytest.importorskip("liger_kernel")
    (result,) = run_tasks(
        [{"library": "liger", "case": "rms_norm", "size": 2560, "target": "sm_90", "dtype": "bf16", "rows": None}], 1
    )
    assert "error" not in result, result
    assert [r["kernel"] for r in result["rows"]] == ["_rms_norm_forward_kernel", "_rms_norm_backward_kernel"]
    assert all(r["registers"] > 10 and r["num_warps"] == 8 for r in result["rows"])
    found = Outcome(beside=[{**r, "library": "liger"} for r in result["rows"]], triton=result["triton"])
    write_docs(found, tmp_path / "kernels.md")
    assert "| liger: _rms_norm_forward_kernel | bf16 2560 |" in (tmp_path / "kernels.md").read_text()


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    (tmp_path / "smalt_dies.py").write_text(
        "import os, sys; print('ptxas fell over', file=sys.stderr); sys.stdin.readline(); os._exit(9)"
    )
    command = [sys.executable, str(tmp_path / "smalt_dies.py")]

    def start(errors):
        return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    monkeypatch.setattr(module, "_start", start)
    results = run_tasks([{"library": "smalt", "case": str(i)} for i in range(3)], 2)
    assert results == [{"error": "the compiling process died (9): ptxas fell over"}] * 3


# Loops, in assembly short enough to count by hand

SASS = """
.text.k:
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDS.128 R8, [R4] ;
        /*0030*/               @P2 BRA `(.L_x_2) ;
        /*0040*/                   FSEL R8, R8, RZ, P1 ;
.L_x_2:
        /*0050*/                   HMMA.16816.F32.BF16 R12, R8, R10, R12 ;
        /*0060*/                   MUFU.EX2 R8, R8 ;
        /*0070*/              @!PT LDS RZ, [RZ] ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R18 ;
        /*0090*/              @!P3 BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   ISETP.LT.AND P0, PT, R4, R5, PT ;
        /*00b0*/               @P0 BRA `(.L_x_1) ;
        /*00c0*/               @P1 BRA `(.L_x_0) ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R18 ;
        /*00f0*/              @!P3 BRA `(.L_x_4) ;
        /*0100*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5);
"""


def test_loops():
    chip = CHIPS["sm_80"]
    (inner,) = innermost_loops(parse_sass(SASS, chip))
    # The outer loop, the waiting one and the trap at the end are none; the branch out to the waiting one and back counts.
    assert [i.opcode for i in inner][:2] == ["LDS.128", "BRA"]
    found = count(inner, chip, num_warps=8)
    assert found["total"] == 11
    assert {k: found[k] for k in ("matrix", "special", "integer", "memory", "control", "mask")} == {
        "matrix": 1, "special": 1, "integer": 2, "memory": 1, "control": 6, "mask": 2,
    }  # fmt: skip
    # 8 warps: 2 a scheduler. 4096 FLOP a warp at 2048 a cycle; 16 lanes of 128 for exp2; 512 bytes a warp at 128 a cycle.
    assert found["cycles"] == {"alu": 8, "matrix": 16, "shared": 32, "special": 16, "issue": 22}
    assert found["overlap"] == 50.0
    assert found["alone"] == round(100 * 16 / (16 + 8 + 32 + 16 + 12), 1)


def test_a_loop_that_the_issue_of_instructions_bounds():
    add = "        /*0010*/                   UIADD3 UR4, UR4, 0x1, URZ ;\n"
    product = "        /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
    text = (
        ".text.k:\n.L_x_0:\n"
        + 9 * add
        + product
        + "        /*0030*/               @P0 BRA `(.L_x_0) ;\n        /*0040*/                   EXIT ;\n"
    )
    (loop,) = innermost_loops(parse_sass(text, CHIPS["sm_90"]))
    found = count(loop, CHIPS["sm_90"], num_warps=4)
    assert found["cycles"] == {"matrix": 4, "issue": 11}
    assert (found["overlap"], found["alone"]) == (round(400 / 11, 1), round(400 / 14, 1))


def test_the_matrix_work_of_instructions():
    chip = CHIPS["sm_100"]
    text = """
        /*0000*/                   UMOV UR31, 0x8210490 ;
        /*0010*/                   UTCHMMA gdesc[UR4], gdesc[UR12], tmem[UR9], tmem[UR30], idesc[UR31], !UPT ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   HMMA.1688.F32.TF32 R12, R8, R10, R12 ;
"""
    tcgen05, wgmma, tf32 = parse_sass(text, chip).instructions[1:]
    assert (tcgen05.flop, tcgen05.whole) == (2 * 128 * 128 * 16, True)
    assert (wgmma.flop, wgmma.whole) == (2 * 16 * 256 * 16, False)
    assert (tf32.flop, tf32.scale) == (2 * 16 * 8 * 8, 0.5)


# The table


FIGURES = {"registers": 100, "stack": 0, "spills": 0, "shared": 1024, "matrix": "wgmma", "copies": 8, "loops": [{"total": 300}]}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.json"
    write_table(outcome(row(FIGURES), row(FIGURES, kernel="other", target="sm_80", matrix="mma")), path)
    return path


def broken(table, *rows, triton="3.9.0"):
    found = outcome(*rows, triton=triton)
    compare(found, table, targets=["sm_90"])
    return [v.figure for v in found.violations], found.notes


def test_the_table_holds_itself(table):
    assert broken(table, row(FIGURES)) == ([], [])
    assert len(table.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        ({"registers": 101}, "registers"),
        ({"stack": 8}, "stack"),
        ({"shared": 1040}, "shared"),
        ({"tensor": 128}, "tensor"),
        ({"loops": [{"total": 301}]}, "instructions an iteration of loop 1"),
    ],
)
def test_figures_may_not_grow_with_the_tables_triton(table, changed, figure):
    assert broken(table, row(FIGURES, **changed)) == ([figure], [])
    found, notes = broken(table, row(FIGURES, **changed), triton="3.6.0")
    assert (found, len(notes), figure in notes[0]) == ([], 1, True)


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        ({"matrix": "mma"}, "matrix instructions"),
        ({"matrix": ""}, "matrix instructions"),
        ({"copies": 0}, "asynchronous copies"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"tensor": 513}, "tensor memory"),
        ({"spills": 1}, "spills"),
    ],
)
@pytest.mark.parametrize("triton", ["3.9.0", "3.6.0"])
def test_hard_rules_hold_with_any_triton(table, changed, figure, triton):
    assert figure in broken(table, row(FIGURES, **changed), triton=triton)[0]


def test_what_shrinks_is_a_note(table):
    found, notes = broken(table, row(FIGURES, registers=90, copies=4, loops=[{"total": 250}, {"total": 9}]))
    assert not found
    assert ["registers: was 100, is 90" in notes[0], "loop 1: was 300, is 250" in notes[1], len(notes)] == [True, True, 2]


def test_rows_that_come_and_go(table):
    assert broken(table, row(FIGURES, num_warps=8))[0] == ["configuration", "configuration"]
    assert broken(table, row(FIGURES, num_warps=8), triton="3.6.0")[0] == []


def test_writing_some_rows_keeps_the_others(table):
    new = outcome(row(FIGURES, registers=90))
    write_table(new, table, targets=["sm_90"])
    assert sorted((r["kernel"], r["registers"]) for r in json.loads(table.read_text())["rows"]) == [("k", 90), ("other", 100)]
    with pytest.raises(ValueError, match=r"of Triton 3\.9\.0, this is 3\.6\.0"):
        write_table(outcome(row(FIGURES), triton="3.6.0"), table, targets=["sm_90"])


def test_the_page(tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text("# Kernels\n\nBefore.\n")
    for registers in (90, 80):
        write_docs(
            outcome(row(FIGURES, registers=registers, loops=[{"total": 300, "overlap": 90.5, "alone": 40.0}, {"total": 200}])), page
        )
        page.write_text(page.read_text() + "\nAfter.\n" if registers == 90 else page.read_text())
    text = page.read_text()
    assert text.startswith("# Kernels\n\nBefore.\n")
    assert text.endswith("\n\nAfter.\n")
    assert "| k | bf16 64 | BLOCK=128 | 4, 1 | 80 | 0 | 1.0 | wgmma | 8 | 300/200 |" in text
    assert " 90 |" not in text
    write_docs(outcome(row(FIGURES, target="sm_80")), page)
    assert page.read_text() == text


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="unknown kernel 'no_such'; choose among adamw,"):
        check("no_such")


def test_every_kernel_of_the_launch_tables_has_a_case():
    shipped = launch_rows_of_the_house(None)
    known = {name for case in CASES for name in case.kernels}
    missing = {r["kernel"] for r in shipped} - known
    assert not missing, f"add a case to profiling/kernels/cases.py for {missing}"
    assert {name for _, name, _ in OTHERS} <= {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_launches_its_kernels(case):
    table = [{**r, "target": "sm_90"} for r in launch_rows_of_the_house(None) if r["target"] == "interpreter"]
    for dtype in case.dtypes:
        launched = set()
        for call in case.launches:
            with recording("sm_90", table) as record:
                call(case.sizes[0], DTYPES[dtype])
            assert record
            launched |= {launch.name for launch in record}
        assert set(case.kernels) <= launched
