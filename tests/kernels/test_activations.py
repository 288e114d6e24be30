"""SwiGLU and GELU against their formulas."""

import math

import pytest
import torch

from smalt.kernels import gelu, swiglu

X = torch.linspace(-30, 30, 241, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_formulas(dtype, tolerance, error):
    x, up = X.to(dtype), X.flip(0).to(dtype) + 1
    wide, wide_up = x.double(), up.double()
    got = swiglu(x, up), gelu(x)
    want = (
        wide / (1 + torch.exp(-wide)) * wide_up,
        wide / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
    )
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert error(g, w) <= tolerance
