import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend, swiglu, swiglu_packed
from smalt.kernels.gated import _unit
from smalt.kernels.swiglu import swiglu_reference

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "sliced", "transposed", "expanded", "strided"])
# NumPy, which the interpreter runs on, warns of what is meant: far out exp is infinite and its reciprocal zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
X = torch.linspace(-30, 30, 61, dtype=torch.float64)


@st.composite
def cases(draw):
    """The operation and its inputs, slices of something wider: gate and up, or both in one."""
    packed, lead = draw(st.booleans()), draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))
    width, dtype = draw(st.integers(1, 40)), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    width *= 1 + packed
    paddings = [draw(st.integers(0, 3)) for _ in range(1 if packed else 2)]
    inputs = [(scale * torch.randn(*lead, width + padding, generator=generator)).to(dtype)[..., :width] for padding in paddings]
    return swiglu_packed if packed else swiglu, inputs


@given(case=cases())
def test_kernel_obeys_the_rule(check_rule, device, case):
    check_rule(case[0], [t.to(device) for t in case[1]])


@pytest.mark.slow
@given(case=cases(), layouts=st.lists(LAYOUTS, min_size=3, max_size=3))
def test_strides_change_nothing(check_layouts, device, case, layouts):
    check_layouts(case[0], [t.to(device) for t in case[1]], layouts[: len(case[1]) + 1])


@given(case=cases())
def test_torch_is_the_reference_in_float64(error, case):
    results = []
    for name in ("torch", "reference"):
        leaves = [t.double().requires_grad_() for t in case[1]]
        with backend(name):
            y = case[0](*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want, floor=1e-3) < 1e-12


def test_reference_by_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_reference, (gate, up))


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-9)])
def test_formula(device, name, dtype, tolerance):
    gate, up = X.to(dtype).to(device), X.flip(0).to(dtype).to(device) + 1
    want = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
    with backend(name):
        got = swiglu(gate, up)
    assert got.dtype == dtype
    # bf16 has eight bits: half a unit of the last, rounded once.
    assert ((got.double() - want).abs() <= 1.01 * tolerance * 2 * want.abs() + 1e-12).all()


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_far_out_it_is_the_identity_or_nothing(device, name):
    gate = torch.tensor([-6e4, -200.0, 200.0, 6e4], device=device, requires_grad=True)
    with backend(name):
        y = swiglu(gate, torch.ones_like(gate))
    assert y.tolist() == [0, 0, 200, 6e4]
    assert torch.autograd.grad(y.sum(), gate)[0].tolist() == [0, 0, 1, 1]


def test_packed_is_separate_to_the_bit(device):
    gate_up, upstream = torch.randn(7, 44, device=device), torch.randn(7, 22, device=device)
    packed = gate_up.clone().requires_grad_()
    gate, up = (t.contiguous().requires_grad_() for t in gate_up.chunk(2, -1))
    with backend("triton"):
        one, two = swiglu_packed(packed), swiglu(gate, up)
        gradient = torch.autograd.grad(one, packed, upstream)[0]
        assert torch.equal(one, two)
        assert torch.equal(gradient, torch.cat(torch.autograd.grad(two, (gate, up), upstream), -1))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device, packed):
    inputs = [torch.randn(9, 40, device=device)] if packed else [torch.randn(9, 20, device=device) for _ in range(2)]
    check_grid_order(swiglu_packed if packed else swiglu, inputs)


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    gate, up = (torch.randn(6, 24, device=device, requires_grad=True) for _ in range(2))
    check_operator(lambda gate, up: swiglu(gate, up) + swiglu_packed(torch.cat([gate, up], -1)), [gate, up])
    torch.library.opcheck(_unit, (gate, up, "silu", False, "triton"))
    torch.library.opcheck(_unit, (gate, None, "silu", True, "triton"))


@pytest.mark.gpu
def test_ligers_kernels_compute_the_same(error):
    pytest.importorskip("liger_kernel")
    gate, up = (torch.randn(65, 512, device="cuda") for _ in range(2))
    with backend("liger"):
        got, packed = swiglu(gate, up), swiglu_packed(torch.cat([gate, up], -1))
    assert error(got, swiglu_reference(gate, up)) < 1e-5
    assert error(packed, swiglu_reference(gate, up)) < 1e-5


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (swiglu, (torch.ones(2, 3), torch.ones(2, 4)), r"up \(2, 4\)"),
        (swiglu, (torch.ones(2, 3), torch.ones(2, 3).half()), r"up \(2, 3\) torch.float16"),
        (swiglu_packed, (torch.ones(2, 3),), r"gate_up \(2, 3\)"),
    ],
)
def test_bad_arguments_are_named(function, inputs, message):
    with pytest.raises(ValueError, match=message):
        function(*inputs)
