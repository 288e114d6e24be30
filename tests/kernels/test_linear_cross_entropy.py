"""The head: loss and gradients of the chunked form against the definition."""

import importlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from smalt.kernels import IGNORE, backend, linear_cross_entropy

module = importlib.import_module("smalt.kernels.linear_cross_entropy")  # the package's attribute of this name is the function


def problem(T, D, V, ignored, dtype, seed):
    """hidden [T, D], weight [V, D], labels, and an upstream gradient that differs from token to token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels, torch.randn(T, generator=generator, dtype=torch.float64)


def outputs(hidden, weight, labels, upstream, name="torch"):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with backend(name):
        nll = linear_cross_entropy(hidden, weight, labels)
    return nll.detach(), torch.autograd.grad(nll, (hidden, weight), upstream.to(nll.dtype))


def truth(hidden, weight, labels, upstream):
    return outputs(hidden.double(), weight.double(), labels, upstream, "reference")


@given(
    T=st.integers(1, 40),
    D=st.integers(1, 9),
    V=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_elements=st.sampled_from([1, 70, 1 << 22]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
@example(T=40, D=4, V=10, ignored=0.0, chunk_elements=100, dtype=torch.float64, seed=0)  # chunks of equal size
def test_against_the_definition(error, gradient_error, T, D, V, ignored, chunk_elements, dtype, seed):
    args = problem(T, D, V, ignored, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
        nll, gradients = outputs(*args)
    want, want_gradients = truth(*args)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert nll.dtype == dtype
    assert error(nll, want, floor=1.0) <= tolerance
    assert gradient_error(gradients, want_gradients) <= tolerance


def test_one_row_by_hand(error):
    hidden, weight, labels, _ = problem(1, 5, 7, 0.0, torch.float64, 2)
    logits = torch.stack([hidden[0] @ row for row in weight])
    want = -torch.log(logits[labels[0]].exp() / logits.exp().sum())
    for name in ("reference", "torch"):
        assert error(outputs(hidden, weight, labels, torch.ones(1), name)[0][0], want) <= 1e-14


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_ignored_rows_cost_nothing_and_hide_nothing(name):
    hidden, weight, labels, upstream = problem(12, 5, 7, 0.5, torch.float32, 1)
    ignored = labels == IGNORE
    nll, (d_hidden, d_weight) = outputs(hidden, weight, labels, upstream, name)
    assert torch.equal(nll == 0, ignored)
    assert torch.equal((d_hidden == 0).all(1), ignored)
    _, (_, alone) = outputs(hidden[~ignored], weight, labels[~ignored], upstream[~ignored], name)
    torch.testing.assert_close(d_weight, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_all_rows_ignored(name):
    hidden, weight, labels, upstream = problem(6, 5, 7, 1.0, torch.float32, 1)
    nll, gradients = outputs(hidden, weight, labels, upstream, name)
    for x in (nll, *gradients):
        assert torch.equal(x, torch.zeros_like(x))


def test_large_logits_do_not_overflow(error):
    hidden, weight, labels, upstream = problem(8, 5, 7, 0.0, torch.float32, 1)
    args = hidden * 1e3, weight, labels, upstream
    assert error(outputs(*args)[0], truth(*args)[0]) <= 1e-5


@pytest.mark.parametrize("scale", [0.25, 0.03])
def test_bf16_is_as_good_as_torch(error, monkeypatch, scale):
    # With small weights the logits are nearly exact, and a log-sum-exp that is rounded to bf16 shows.
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 16 * 96)
    hidden, weight, labels, upstream = problem(200, 64, 96, 0.2, torch.bfloat16, 4)
    args = hidden, weight * scale, labels, upstream
    nll, gradients = outputs(*args)
    torchs_nll, torchs_gradients = outputs(*args, "reference")
    want, want_gradients = truth(*args)
    assert nll.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in gradients)
    assert error(nll, want) <= 2 * error(torchs_nll, want) + 1e-4
    for got, torchs, wanted in zip(gradients, torchs_gradients, want_gradients, strict=True):
        assert error(got, wanted) <= 2 * error(torchs, wanted) + 1e-3
        assert error(got, wanted) <= 0.02


def test_bf16_hidden_with_fp32_weight(error):
    hidden, weight, labels, upstream = problem(50, 16, 20, 0.0, torch.float32, 4)
    nll, (d_hidden, d_weight) = outputs(hidden.bfloat16(), weight, labels, upstream)
    want, (want_hidden, want_weight) = truth(hidden.bfloat16(), weight.bfloat16(), labels, upstream)
    assert (nll.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for got, wanted in ((nll, want), (d_hidden, want_hidden), (d_weight, want_weight)):
        assert error(got, wanted) <= 0.02


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 12)
    hidden, weight, labels, _ = problem(7, 3, 4, 0.3, torch.float64, 9)
    with backend(name):
        check = lambda h, w: linear_cross_entropy(h, w, labels)  # noqa: E731
        assert torch.autograd.gradcheck(check, (hidden.requires_grad_(), weight.requires_grad_()), fast_mode=True)


def test_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 20)
    hidden, weight, labels, upstream = problem(33, 4, 20, 0.2, torch.float64, 9)
    rows = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(a.shape[0]) or matmul(a, b))
    outputs(hidden, weight, labels, upstream)
    assert len(rows) > 6
    assert max(r for r in rows if r != weight.shape[0]) <= 5


def test_wrong_shapes_are_named():
    hidden, weight, labels = torch.zeros(5, 4), torch.zeros(6, 4), torch.zeros(5, dtype=torch.int64)
    for args in (
        (hidden, weight[:, :3], labels),
        (hidden, weight, labels[:4]),
        (hidden[0], weight, labels),
        (hidden, weight[0], labels),
    ):
        with pytest.raises(ValueError) as raised:
            linear_cross_entropy(*args)
        assert all(str(tuple(x.shape)) in str(raised.value) for x in args)
