"""The private names of torch that Smalt uses are those of the installed torch, and stand in one file."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from smalt.parallel import compat

ROOT = Path(__file__).resolve().parents[2]
# Of Python, which documents them; the one of DeepSpeed; and classes of torch that kernels, which import nothing of parallel, ask for.
ALLOWED = {
    ("kernels/dispatch.py", "_subclasses"), ("parallel/watchdog.py", "_exit"), ("engine/preemption.py", "_exit"),
    ("engine/data/workers.py", "_exit"),
    ("parallel/stalls.py", "_current_frames"), ("parallel/stalls.py", "_DummyThread"), ("parallel/deepspeed.py", "_get_norm_groups"),
}  # fmt: skip


def test_names_exist():
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory as symmetric_memory
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    assert isinstance(functorch.activation_memory_budget, float)
    assert isinstance(functorch.donated_buffer, bool)
    assert isinstance(inductor._micro_pipeline_tp, bool)
    assert callable(symmetric_memory.enable_symm_mem_for_group)
    assert callable(_clear_sharding_prop_cache)
    assert all(map(callable, (compat._all_gather, compat._reduce_scatter, compat._all_to_all)))
    operators = compat._operators
    assert all(map(callable, (operators.all_gather_into_tensor, operators.reduce_scatter_tensor, operators.wait_tensor)))
    assert callable(torch.distributed.distributed_c10d._set_pg_timeout)
    with compat.gathered_axis_by_axis():
        pass
    assert callable(FSDPModule._set_unshard_async_op)
    assert callable(FSDPModule._get_fsdp_state)
    assert callable(FSDPParam.accumulate_unsharded_grad_if_needed)
    assert callable(FSDPParam.to_accumulated_grad_if_needed)
    # Both return what torch's recorder has, where they are: a recorder that went would leave the watchdog blind, and it would not say.
    c10d = torch._C._distributed_c10d
    assert callable(getattr(c10d, "_dump_fr_trace", None) or getattr(c10d, "_dump_nccl_trace", None))


def test_scale_gradients():
    x = [torch.ones(2), torch.full((3,), 2.0)]
    compat.scale_gradients(x, 0.5)
    assert [t[0].item() for t in x] == [0.5, 1.0]


def test_read_parameters():
    linear = torch.nn.Linear(2, 2, bias=False)
    compat.read_parameters(linear, lambda p: 2 * p)
    assert torch.equal(linear.weight, 2 * dict(linear.named_parameters())["weight"])
    assert linear.bias is None
    linear(torch.ones(1, 2)).sum().backward()
    assert torch.equal(dict(linear.named_parameters())["weight"].grad, torch.full((2, 2), 2.0))


def trees():
    sources = [p for room in ("kernels", "model", "parallel", "profiling", "engine") for p in (ROOT / room).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sources}


def names_of_ours(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_names(tree, ours):
    """Private names that others have defined: attributes, names that are imported, modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and node.attr not in ours:
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "level", 0) == 0:
            words = [*(getattr(node, "module", None) or "").split("."), *(w for a in node.names for w in a.name.split("."))]
            yield from (word for word in words if re.match("_[^_]", word))


@pytest.mark.slow
def test_private_names_of_torch_are_in_one_file():
    found = trees()
    ours = {name for tree in found.values() for name in names_of_ours(tree)}
    others = {(path, name) for path, tree in found.items() for name in private_names(tree, ours)}
    assert {"_parameters", "_set_pg_timeout", "_StridedShard", "_functorch"} <= {n for p, n in others if p == "parallel/compat.py"}
    assert {entry for entry in others if entry[0] != "parallel/compat.py"} == ALLOWED


def test_the_search_finds_every_way_to_use_one():
    for code in (
        "import torch._x", "from torch._x import y", "from torch.x import _y", "import torch.x\ntorch.x._y()", "model._y = model._y()",
        "from torch import _y as z",
    ):  # fmt: skip
        ours = set() if "=" in code else set(names_of_ours(ast.parse(code)))
        assert list(private_names(ast.parse(code), ours)), code
