import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend, layer_norm
from smalt.kernels.layer_norm import MAX_WIDTH, _layer_norm, layer_norm_reference

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "sliced", "transposed", "expanded", "strided"])


def formula(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@st.composite
def cases(draw):
    """x off centre and a slice of something wider, weight, bias and eps."""
    # Of width 2 only the sign is left, and the gradient is rounding noise.
    lead, width, dtype = draw(st.lists(st.integers(0, 5), min_size=1, max_size=2)), draw(st.integers(3, 70)), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(*lead, width + draw(st.integers(0, 3)), generator=generator) * draw(st.sampled_from([0.1, 3.0])) + draw(
        st.sampled_from([-5, 0, 1])
    )
    parameters = [torch.randn(width, generator=generator).to(draw(st.sampled_from([torch.float32, dtype]))) for _ in range(2)]
    return x.to(dtype)[..., :width], *parameters, draw(st.sampled_from([1e-6, 0.1]))


@pytest.mark.slow
@given(case=cases())
def test_kernel_obeys_the_rule(check_rule, device, case):
    check_rule(lambda *inputs: layer_norm(*inputs, case[-1]), [t.to(device) for t in case[:-1]])


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 1152])
def test_kernel_obeys_the_rule_at_the_widths_of_vision_towers(check_rule, device, width):
    generator = torch.Generator().manual_seed(width)
    x, w, b = (torch.randn(*s, generator=generator).to(device) for s in ((9, width), (width,), (width,)))
    check_rule(lambda x, w, b: layer_norm(x, w, b, 1e-6), [(3 * x + 2).bfloat16(), w, b])


@pytest.mark.slow
@given(case=cases(), layouts=st.tuples(LAYOUTS, LAYOUTS))
def test_strides_change_nothing(check_layouts, device, case, layouts):
    inputs = [t.to(device) for t in case[:-1]]
    check_layouts(lambda *inputs: layer_norm(*inputs, case[-1]), inputs, [layouts[0], "contiguous", "contiguous", layouts[1]])


@given(case=cases())
def test_torch_is_the_formula_in_float64(error, case):
    results = []
    for function in (layer_norm, layer_norm_reference, formula):
        leaves = [t.double().requires_grad_() for t in case[:-1]]
        y = function(*leaves, case[-1])
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for others in results[:2]:
        for got, want in zip(others, results[2], strict=True):
            assert error(got, want, floor=1e-2) < 1e-12


def test_reference_by_gradcheck():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(lambda *inputs: layer_norm_reference(*inputs, 0.1), inputs)


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_bf16_is_rounded_once(device, name):
    x, w, b = (torch.randn(*s, device=device).bfloat16() for s in ((15, 24), (24,), (24,)))
    want = formula(x.double(), w.double(), b.double(), 0.1)
    with backend(name):
        got = layer_norm(x, w, b, 0.1)
    assert got.dtype == torch.bfloat16
    # Half a unit in the last place of eight bits, and a little for the fp32 arithmetic before it.
    assert ((got.double() - want).abs() <= 1.001 * 2**-9 * 2 * want.abs() + 1e-6).all()


def test_parameters_of_two_dtypes_get_gradients_of_their_own(device):
    x, w, b = torch.randn(6, 24, device=device).bfloat16(), torch.randn(24, device=device), torch.randn(24, device=device).bfloat16()
    for name in ("triton", "torch"):
        leaves = [t.requires_grad_() for t in (x, w, b)]
        with backend(name):
            gradients = torch.autograd.grad(layer_norm(*leaves, 1e-6).sum(), leaves)
        assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    x, w, b = (torch.randn(*s, device=device) for s in ((29, 40), (40,), (40,)))
    check_grid_order(lambda x, w, b: layer_norm(x, w, b, 1e-6), [x, w, b])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    x, w, b = (torch.randn(*s, device=device) for s in ((6, 24), (24,), (24,)))
    check_operator(lambda x, w, b: layer_norm(x, w, b, 1e-6), [x, w, b])
    torch.library.opcheck(_layer_norm, (x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), 1e-6, "triton"))


def test_wider_rows_than_a_program_holds_run_in_torch(device, error):
    x, w, b = (torch.randn(*s, device=device) for s in ((2, MAX_WIDTH + 1), (MAX_WIDTH + 1,), (MAX_WIDTH + 1,)))
    with backend("triton"):
        got = layer_norm(x, w, b, 1e-6)
    assert error(got, layer_norm_reference(x, w, b, 1e-6)) < 1e-6


@pytest.mark.gpu
def test_ligers_kernel_computes_the_same(error):
    pytest.importorskip("liger_kernel")
    x, w, b = (torch.randn(*s, device="cuda") for s in ((65, 1152), (1152,), (1152,)))
    with backend("liger"):
        got = layer_norm(x, w, b, 1e-6)
    assert error(got, layer_norm_reference(x, w, b, 1e-6)) < 1e-5


@pytest.mark.parametrize(
    ("shapes", "message"), [(((2, 3), (4,), (3,)), r"weight \(4,\)"), (((2, 3), (3,), (1,)), r"bias \(1,\)")], ids=["weight", "bias"]
)
def test_bad_arguments_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(*(torch.ones(shape) for shape in shapes), 1e-6)
