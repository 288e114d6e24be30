"""backend(): which implementation runs."""

import importlib

import pytest
import torch

from smalt.kernels import BACKENDS, attention, backend, current_backend, linear_cross_entropy


def test_nesting_restores():
    assert current_backend() == "torch"
    with backend("reference"):
        with backend("torch"):
            assert current_backend() == "torch"
        assert current_backend() == "reference"
        with pytest.raises(RuntimeError, match="inside"), backend("torch"):
            raise RuntimeError("inside")
        assert current_backend() == "reference"
    assert current_backend() == "torch"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, torch"), backend("cuda"):
        pass
    assert current_backend() in BACKENDS


def test_operations_obey(monkeypatch):
    ran = []
    for name in ("attention", "linear_cross_entropy"):
        module = importlib.import_module(f"smalt.kernels.{name}")
        original = getattr(module, f"{name}_reference")
        monkeypatch.setattr(module, f"{name}_reference", lambda *a, f=original, n=name: ran.append(n) or f(*a))
    x, rows = torch.zeros(2, 1, 2), torch.arange(2)

    def run():
        attention(x, x, x, rows, rows + 1)
        linear_cross_entropy(x[:, 0], x[:, 0], rows)

    run()
    assert ran == []
    with backend("reference"):
        run()
    assert ran == ["attention", "linear_cross_entropy"]
