"""The private names of torch that Smalt uses are those of the installed torch, and stand in one file."""

import ast
import re
from pathlib import Path

import torch

from smalt.parallel import compat

ROOT = Path(__file__).resolve().parents[2]
# Names that torch documents, underscore or not, and modules that it documents under such a name.
ALLOWED = {"torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor"}


def test_names_exist():
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory as symmetric_memory

    assert isinstance(functorch.activation_memory_budget, float)
    assert isinstance(functorch.donated_buffer, bool)
    assert isinstance(inductor._micro_pipeline_tp, bool)
    assert callable(symmetric_memory.enable_symm_mem_for_group)
    assert all(map(callable, (compat._all_gather, compat._reduce_scatter, compat._all_to_all)))
    operators = compat._operators
    assert all(map(callable, (operators.all_gather_into_tensor, operators.reduce_scatter_tensor, operators.wait_tensor)))


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


def private_names(path):
    """Private attributes of torch that a file reads: torch._x, torch.ops._x, module._parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if (isinstance(root, ast.Name) and root.id in ("torch", "dist")) or node.attr in ("_parameters", "_modules", "_buffers"):
                yield path.relative_to(ROOT).as_posix(), node.attr


def private_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
        for name in names:
            if name and re.match(r"torch\..*\b_", name) and name not in ALLOWED:
                yield path.relative_to(ROOT).as_posix(), name


def test_private_modules_are_imported_in_one_file():
    sources = [p for room in ("kernels", "model", "parallel", "profiling", "engine") for p in (ROOT / room).rglob("*.py")]
    found = {entry for path in sources for entry in private_imports(path)}
    assert any(path == "parallel/compat.py" for path, _ in found), "the search finds nothing"
    found |= {entry for path in sources for entry in private_names(path)}
    assert not [entry for entry in found if entry[0] != "parallel/compat.py"]
