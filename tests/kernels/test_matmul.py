import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend
from smalt.kernels.launch import Config, configuration
from smalt.kernels.matmul import _matmul, _matmul_bias, _matmul_weight, matmul, matmul_reference

# The package exports a function of the module's name.
module = sys.modules["smalt.kernels.matmul"]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def layouts(x):
    """The same matrix as users bring it: on its own, off alignment, a slice of something wider, transposed, every other column."""
    T, K = x.shape
    spaces = [
        x.new_empty(T * K + 1)[1:].view(T, K),
        x.new_empty(T, K + 3)[:, 1 : K + 1],
        x.new_empty(K, T).t(),
        x.new_empty(T, K, 2)[..., 0],
    ]
    return [x.clone(), *(space.copy_(x) for space in spaces)]


@st.composite
def cases(draw, rows=40, size=70):
    """x in any layout and with leading dims; weight as it is, transposed or strided in both dims; with a bias or without."""
    T, K, N = draw(st.integers(0, rows)), draw(st.integers(1, size)), draw(st.integers(1, size))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = draw(st.sampled_from(layouts(torch.randn(T, K, generator=generator).to(dtype))))
    if draw(st.booleans()):
        x = x[: T // 2 * 2].unflatten(0, (2, T // 2))
    weight = draw(st.sampled_from(layouts(torch.randn(N, K, generator=generator).to(dtype))))
    return x, weight, torch.randn(N, generator=generator).to(dtype) if draw(st.booleans()) else None


def call(x, weight, bias=None):
    return matmul(x, weight, bias)


@pytest.mark.slow
@given(case=cases())
def test_kernel_obeys_the_rule(check_rule, device, case):
    check_rule(call, [t.to(device) for t in case if t is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_obeys_the_rule_once(check_rule, device, dtype):
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((2, 9, 37), (35, 37), (35,)))
    check_rule(call, [x, weight, bias])


@given(case=cases())
def test_torch_is_the_reference_in_float64(error, case):
    results = []
    for name in ("torch", "reference"):
        leaves = [t.detach().double().requires_grad_() for t in case if t is not None]
        with backend(name):
            y = matmul(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got, want, floor=1e-3) < 1e-12


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(device, name, autocast):
    x, w, b = (torch.randn(s, device=device) for s in ((9, 37), (35, 37), (35,)))
    with backend(name):
        want = matmul(x, w, b)
        with torch.autocast(device, autocast):
            assert torch.equal(matmul(x, w, b), want)


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_a_sum_of_nothing_is_the_bias(device, name):
    x, w = torch.empty(2, 5, 0, device=device, requires_grad=True), torch.empty(3, 0, device=device, requires_grad=True)
    bias = torch.randn(3, device=device, requires_grad=True)
    with backend(name):
        assert torch.equal(matmul(x, w), torch.zeros(2, 5, 3, device=device))
        y = matmul(x, w, bias)
        dx, dw, db = torch.autograd.grad(y.sum(), (x, w, bias))
    assert torch.equal(y, bias.expand(2, 5, 3))
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    assert torch.equal(db, torch.full_like(bias, 10.0))


def test_a_tensor_without_memory_has_a_reference():
    with backend("reference"):
        assert matmul(torch.empty(9, 37, device="meta"), torch.empty(35, 37, device="meta")).shape == (9, 35)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_bias_is_added_before_the_rounding(device, name):
    x, w, b = (torch.randn(s, generator=torch.Generator().manual_seed(3)).bfloat16() for s in ((40, 64), (48, 64), (48,)))
    x, w, b = x.to(device), w.to(device), b.to(device)
    with backend(name):
        got = matmul(x, w, b)
    # fp32 tips few roundings over; a product that is rounded by itself tips a fourth.
    assert (got != matmul_reference(x.double(), w.double(), b.double()).bfloat16()).double().mean() < 0.02


def assert_rows_are_invariant(function, x, low, high):
    """function(x)[low:high] has the bits of function(x[low:high]) in any layout, and of one row alone, and of a row repeated."""
    whole = function(x)
    assert not whole.isnan().any()
    for i, part in enumerate(layouts(x[low:high])):
        assert torch.equal(function(part), whole[low:high]), f"rows {low} to {high} of {len(x)} differ, in layout {i}"
    assert torch.equal(function(x[low : low + 1]), whole[low : low + 1]), f"row {low} of {len(x)} differs when it is alone"
    repeated = function(x[low : low + 1].expand_as(x))
    assert torch.equal(repeated, whole[low : low + 1].expand_as(whole)), f"row {low} of {len(x)} differs by its position"


def forward_and_backward(weight, bias, name):
    """A function of the rows: y, and dx for dy = the first columns of a fixed random product of the rows."""

    def function(x):
        with backend(name):
            leaf = x.detach().requires_grad_()
            y = matmul(leaf, weight, bias)
            # The upstream gradient of a row depends on this row only.
            (dx,) = torch.autograd.grad(y, leaf, y.detach() * 0.5)
        return torch.cat([y.detach(), dx], 1)

    return function


@st.composite
def companies(draw, dtypes, rows, size):
    T, K, N = draw(st.integers(1, rows)), draw(st.integers(1, size)), draw(st.integers(1, size))
    low = draw(st.integers(0, T - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(dtypes)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((T, K), (N, K), (N,)))
    return x, draw(st.sampled_from(layouts(weight))), bias if draw(st.booleans()) else None, low, draw(st.integers(low + 1, T))


@pytest.mark.slow
@given(case=companies(DTYPES, rows=40, size=70))
def test_rows_of_the_kernel_do_not_know_of_each_other(device, case):
    x, weight, bias, low, high = case
    bias = None if bias is None else bias.to(device)
    assert_rows_are_invariant(forward_and_backward(weight.to(device), bias, "triton"), x.to(device), low, high)


@given(case=companies(st.one_of(DTYPES, st.just(torch.float64)), rows=200, size=300))
def test_rows_of_torch_do_not_know_of_each_other(case):
    x, weight, bias, low, high = case
    assert_rows_are_invariant(forward_and_backward(weight, bias, "torch"), x, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("K", "N"), [(2560, 6912), (691, 2561), (2561, 17), (31, 4097), (2561, 1), (64, 64)])
def test_rows_of_torch_do_not_know_of_each_other_at_full_size(K, N, dtype, threads):
    if K * N > 1 << 22 and dtype in (torch.float16, torch.float64):
        pytest.skip("takes minutes on a CPU")
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, K, generator=generator).to(dtype), torch.randn(N, K, generator=generator).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for low, high in ((3, 35), (67, 100)):
            assert_rows_are_invariant(forward_and_backward(weight, None, "torch"), x, low, high)
    finally:
        torch.set_num_threads(before)


def test_torch_calls_blas_in_one_way_whatever_the_rows(monkeypatch):
    calls, mm = set(), torch.mm

    def seen(a, b, out):
        calls.add((*a.shape, *a.stride(), a.data_ptr() % 64, *b.shape, *b.stride(), b.data_ptr() % 64, *out.shape, *out.stride()))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    weight = torch.randn(17, 33)
    for rows in (1, 31, 32, 64, 100):
        for x in layouts(torch.randn(rows, 33)):
            module.torch_matmul(x, weight, None)
    assert calls == {(32, 64, 64, 1, 0, 64, 32, 1, 64, 0, 32, 32, 32, 1)}


def _tiles_by_rows(name, size, x):
    config = configuration(name, size, x)
    return Config({**config.tiles, "BLOCK_K": 4}, 4, 1) if name == "matmul" and len(x) < 20 else config


def _split_sum(product):
    def split(x, weight, bias):
        half = x.shape[1] // 2
        if len(x) >= 20:
            return product(x, weight, bias)
        return product(x[:, :half], weight[:, :half], bias) + product(x[:, half:], weight[:, half:], None)

    return split


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["tiles", "split", "split in torch", "unpadded"])
def test_a_sum_that_depends_on_the_number_of_rows_is_caught(monkeypatch, device, fault):
    if fault == "tiles":
        monkeypatch.setattr(module, "configuration", _tiles_by_rows)
    elif fault == "split":
        monkeypatch.setattr(module, "launch_matmul", _split_sum(module.launch_matmul))
    elif fault == "split in torch":
        monkeypatch.setattr(module, "torch_matmul", _split_sum(module.torch_matmul))
    else:
        # What a BLAS may do with few rows, and MKL does: another order of summation.
        monkeypatch.setattr(module, "torch_matmul", lambda x, w, b: x @ w.t() if len(x) >= 20 else (x.flip(1) @ w.t().flip(0)))
    x, weight = torch.randn(40, 64, device=device), torch.randn(48, 64, device=device)
    name = "triton" if fault in ("tiles", "split") else "torch"
    with pytest.raises(AssertionError, match="differ"):
        assert_rows_are_invariant(forward_and_backward(weight, None, name), x, 3, 12)


@pytest.mark.slow
def test_weight_gradient_is_the_same_every_time_in_any_layout(device):
    x, dy = torch.randn(37, 40, device=device), torch.randn(37, 24, device=device)
    for name in ("triton", "torch"):
        first = _matmul_weight(dy, x, name), _matmul_bias(dy, name)
        for dy_again, x_again in zip(layouts(dy), layouts(x), strict=True):
            assert torch.equal(_matmul_weight(dy_again, x_again, name), first[0])
            assert torch.equal(_matmul_bias(dy_again, name), first[1])


def test_only_the_gradients_that_are_asked_for_are_formed(monkeypatch, device):
    for name in ("launch_weight", "launch_bias"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("not asked for"))
    x, w = torch.randn(6, 24, device=device, requires_grad=True), torch.randn(8, 24, device=device)
    with backend("triton"):
        matmul(x, w, torch.zeros(8, device=device)).sum().backward()
    assert x.grad is not None


def test_more_tiles_than_one_group_of_rows(device, error):
    # 8 row blocks share a pass over the weight; 21 blocks are two groups and a part of one.
    x, w = torch.randn(325, 16, device=device), torch.randn(40, 16, device=device)
    with backend("triton"):
        assert error(matmul(x, w), matmul_reference(x, w, None)) < 1e-5


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    x, w, b = torch.randn(29, 40, device=device), torch.randn(36, 40, device=device), torch.randn(36, device=device)
    check_grid_order(matmul, [x, w, b])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    x, w, b = torch.randn(2, 3, 24, device=device), torch.randn(8, 24, device=device), torch.randn(8, device=device)
    check_operator(matmul, [x, w, b])
    torch.library.opcheck(_matmul, (x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), "triton"))
    torch.library.opcheck(_matmul_weight, (torch.randn(6, 8, device=device), torch.randn(6, 24, device=device), "triton"))
    torch.library.opcheck(_matmul_bias, (torch.randn(6, 8, device=device), "triton"))


def test_reference_by_gradcheck():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,)))
    assert torch.autograd.gradcheck(matmul_reference, (x, w, b))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 2)), r"weight \(4, 2\)"),
        ((torch.ones(2, 3), torch.ones(3)), r"weight \(3,\)"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"bias \(3,\)"),
        ((torch.ones(2, 3), torch.ones(4, 3).half()), "weight torch.float16; expected one dtype"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).half()), "bias torch.float16"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        matmul(*arguments)
