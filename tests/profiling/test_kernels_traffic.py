import pytest
import torch

from smalt.kernels.launch import INTERPRET, TARGETS, Config, cdiv, jit, launch, tl
from smalt.profiling.kernels import traffic as module
from smalt.profiling.kernels.traffic import (
    FORMULAS,
    LIMIT,
    ROW_OPERATIONS,
    Formula,
    RowOperation,
    counting,
    formula_report,
    row_traffic,
    traffic_report,
)

pytestmark = pytest.mark.skipif(not INTERPRET, reason="traffic is counted in the interpreter")
BLOCK = Config({"BLOCK": 8}, 4, 1)


@jit
def _copy_kernel(x, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < size).to(y.dtype.element_ty), mask=i < size)


@jit
def _count_kernel(x, counter, BLOCK: tl.constexpr):
    first = tl.load(x + tl.arange(0, BLOCK))
    tl.atomic_add(counter + tl.arange(0, BLOCK), first, mask=first > 2)
    tl.atomic_cas(counter, 0.0, 0.0)


def copy(name, x, y):
    launch(name, _copy_kernel, (cdiv(len(x), 8),), x, y, len(x), config=BLOCK)


def test_bytes_are_counted_by_launch_without_masked_lanes():
    x = torch.arange(13.0)
    with counting() as traffic:
        copy("narrow", x, torch.empty(13, dtype=torch.float16))
        copy("wide", x, torch.empty(13, dtype=torch.float64))
        copy("wide", x[:3], torch.empty(3))
        copy("empty", x[:0], x[:0])
    assert traffic.loads == {"narrow": 13 * 4, "wide": 13 * 4 + 3 * 4}
    assert traffic.stores == {"narrow": 13 * 2, "wide": 13 * 8 + 3 * 4}
    assert traffic.total == 13 * (4 + 2 + 4 + 8) + 3 * 8
    assert traffic.configs == {"narrow": BLOCK, "wide": BLOCK}


def test_atomics_and_unmasked_loads_are_counted():
    with counting() as traffic:
        launch("count", _count_kernel, (1,), torch.arange(8.0), torch.zeros(8), config=BLOCK)
    assert traffic.loads == {"count": (8 + 5 + 1) * 4}
    assert traffic.stores == {"count": (5 + 1) * 4}


def test_counts_nest_and_the_interpreter_is_left_as_it_was():
    from triton.runtime.interpreter import interpreter_builder

    before, x = dict(vars(interpreter_builder)), torch.ones(8)
    with counting() as outer:
        copy("first", x, x.clone())
        with counting() as inner:
            copy("second", x, x.clone())
        copy("third", x, x.clone())
    copy("fourth", x, x.clone())
    assert outer.loads == outer.stores == {"first": 32, "second": 32, "third": 32}
    assert inner.loads == inner.stores == {"second": 32}
    assert not {"create_masked_load", "create_masked_store"} & set(vars(interpreter_builder)) - set(before)


def test_only_the_interpreter_counts(monkeypatch):
    monkeypatch.setattr(module, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), counting():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("operation", ROW_OPERATIONS, ids=lambda operation: operation.name)
def test_the_line_gives_what_is_counted(operation):
    # 256 rows are a multiple of what a program takes of any operation, and not among the three that are measured.
    rows, width, dtype = 256, 24, torch.bfloat16
    with counting() as traffic:
        inputs, outputs = operation.run(rows, width, dtype)
    got = row_traffic(operation, width, dtype, rows)
    assert got.moved == traffic.total
    assert got.least == sum(t.numel() * t.element_size() for t in (*inputs, *outputs) if t is not None)
    assert got.ratio >= 1
    assert operation.kernel in traffic.configs


def test_bytes_that_are_no_line_are_refused():
    def square(rows, width, dtype):
        x = torch.ones(rows * rows)
        copy("square", x, x.clone())
        return (x,), (x,)

    with pytest.raises(ValueError, match="square: 512, 2048 and 4608 bytes at 1, 2 and 3 times 8 rows: not affine"):
        row_traffic(RowOperation("square", "square", square), 1, torch.float32)
    with pytest.raises(ValueError, match="square: 12 rows are no multiple of the 8"):
        row_traffic(RowOperation("square", "square", square), 1, torch.float32, rows=12)


def rows_of_table(target, **tiles):
    return [
        {"kernel": kernel, "target": target, "bits": bits, "size": 128, "tiles": t, "num_warps": 4, "num_stages": 1}
        for kernel, t in tiles.items()
        for bits in (16, 32)
    ]


@pytest.mark.slow
def test_the_tiles_of_a_gpu_decide():
    def report(rows):
        table = rows_of_table(
            "sm_90",
            layer_norm_forward={"ROWS": 128, "BLOCK_T": 16},
            layer_norm_backward={"ROWS": rows, "BLOCK_T": 16},
            column_sum={"BLOCK_P": 8, "BLOCK_D": 64},
        )
        return {r.name: r for r in traffic_report(["sm_90", "sm_80"], table=table, width=48)}

    good, bad = report(128), report(16)
    assert good.keys() == bad.keys() == {"layer_norm", "layer_norm backward"}
    assert all(r.ratio <= LIMIT and r.target == "sm_90" for r in good.values())
    assert bad["layer_norm"] == good["layer_norm"]
    assert bad["layer_norm backward"].ratio > LIMIT
    # x and y in bf16, mean and inverse; weight and bias in fp32 once a program, and at least once.
    small = 8192 * (48 * 4 + 8)
    assert (good["layer_norm"].moved, good["layer_norm"].least) == (small + 64 * 48 * 8, small + 48 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_row_kernels_move_little_more_than_they_must(target):
    report = traffic_report([target], (torch.bfloat16, torch.float32))
    if not report:
        pytest.skip(f"the launch table has no row for {target} yet")
    assert not [f"{r.name}, {r.dtype}: {r.ratio:.3f}" for r in report if r.ratio > LIMIT]


@pytest.mark.slow
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
def test_products_move_what_their_formula_says(monkeypatch, formula):
    monkeypatch.setattr(module, "FORMULAS", (formula,))
    report = formula_report()
    assert len(report) == 6
    assert not [r for r in report if r.counted != r.formula]


def test_a_wrong_formula_is_seen(monkeypatch):
    (right,) = (f for f in FORMULAS if f.name == "matmul")
    monkeypatch.setattr(module, "FORMULAS", (Formula("matmul", lambda *a: right.run(*a) - 2, right.shapes[:1]),))
    (got,) = formula_report([torch.bfloat16])
    assert got.counted == got.formula + 2
