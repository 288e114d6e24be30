"""The loss of the head: per-token gradients, rows without a label, memory, autocast; the statistics have tests of their own."""

import importlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smalt.kernels import IGNORE, backend, linear_cross_entropy, linear_statistics

from .addresses import unwatched

head = importlib.import_module("smalt.kernels.head")
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 3.0, "z_loss": 0.1}, {"z_loss": 1e-2}]
NAMES = ["reference", "torch", "triton"]


def problem(T, D, V, ignored, dtype, seed):
    """hidden [T, D], weight [V, D], labels, and an upstream gradient that differs from token to token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels, torch.randn(T, generator=generator, dtype=torch.float64)


def outputs(hidden, weight, labels, upstream, name="torch", **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with backend(name):
        nll = linear_cross_entropy(hidden, weight, labels, **options)
    return nll.detach(), torch.autograd.grad(nll, (hidden, weight), upstream.to(nll))


def truth(hidden, weight, labels, upstream, **options):
    return outputs(hidden.double(), weight.double(), labels, upstream, "reference", **options)


@given(
    T=st.integers(0, 40),
    D=st.integers(1, 9),
    V=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_elements=st.sampled_from([1, 70, 1 << 22]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
)
@example(T=40, D=4, V=10, ignored=0.0, chunk_elements=100, dtype=torch.float64, options={}, seed=0)  # pieces of equal size
def test_torch_against_the_definition(error, gradient_error, T, D, V, ignored, chunk_elements, dtype, options, seed):
    args = problem(T, D, V, ignored, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_ELEMENTS", chunk_elements)
        nll, gradients = outputs(*args, **options)
    want, want_gradients = truth(*args, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert nll.dtype == dtype
    assert error(nll, want, floor=1.0) <= tolerance
    assert gradient_error(gradients, want_gradients) <= tolerance


def check_kernel(check_rule, device, T, D, V, ignored, dtype, options, seed):
    hidden, weight, labels, _ = problem(T, D, V, ignored, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MIN_CHUNK", 32)
        check_rule(lambda h, w, y: linear_cross_entropy(h, w, y, **options), [hidden.to(device), weight.to(device), labels.to(device)])


@pytest.mark.parametrize("options", OPTIONS)
def test_kernel_obeys_the_rule(check_rule, device, options):
    check_kernel(check_rule, device, 20, 9, 40, 0.3, torch.float32, options, 0)


@pytest.mark.slow
@given(
    T=st.integers(0, 40),
    D=st.integers(1, 40),
    V=st.integers(1, 80),
    ignored=st.sampled_from([0.0, 0.4, 0.95, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_kernel_obeys_the_rule_everywhere(check_rule, device, T, D, V, ignored, dtype, options, seed):
    check_kernel(check_rule, device, T, D, V, ignored, dtype, options, seed)


def test_one_row_by_hand(error):
    hidden, weight, labels, _ = problem(1, 5, 7, 0.0, torch.float64, 2)
    logits = torch.stack([2.0 * torch.tanh(hidden[0] @ row / 2.0) for row in weight]) / 0.5
    total = logits.exp().sum()
    want = -torch.log(logits[labels[0]].exp() / total) + 0.1 * total.log() ** 2
    for name in ("reference", "torch"):
        got = outputs(hidden, weight, labels, torch.ones(1), name, temperature=0.5, softcap=2.0, z_loss=0.1)[0]
        assert error(got[0], want) <= 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_hide_nothing_and_get_nothing(name, device):
    args = [x.to(device) for x in problem(40, 5, 40, 0.3, torch.float32, 1)]
    hidden, weight, labels, upstream = args
    labels[16:33] = IGNORE  # a block of rows of the kernel, and a bit more
    ignored = labels == IGNORE
    nll, (d_hidden, d_weight) = outputs(*args, name, z_loss=0.1)
    assert torch.equal(nll == 0, ignored)
    assert torch.equal((d_hidden == 0).all(1), ignored)
    _, (_, alone) = outputs(hidden[~ignored], weight, labels[~ignored], upstream[~ignored], name, z_loss=0.1)
    torch.testing.assert_close(d_weight, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_all_rows_ignored(name, device):
    args = [x.to(device) for x in problem(6, 5, 7, 1.0, torch.float32, 1)]
    args[0] = args[0] * 1e4  # what is skipped must not come back as exp(large)
    nll, gradients = outputs(*args, name, z_loss=0.1)
    for x in (nll, *gradients):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered")  # by the interpreter, in what is then thrown away
@pytest.mark.parametrize("wide", ["forward", "backward"])
def test_a_block_may_be_skipped_in_one_pass_only(wide, device, monkeypatch):
    # With logits this low, p of such rows would be exp(0 - lse) = inf, or exp(z - -inf) = inf.
    hidden, weight, labels, upstream = (x.to(device) for x in problem(32, 5, 20, 0.0, torch.float32, 1))
    labels[16:], weight, hidden[16:] = IGNORE, weight.abs() + 1.0, -1e3
    kernels = importlib.import_module("smalt.kernels.linear_statistics_kernels")
    configuration = kernels.configuration

    def wider(kernel, size, x):
        config = configuration(kernel, size, x)
        return type(config)({**config.tiles, "BLOCK_T": 32}, 4, 1) if kernel.endswith(wide) else config

    want = outputs(hidden, weight, labels, upstream, "triton")
    monkeypatch.setattr(kernels, "configuration", wider)
    nll, gradients = outputs(hidden, weight, labels, upstream, "triton")
    assert torch.equal(nll, want[0])
    for got, wanted in zip(gradients, want[1], strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_do_not_overflow(error, name, device):
    hidden, weight, labels, upstream = (x.to(device) for x in problem(8, 5, 40, 0.0, torch.float32, 1))
    args = hidden * 1e3, weight, labels, upstream
    nll, gradients = outputs(*args, name)
    assert error(nll, truth(*args)[0]) <= 1e-5
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("scale", [0.25, 0.03])
def test_bf16_is_as_good_as_torch(error, monkeypatch, scale):
    # With small weights the logits are nearly exact, and a log-sum-exp that is rounded to bf16 shows.
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * 96)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_product_with_fp32_weight(error, name, autocast, device):
    hidden, weight, labels, upstream = (x.to(device) for x in problem(30, 16, 20, 0.2, torch.float32, 4))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        got = outputs(hidden if autocast else hidden.bfloat16(), weight, labels, upstream, name)
    want = truth(hidden.bfloat16(), weight.bfloat16(), labels, upstream)
    exact = truth(hidden, weight, labels, upstream)
    nll, (d_hidden, d_weight) = got
    assert (nll.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.float32 if autocast else torch.bfloat16, torch.float32)
    for x, wanted, unrounded in zip((nll, d_hidden, d_weight), (want[0], *want[1]), (exact[0], *exact[1]), strict=True):
        assert error(x, wanted) <= 0.02
        assert error(x, unrounded) > 1e-4  # the product was formed in bf16
    if name == "triton":  # and the gradient of the fp32 weight was not
        assert not torch.equal(d_weight, d_weight.bfloat16().float())


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 12)
    hidden, weight, labels, _ = problem(7, 3, 4, 0.3, torch.float64, 9)
    with backend(name):
        check = lambda h, w: linear_cross_entropy(h, w, labels, z_loss=0.1, temperature=0.8, softcap=2.0)  # noqa: E731
        assert torch.autograd.gradcheck(check, (hidden.requires_grad_(), weight.requires_grad_()), fast_mode=True)


def test_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * 20)
    hidden, weight, labels, upstream = problem(33, 4, 20, 0.2, torch.float64, 9)
    rows = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: rows.append(a.shape[0]) or matmul(a, b))
    outputs(hidden, weight, labels, upstream)
    assert len(rows) > 6
    assert max(r for r in rows if r != weight.shape[0]) <= 5


@pytest.mark.slow
def test_liger_gives_the_same(error, gradient_error, device):
    pytest.importorskip("liger_kernel")
    args = [x.to(device) for x in problem(20, 8, 30, 0.3, torch.float32, 3)]
    for options in ({}, {"z_loss": 0.1}, {"temperature": 0.7}):
        with unwatched("liger"):
            nll, gradients = outputs(*args, "liger", **options)
        want, want_gradients = truth(*args, **options)
        assert error(nll, want) < 1e-5
        assert gradient_error(gradients, want_gradients) < 1e-5


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    hidden, weight, labels, _ = (x.to(device) for x in problem(20, 8, 40, 0.3, torch.float32, 3))
    check_grid_order(linear_cross_entropy, [hidden, weight, labels])


def test_a_label_out_of_range_is_an_error():
    hidden, weight, labels, _ = problem(5, 4, 6, 0.0, torch.float32, 0)
    for bad in (6, -1, -101, 1 << 40):
        labels[3] = bad
        with pytest.raises(ValueError, match=f"linear_cross_entropy: the label of row 3 is {bad}; expected 0 to 5, or -100"):
            linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_statistics])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_labels_of_another_dtype_are_an_error_everywhere(function, name, dtype):
    hidden, weight, labels, _ = problem(5, 4, 6, 0.0, torch.float32, 0)
    message = f"^{function.__name__}: labels are {dtype}; expected torch.int64, pass labels.long()"
    with backend(name), pytest.raises(ValueError, match=message):
        function(hidden, weight, labels.to(dtype))


@pytest.mark.slow
def test_a_label_out_of_range_gives_nan_where_it_cannot_be_looked_at():
    hidden, weight, labels, _ = problem(5, 4, 6, 0.0, torch.float32, 0)
    labels[3] = 6
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for name in ("torch", "triton"):
        with backend(name):
            assert compiled(hidden, weight, labels).isnan().tolist() == [False, False, False, True, False]


@pytest.mark.slow
def test_compiles_whole(check_operator, device):
    hidden, weight, labels, _ = (x.to(device) for x in problem(9, 6, 20, 0.3, torch.float32, 0))
    check_operator(lambda h, w, y: linear_cross_entropy(h, w, y, z_loss=0.1), [hidden, weight, labels])


def test_wrong_arguments_are_named():
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
    for name, value in (("temperature", 0.0), ("softcap", 0.0)):
        with pytest.raises(ValueError, match=f"{name} is 0.0; it must be positive"):
            linear_cross_entropy(hidden, weight, labels, **{name: value})
