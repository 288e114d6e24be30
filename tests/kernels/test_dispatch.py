"""backend(): which implementation runs."""

import importlib
import subprocess
import sys

import pytest
import torch

from smalt.kernels import (
    BACKENDS,
    attention,
    backend,
    current_backend,
    decode_attention,
    gelu,
    layer_norm,
    linear_cross_entropy,
    linear_distillation,
    matmul,
    rms_norm,
    rotary,
    swiglu,
)
from smalt.kernels.launch import INTERPRET


def test_nesting_restores():
    assert current_backend() == "torch"
    with backend("reference"):
        with backend("triton"):
            assert current_backend() == "triton"
        assert current_backend() == "reference"
        with pytest.raises(RuntimeError, match="inside"), backend("torch"):
            raise RuntimeError("inside")
        assert current_backend() == "reference"
    assert current_backend() == "torch"


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, torch"), backend("cuda"):
        pass
    assert current_backend() in BACKENDS


def test_device_and_dtype_decide():
    x = torch.ones(2)
    assert current_backend(x) == "torch"
    with backend("reference"):
        assert current_backend(x.double()) == "reference"
    if INTERPRET:
        with backend("triton"):
            assert current_backend(x) == "triton"
            assert current_backend(x.double()) == "torch", "the kernels take no float64"


@pytest.mark.slow
def test_kernels_on_a_cpu_without_the_interpreter_are_an_error():
    code = "import torch, smalt.kernels as k\nwith k.backend('triton'): k.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"TRITON_INTERPRET": "0"}, check=False)
    assert "needs a GPU, and the tensor is on cpu; to run the kernels in Triton's interpreter, set TRITON_INTERPRET=1" in done.stderr


@pytest.mark.slow
def test_without_triton_the_package_works():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, smalt.kernels as k\n"
        "assert k.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).shape == (2, 4)\n"
        "k.backend('triton').__enter__()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "backend 'triton' needs Triton, which is not installed: pip install triton" in done.stderr


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


WORDS = torch.randn(5, 8, dtype=torch.float64)
WEIGHT, ANGLES = torch.rand(8, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
FUNCTIONAL = {
    "rms_norm": lambda x: rms_norm(x, WEIGHT, 1e-6),
    "rms_norm in bf16": lambda x: rms_norm(x.bfloat16(), WEIGHT.bfloat16(), 1e-6),
    "layer_norm": lambda x: layer_norm(x, WEIGHT, WEIGHT, 1e-6),
    "rotary": lambda x: rotary(x[:, None], ANGLES.cos(), ANGLES.sin()),
    "rotary with norm": lambda x: rotary(x[:, None], ANGLES.cos(), ANGLES.sin(), WEIGHT),
    "swiglu": lambda x: swiglu(x, x),
    "swiglu in bf16": lambda x: swiglu(x.bfloat16(), x.bfloat16()),
    "gelu": gelu,
    "linear_cross_entropy": lambda x: linear_cross_entropy(x, WORDS, torch.arange(6) % 5),
    "linear_distillation": lambda x: linear_distillation(x, WORDS, WORDS.repeat(2, 1)[:6], WORDS),
    "matmul": lambda x: matmul(x, WORDS),
    "attention": lambda x: attention(x[:, None], x[:, None], x[:, None], torch.zeros(6), torch.arange(1, 7)),
    "decode_attention": lambda x: decode_attention(x[:, None], x[:, None, None], x[:, None, None], torch.ones(6)),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_gradients_in_plain_torch(name):
    def loss(x):
        return FUNCTIONAL[name](x).sin().sum()

    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    with backend("torch"):
        got = torch.func.grad(loss)(x.detach())
        (want,) = torch.autograd.grad(loss(x), x)
    assert want.abs().max() > 0
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "swiglu in bf16", "matmul"])
def test_second_derivatives_are_refused_or_right(name):
    # Never silently wrong: what backward computes of forward's results would count these as constants.
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    with backend("torch"):
        (g,) = torch.autograd.grad(FUNCTIONAL[name](x).sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            g.sum().backward()
