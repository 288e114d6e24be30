"""Rotary embedding: the formula, what it preserves, and its table far out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend, rotary, rotary_table

D, THETA = 8, 10_000.0


def rotated(x_D, position):
    cos, sin = rotary_table(torch.tensor([position]), D, THETA, torch.float64)
    return rotary(x_D[None, None], cos, sin)[0, 0]


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, D, generator=generator, dtype=torch.float64)


def test_formula(error):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, D, generator=generator, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 0, 77], dtype=torch.int32)
    want = torch.empty_like(x)
    for t, position in enumerate(positions.tolist()):
        for i in range(D // 2):
            angle = position * THETA ** (-2 * i / D)
            a, b = x[t, :, i], x[t, :, i + D // 2]
            want[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            want[t, :, i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
    assert error(rotary(x, *rotary_table(positions, D, THETA, torch.float64)), want) <= 1e-14


@given(seed=st.integers(0, 1000), position=st.integers(0, 1_000_000))
def test_norm_is_preserved(seed, position):
    x, _ = vectors(seed)
    assert rotated(x, position).norm().item() == pytest.approx(x.norm().item(), rel=1e-13)


@given(seed=st.integers(0, 1000), query=st.integers(0, 500), key=st.integers(0, 500), shift=st.integers(1, 1000))
def test_scores_depend_on_the_difference_of_positions(seed, query, key, shift):
    q, k = vectors(seed)
    score = rotated(q, query) @ rotated(k, key)
    moved = rotated(q, query + shift) @ rotated(k, key + shift)
    assert moved.item() == pytest.approx(score.item(), abs=1e-11)


def test_position_matters():
    q, k = vectors(0)
    assert abs((rotated(q, 5) @ rotated(k, 3) - rotated(q, 5) @ rotated(k, 4)).item()) > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2**-24), (torch.float64, 1e-9)])
def test_table_at_position_a_million(dtype, tolerance):
    position = 1_000_000
    cos, sin = rotary_table(torch.tensor([position], dtype=torch.int32), 128, 1e6, dtype)
    for i in range(64):
        angle = position * 1e6 ** (-2 * i / 128)
        assert abs(cos[0, i].item() - math.cos(angle)) <= tolerance + 1e-9
        assert abs(sin[0, i].item() - math.sin(angle)) <= tolerance + 1e-9


def test_bf16_is_rotated_in_the_tables_precision():
    x = torch.randn(4, 2, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotary_table(torch.arange(4), D, THETA, torch.float32)
    got = rotary(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotary(x.float(), cos, sin).bfloat16())


def test_gradient(error):
    # The default implementation brings its own backward pass; autograd of the definition is what it must give.
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(6, 3, D, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = rotary_table(torch.arange(6) * 5, D, THETA, torch.float64)
    gradients = []
    for name in ("torch", "reference"):
        leaf = x.clone().requires_grad_()
        with backend(name):
            gradients += torch.autograd.grad(rotary(leaf, cos, sin), leaf, upstream)
    assert error(*gradients) <= 1e-15
    assert error(gradients[0], upstream) > 0.1  # it turns
    assert torch.autograd.gradcheck(lambda y: rotary(y, cos, sin), x.clone().requires_grad_())
