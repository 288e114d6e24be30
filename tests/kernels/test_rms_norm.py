import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend, rms_norm
from smalt.kernels.rms_norm import MAX_WIDTH, _rms_norm, rms_norm_reference

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def cases(draw):
    """x, residual and weight in any layout that users bring: leading dims, padded rows, a slice of something wider."""
    lead = draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    # Of width 1 only the sign is left, and the gradient is rounding noise.
    width, dtype, padding = draw(st.integers(2, 70)), draw(DTYPES), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def tensor():
        return torch.randn(*lead, width + padding, generator=generator)[..., :width].to(dtype)

    weight = torch.randn(width, generator=generator).to(draw(st.sampled_from([torch.float32, dtype])))
    return tensor(), weight, tensor() if draw(st.booleans()) else None, draw(st.sampled_from(["after", "before"]))


@given(case=cases())
def test_kernel_obeys_the_rule(check_rule, device, case):
    x, weight, residual, cast = case
    inputs = [x.to(device), weight.to(device), *([residual.to(device)] if residual is not None else [])]
    check_rule(lambda x, w, r=None: rms_norm(x, w, 1e-6, r, cast), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("sliced", "contiguous"), ("contiguous", "sliced"), ("strided", "transposed")])
@pytest.mark.parametrize("upstream", ["sliced", "expanded"])
def test_strides_change_nothing(check_layouts, device, layouts, upstream):
    x, r, w = torch.randn(9, 24, device=device), torch.randn(9, 24, device=device), torch.randn(24, device=device)

    def function(x, r, w):
        y, total = rms_norm(x, w, 1e-6, r)
        return y + 2 * total  # whose gradient is contiguous, when that of y is not

    check_layouts(function, [x, r, w], [*layouts, "contiguous", upstream])


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
@pytest.mark.parametrize("cast", ["after", "before"])
def test_what_is_normalised_is_the_sum_that_is_returned(device, name, cast):
    x, r = (torch.randn(9, 24, device=device).bfloat16() for _ in range(2))
    w = torch.randn(24, device=device)
    with backend(name):
        y, total = rms_norm(x, w, 1e-6, r, cast)
        assert torch.equal(total, x + r)
        assert torch.equal(y, rms_norm(total, w, 1e-6, cast=cast))


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_a_wider_residual_stays_what_it_is(device, name):
    x, r, w = torch.randn(9, 24, device=device).bfloat16(), torch.randn(9, 24, device=device), torch.randn(24, device=device)
    with backend(name):
        y, total = rms_norm(x, w, 1e-6, r)
        assert torch.equal(total, x.float() + r)
        assert torch.equal(y, rms_norm(total, w, 1e-6))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_cast_before_multiplies_what_bf16_holds(error, device, name):
    """Both factors are rounded, then the product; the gradients are those of the rounded factors."""
    eps, (x, dy) = 0.1, (torch.randn(40, 24, device=device).bfloat16() for _ in range(2))
    x, w = x.requires_grad_(), torch.randn(24, device=device, requires_grad=True)
    with backend(name):
        y = rms_norm(x, w, eps, cast="before")
        dx, dw = torch.autograd.grad(y, (x, w), dy)
    s, g, w = x.detach().double(), dy.double(), w.detach().bfloat16().double()
    rsqrt = (s.square().mean(-1, keepdim=True) + eps).rsqrt()
    n, dn = (s * rsqrt).bfloat16().double(), g * w
    # In double precision a number is seldom rounded otherwise; with a factor that is not rounded, a fourth of them would be.
    assert (y != (n * w).bfloat16()).double().mean() < 0.02
    assert (dx != ((dn - s * rsqrt * (dn * s * rsqrt).mean(-1, keepdim=True)) * rsqrt).bfloat16()).double().mean() < 0.02
    assert error(dw, (g * n).sum(0)) < 1e-4


@given(case=cases())
def test_torch_is_the_reference_in_float64(error, case):
    x, weight, residual, cast = case
    inputs = [x.double(), weight.double(), *([residual.double()] if residual is not None else [])]
    results = []
    for name in ("torch", "reference"):
        leaves = [t.requires_grad_() for t in (i.detach().clone() for i in inputs)]
        with backend(name):
            y = rms_norm(leaves[0], leaves[1], 1e-6, *leaves[2:], cast=cast)
        loss = sum(t.sin().sum() for t in (y if isinstance(y, tuple) else (y,)))
        results.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*results, strict=True):
        assert error(got, want, floor=1e-3) < 1e-12


def test_reference_by_gradcheck():
    x, r, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, r, w: rms_norm_reference(x, w, 1e-6, r, "after"), (x, r, w))


def test_reference_is_torchs_own():
    x, w = torch.randn(7, 24), torch.randn(24)
    with backend("reference"):
        assert torch.allclose(rms_norm(x, w, 1e-5), torch.nn.functional.rms_norm(x, (24,), w, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    x, r, w = torch.randn(29, 40, device=device), torch.randn(29, 40, device=device), torch.randn(40, device=device)
    check_grid_order(lambda x, r, w: rms_norm(x, w, 1e-6, r), [x, r, w])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    x, w = torch.randn(6, 24, device=device), torch.randn(24, device=device)
    check_operator(lambda x, w: rms_norm(x, w, 1e-6), [x, w])
    args = (x.requires_grad_(), torch.randn_like(x), w.requires_grad_(), 1e-6, False, "triton")
    torch.library.opcheck(_rms_norm, args)


def test_wider_rows_than_a_program_holds_run_in_torch(device, error):
    x, w = torch.randn(2, MAX_WIDTH + 1, device=device), torch.randn(MAX_WIDTH + 1, device=device)
    with backend("triton"):
        got = rms_norm(x, w, 1e-6)
    assert error(got, rms_norm_reference(x, w, 1e-6, None, "after")[0]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4), 1e-6), r"weight \(4,\)"),
        ((torch.ones(2, 3), torch.ones(3), 1e-6, torch.ones(2, 4)), r"residual \(2, 4\)"),
        ((torch.ones(2, 3), torch.ones(3), 1e-6, None, "never"), 'choose "after" or "before"'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments)
