"""RMSNorm and LayerNorm against their formulas in float64."""

import pytest
import torch

from smalt.kernels import layer_norm, rms_norm

EPS = 0.1  # large, so that its place in the formula shows


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 24), (24,), (24,)))
    return 3 * x + 1, weight, bias


def rms_formula(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def layer_formula(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_formulas(inputs, dtype, tolerance, error, gradient_error):
    for norm, formula, num in ((rms_norm, rms_formula, 2), (layer_norm, layer_formula, 3)):
        args = [x.to(dtype).requires_grad_() for x in inputs[:num]]
        truth = [x.detach().double().requires_grad_() for x in args]
        got, want = norm(*args, EPS), formula(*truth)
        assert got.dtype == dtype
        assert error(got, want) <= tolerance
        gradients = torch.autograd.grad(got.sin().sum(), args), torch.autograd.grad(want.sin().sum(), truth)
        assert gradient_error(*gradients) <= 10 * tolerance


def test_bf16_is_rounded_once(inputs):
    x, weight, bias = (t.bfloat16() for t in inputs)
    for got, want in (
        (rms_norm(x, weight, EPS), rms_formula(x.double(), weight.double())),
        (layer_norm(x, weight, bias, EPS), layer_formula(x.double(), weight.double(), bias.double())),
    ):
        assert got.dtype == torch.bfloat16
        # Half a unit in the last place of eight bits, and a little for the fp32 arithmetic before it.
        assert ((got.double() - want).abs() <= 1.001 * 2**-9 * 2 * want.abs() + 1e-6).all()
