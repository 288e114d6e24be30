"""Activation units: gelu, and gate times up for swiglu and geglu, apart or packed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.kernels import backend, geglu, geglu_packed, gelu, swiglu, swiglu_packed
from smalt.kernels.gated import _unit
from smalt.kernels.gelu import geglu_reference, gelu_reference
from smalt.kernels.swiglu import swiglu_reference

UNITS = [gelu, geglu, geglu_packed, swiglu, swiglu_packed]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "sliced", "transposed", "expanded", "strided"])
# NumPy, which the interpreter runs on, warns of what is meant: far out exp is infinite and its reciprocal zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def num_inputs(unit):
    return 2 if unit in (geglu, swiglu) else 1


def is_packed(unit):
    return unit in (geglu_packed, swiglu_packed)


def formula(unit, gate, up):
    """In float64, from gate and up however the unit takes them."""
    gate, up = gate.double(), up.double()
    if unit in (swiglu, swiglu_packed):
        return gate / (1 + torch.exp(-gate)) * up
    value = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return value if unit is gelu else value * up


def apply(unit, gate, up):
    return unit(torch.cat([gate, up], -1)) if is_packed(unit) else unit(*(gate, up)[: num_inputs(unit)])


@st.composite
def cases(draw):
    """The unit and its inputs, slices of something wider."""
    unit, lead = draw(st.sampled_from(UNITS)), draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    width, dtype = draw(st.integers(1, 40)) * (1 + is_packed(unit)), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    paddings = [draw(st.integers(0, 3)) for _ in range(num_inputs(unit))]
    return unit, [(scale * torch.randn(*lead, width + p, generator=generator)).to(dtype)[..., :width] for p in paddings]


@given(case=cases())
@settings(max_examples=50)
def test_kernel_obeys_the_rule(check_rule, device, case):
    check_rule(case[0], [t.to(device) for t in case[1]])


@pytest.mark.slow
@given(case=cases(), layouts=st.lists(LAYOUTS, min_size=3, max_size=3))
@settings(max_examples=50)
def test_strides_change_nothing(check_layouts, device, case, layouts):
    check_layouts(case[0], [t.to(device) for t in case[1]], layouts[: len(case[1]) + 1])


@given(case=cases())
@settings(max_examples=50)
def test_torch_is_the_reference_in_float64(error, case):
    results = []
    for name in ("torch", "reference"):
        leaves = [t.double().requires_grad_() for t in case[1]]
        with backend(name):
            y = case[0](*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want, floor=1e-3) < 1e-12


def test_references_by_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gelu_reference, (gate,))
    assert torch.autograd.gradcheck(geglu_reference, (gate, up))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-14), (torch.float32, 2e-6), (torch.bfloat16, 1.01 * 2**-8)])
def test_formula(device, name, unit, dtype, tolerance):
    """Each number by itself; a tolerance of half a unit in the last place of bf16 lets it be rounded once."""
    gate = torch.cat([torch.linspace(-30, 30, 61), torch.randn(200, generator=torch.Generator().manual_seed(0))]).to(device, dtype)
    up = gate.flip(0) + 1
    with backend(name):
        got = apply(unit, gate, up)
    assert got.dtype == dtype
    want = formula(unit, gate, up)
    # 1 + tanh cancels left of zero; the logistic function does not.
    floor = 1e-12 if unit in (swiglu, swiglu_packed) or dtype == torch.float64 else 1e-6
    assert ((got.double() - want).abs() <= tolerance * want.abs() + floor).all()


@pytest.mark.parametrize("unit", [gelu, swiglu])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_far_out_it_is_the_identity_or_nothing(device, name, unit):
    gate = torch.tensor([-6e4, -200.0, 200.0, 6e4], device=device, requires_grad=True)
    with backend(name):
        y = apply(unit, gate, torch.ones_like(gate))
    assert y.tolist() == [0, 0, 200, 6e4]
    assert torch.autograd.grad(y.sum(), gate)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("unit", "packed_unit"), [(geglu, geglu_packed), (swiglu, swiglu_packed)])
def test_packed_is_separate_to_the_bit(device, unit, packed_unit):
    gate_up, upstream = torch.randn(7, 44, device=device), torch.randn(7, 22, device=device)
    packed = gate_up.clone().requires_grad_()
    gate, up = (t.contiguous().requires_grad_() for t in gate_up.chunk(2, -1))
    with backend("triton"):
        one, two = packed_unit(packed), unit(gate, up)
        gradient = torch.autograd.grad(one, packed, upstream)[0]
        assert torch.equal(one, two)
        assert torch.equal(gradient, torch.cat(torch.autograd.grad(two, (gate, up), upstream), -1))


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device, unit):
    check_grid_order(unit, [torch.randn(9, 40, device=device) for _ in range(num_inputs(unit))])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    gate, up = (torch.randn(6, 24, device=device, requires_grad=True) for _ in range(2))
    check_operator(lambda gate, up: sum(apply(unit, gate, up) for unit in UNITS), [gate, up])
    for arguments in ((gate, None, "gelu", False), (gate, up, "silu", False), (gate, None, "silu", True)):
        torch.library.opcheck(_unit, (*arguments, "triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("unit", [geglu, swiglu, swiglu_packed])
def test_ligers_kernels_compute_the_same(error, unit):
    pytest.importorskip("liger_kernel")
    gate, up = (torch.randn(65, 512, device="cuda") for _ in range(2))
    with backend("liger"):
        got = apply(unit, gate, up)
    assert error(got, formula(unit, gate, up)) < 1e-5


@pytest.mark.parametrize("unit", [geglu, swiglu])
def test_bad_arguments_are_named(unit):
    with pytest.raises(ValueError, match=rf"{unit.__name__}: .*up \(2, 4\)"):
        unit(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"up \(2, 3\) torch.float16"):
        unit(torch.ones(2, 3), torch.ones(2, 3).half())


@pytest.mark.parametrize("unit", [geglu_packed, swiglu_packed])
def test_a_width_that_cannot_be_halved_is_named(unit):
    with pytest.raises(ValueError, match=rf"{unit.__name__}: gate_up \(2, 3\)"):
        unit(torch.ones(2, 3))
