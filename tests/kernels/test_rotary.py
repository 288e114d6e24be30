"""Rotary embedding: the formula, what it preserves, the norm fused in, and the kernel by the rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.kernels import backend, rms_norm, rotary, rotary_table
from smalt.kernels.rotary import MAX_HEAD_DIM, _rotary, rotary_reference

D, THETA = 8, 10_000.0
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "sliced", "transposed", "expanded", "strided"])


def table(T, R, dtype=torch.float32, device="cpu"):
    return rotary_table(torch.arange(T, device=device) * 7 % 31, R, THETA, dtype)


def turned(x, weight=None, eps=1e-6, R=None):
    """rotary by a table of x's own precision, of no less than fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rotary(x, *table(x.shape[0], R or x.shape[-1], dtype, x.device), weight, eps)


def rotated(x_D, position):
    cos, sin = rotary_table(torch.tensor([position]), D, THETA, torch.float64)
    return rotary(x_D[None, None], cos, sin)[0, 0]


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("R", [4, 8, 12])
def test_formula(error, name, R):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 12, generator=generator, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 0, 77], dtype=torch.int32)
    want = x.clone()
    for t, position in enumerate(positions.tolist()):
        for i in range(R // 2):
            angle = position * THETA ** (-2 * i / R)
            a, b = x[t, :, i], x[t, :, i + R // 2]
            want[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            want[t, :, i + R // 2] = b * math.cos(angle) + a * math.sin(angle)
    with backend(name):
        assert error(rotary(x, *rotary_table(positions, R, THETA, torch.float64)), want) <= 1e-14


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


@st.composite
def cases(draw):
    """x [T, H, D], a slice of something wider, how many dims turn, and the weight and eps of the norm, or neither."""
    T, H, half, rest = draw(st.integers(0, 11)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(0, 9))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # Normalised heads of one or two dims keep little but their signs, and the gradient is rounding noise.
    width = max(2 * half + rest, 4)
    x = torch.randn(T, H, width + draw(st.integers(0, 2)), generator=generator) * draw(st.sampled_from([0.1, 2.0]))
    weight = torch.randn(width, generator=generator).to(draw(st.sampled_from([torch.float32, dtype])))
    return x.to(dtype)[..., :width], weight if draw(st.booleans()) else None, draw(st.sampled_from([1e-6, 0.1])), 2 * half


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=15)
def test_kernel_obeys_the_rule(check_rule, device, case):
    x, weight, eps, R = case
    inputs = [x.to(device), *([] if weight is None else [weight.to(device)])]
    check_rule(lambda x, w=None: turned(x, w, eps, R), inputs)


@pytest.mark.parametrize(("width", "R"), [(18, 18), (21, 18)])
def test_kernel_obeys_the_rule_where_a_tile_is_wider_than_half_a_head(check_rule, device, width, R):
    generator = torch.Generator().manual_seed(width)
    inputs = [torch.randn(*s, generator=generator).to(device) for s in ((5, 3, width), (width,))]
    check_rule(lambda x, w: turned(x, w, 1e-6, R), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("width", "R"), [(64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (256, 256), (128, 32), (80, 32)])
def test_kernel_obeys_the_rule_at_the_head_dims_of_models(check_rule, device, width, R, norm):
    generator = torch.Generator().manual_seed(width)
    inputs = [torch.randn(*s, generator=generator).to(device) for s in ((6, 3, width), (width,))[: 1 + norm]]
    check_rule(lambda x, w=None: turned(x, w, 1e-6, R), [t.bfloat16() for t in inputs])


@pytest.mark.slow
@given(case=cases(), layouts=st.tuples(LAYOUTS, LAYOUTS))
def test_strides_change_nothing(check_layouts, device, case, layouts):
    x, weight, eps, R = case
    inputs = [x.to(device), *([] if weight is None else [weight.to(device)])]
    check_layouts(
        lambda x, w=None: turned(x, w, eps, R), inputs, [layouts[0], *(["contiguous"] if weight is not None else []), layouts[1]]
    )


def test_queries_and_keys_are_read_where_a_packed_projection_left_them(device, monkeypatch):
    qkv, cos, sin = torch.randn(5, (3 + 2 * 2) * 16, device=device), *table(5, 16, device=device)
    q, k = (t.unflatten(-1, (-1, 16)) for t in qkv.split([48, 32, 32], -1)[:2])
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t if t.is_contiguous() else pytest.fail("a copy"))
    with backend("triton"):
        got = rotary(q, cos, sin), rotary(k, cos, sin)
    for g, x in zip(got, (q, k), strict=True):
        assert g.is_contiguous()
        assert torch.equal(g, rotary_reference(x, cos, sin))


@given(case=cases())
def test_torch_is_the_reference_in_float64(error, case):
    x, weight, eps, R = case
    results = []
    for name in ("torch", "reference"):
        leaves = [t.double().requires_grad_() for t in (x, weight) if t is not None]
        with backend(name):
            y = turned(*leaves, *([] if weight is not None else [None]), eps, R)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want, floor=1e-3) < 1e-12


@pytest.mark.slow
def test_gradients_by_gradcheck():
    x, w = torch.randn(4, 2, 7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64, requires_grad=True)
    for name in ("torch", "reference"):
        with backend(name):
            assert torch.autograd.gradcheck(lambda x, w: turned(x, w, 0.1, 4), (x, w))
            assert torch.autograd.gradcheck(lambda x: turned(x, None, 0.1, 4), (x,))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_the_gradient_is_the_rotation_back(error, device, name):
    x = torch.randn(6, 3, D, device=device, requires_grad=True)
    with backend(name):
        gradient = torch.autograd.grad(turned(x), x, turned(x.detach()))[0]
    assert error(gradient, x.detach()) <= 1e-6


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_bf16_is_rounded_once(device, name):
    x, w = torch.randn(4, 2, D, device=device).bfloat16(), torch.randn(D, device=device).bfloat16()
    with backend(name):
        for weight in (None, w):
            got = turned(x, weight)
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, turned(x.float(), weight).bfloat16())


@pytest.mark.parametrize("name", ["triton", "torch", "reference"])
def test_the_norm_is_rms_norm_of_each_head(error, device, name):
    x, w = torch.randn(5, 3, D, device=device), torch.randn(D, device=device)
    with backend(name):
        assert error(turned(x, w, 0.3), turned(rms_norm(x, w, 0.3))) <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the division by zero that is asked for
def test_without_eps_the_padding_of_a_tile_stays_out_of_the_gradient(device):
    x, w = torch.randn(5, 3, D, device=device, requires_grad=True), torch.randn(D, device=device, requires_grad=True)
    with backend("triton"):
        assert all(g.isfinite().all() for g in torch.autograd.grad(turned(x, w, 0.0).sum(), (x, w)))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device, norm):
    inputs = [torch.randn(19, 2, 6, device=device), *([torch.randn(6, device=device)] if norm else [])]
    check_grid_order(lambda x, w=None: turned(x, w, 1e-6, 4), inputs)


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    x, w = torch.randn(6, 3, 12, device=device, requires_grad=True), torch.randn(12, device=device, requires_grad=True)
    cos, sin = table(6, 8, device=device)
    check_operator(lambda x, w: rotary(x, cos, sin) + rotary(x, cos, sin, w, 1e-6), [x, w])
    torch.library.opcheck(_rotary, (x, cos, sin, None, 1e-6, "triton"))
    torch.library.opcheck(_rotary, (x, cos, sin, w, 1e-6, "triton"))


def test_wider_heads_than_a_program_holds_run_in_torch(device, error):
    x = torch.randn(3, 2, MAX_HEAD_DIM + 2, device=device)
    with backend("triton"):
        got = turned(x)
    with backend("reference"):
        assert error(got, turned(x)) < 1e-6


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 1), (2, 1)), r"x \(2, 3\)"),
        (((2, 1, 4), (3, 2), (3, 2)), r"cos \(3, 2\)"),
        (((2, 1, 4), (2, 3), (2, 3)), r"cos \(2, 3\)"),
        (((2, 1, 4), (2, 0), (2, 0)), r"cos \(2, 0\)"),
        (((2, 1, 4), (2, 2), (2, 1)), r"sin \(2, 1\)"),
        (((2, 1, 4), (2, 2), (2, 2), (3,)), r"norm_weight \(3,\)"),
    ],
)
def test_bad_arguments_are_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        rotary(*(torch.ones(shape) for shape in shapes))
