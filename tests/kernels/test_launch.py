"""How kernels are launched: the table, the chips, the one function, and the two repairs of Triton's interpreter."""

import ast
import json
from pathlib import Path

import pytest
import torch

from smalt.kernels import launch as module
from smalt.kernels.launch import (
    TABLES,
    Config,
    as_rows,
    cdiv,
    configuration,
    convert,
    index_table,
    jit,
    launch,
    next_power_of_two,
    recording,
    tl,
)

KERNELS = sorted(Path(module.__file__).parent.glob("*.py"))
ROWS = [
    {"kernel": "k", "target": "sm_90", "bits": 16, "size": 128, "tiles": {"BLOCK": 1}, "num_warps": 4, "num_stages": 2},
    {"kernel": "k", "target": "sm_90", "bits": 16, "size": 64, "tiles": {"BLOCK": 2}, "num_warps": 8, "num_stages": 3},
]


def test_the_smallest_row_that_is_large_enough_counts():
    x = torch.empty(2, dtype=torch.bfloat16, device="meta")
    with recording("sm_90", ROWS):
        assert [configuration("k", size, x).tiles["BLOCK"] for size in (1, 64, 65, 128, 999)] == [2, 2, 1, 1, 1]
        assert configuration("k", 64, x) == Config({"BLOCK": 2}, 8, 3)
        with pytest.raises(KeyError, match=r"'k', 'sm_90', 32"):
            configuration("k", 64, x.float())


def test_recording_keeps_launches_and_restores():
    x = torch.empty(4, device="meta")
    with recording("gfx942", ROWS) as record:
        launch("k", None, (3,), x, 5, config=Config({"BLOCK": 7}, 4, 1), WIDE=True)
    (one,) = record
    assert (one.name, one.grid, one.target) == ("k", (3,), "gfx942")
    assert one.args[1] == 5
    assert one.constants == {"BLOCK": 7, "WIDE": True}
    assert module._state.record is None
    assert module._state.target is None


def test_chips_take_the_tiles_of_the_one_with_their_shared_memory(monkeypatch):
    class Properties:
        gcnArchName = "gfx942"

        def __init__(self, major, minor):
            self.major, self.minor = major, minor

    module._chip.cache_clear()
    names = {}
    for index, capability in enumerate([(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, c=capability: Properties(*c))
        names[capability] = module._chip(index)
    module._chip.cache_clear()
    assert names == {
        (8, 0): "sm_80", (8, 6): "sm_120", (8, 9): "sm_120", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120",
    }  # fmt: skip


def test_tables_name_known_targets_and_no_row_twice():
    rows = [row for path in sorted(TABLES.glob("*.json")) for row in json.loads(path.read_text())]
    assert {row["target"] for row in rows} <= {*module.TARGETS, "interpreter"}
    assert {row["bits"] for row in rows} <= {16, 32}
    keys = [(row["kernel"], row["target"], row["bits"], row["size"]) for row in rows]
    assert len(keys) == len(set(keys))
    assert all(row["num_warps"] in (1, 2, 4, 8, 16) for row in rows)
    assert index_table(rows)


@jit
def _convert_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, convert(tl.load(x + i), y.dtype.element_ty))


def test_bf16_is_rounded_to_nearest_even(device):
    x = torch.cat([torch.randn(250), torch.tensor([0.0, -0.0, 1e-40, 3e38, float("inf"), 1 + 2**-8])]).to(device)
    y = torch.empty(256, dtype=torch.bfloat16, device=device)
    launch("convert", _convert_kernel, (1,), x, y, config=Config({}, 4, 1), N=256)
    assert torch.equal(y, x.bfloat16())


def test_rows_are_views_where_strides_allow():
    x = torch.arange(24.0).view(2, 3, 4)
    assert as_rows(x).data_ptr() == x.data_ptr()
    assert as_rows(x[..., :3]).stride() == (4, 1)
    assert torch.equal(as_rows(x.transpose(1, 2)), x.transpose(1, 2).reshape(8, 3))
    assert as_rows(x.transpose(1, 2)).is_contiguous()


def test_helpers():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_kernels_keep_the_rules_of_the_house():
    """One launch function (it states fp fusion), no atomics, no block pointers, no host syncs, no dot but the one that is right."""
    banned = ("atomic_", "make_block_ptr", "tl.dot(", ".item()", "triton.autotune", "cuda.synchronize")
    for path in KERNELS:
        text = path.read_text()
        found = [word for word in banned if word in text and path.name != "launch.py"]
        assert not found, f"{path.name} has {found}"
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
        launches = [n for n in calls if any(k.arg == "num_warps" for k in n.keywords)]
        assert len(launches) == (path.name == "launch.py"), f"{path.name} launches a kernel without launch()"
    assert "enable_fp_fusion=True" in Path(module.__file__).read_text()


@pytest.fixture
def torchs_precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_tf32_is_taken_where_torch_was_told_so(torchs_precision, monkeypatch):
    assert module.precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the older flag raises from here on
    assert module.precision(torch.float32) == "tf32"
    assert module.precision(torch.bfloat16) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert module.precision(torch.float32) == "ieee"


def test_rows_without_numbers():
    assert module.as_rows(torch.zeros(2, 3, 0)).shape == (6, 0)
    assert module.as_rows(torch.zeros(0, 3, 4)).shape == (0, 4)
