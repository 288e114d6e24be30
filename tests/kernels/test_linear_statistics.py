"""The head's statistics: kernel, plain torch and definition; shards; what a row may depend on; what is loaded and stored."""

import importlib
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from smalt.kernels import IGNORE, backend, linear_cross_entropy, linear_statistics, merge_statistics
from smalt.kernels.launch import INTERPRET, configuration
from smalt.kernels.linear_statistics import HeadStatistics, _linear_statistics, linear_statistics_reference
from smalt.kernels.linear_statistics_kernels import backward_traffic, forward_traffic

head = importlib.import_module("smalt.kernels.head")
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SCALES = st.sampled_from([(1.0, None), (0.7, None), (1.0, 2.0), (1.6, 5.0)])


@contextmanager
def small_chunks():
    """Vocabularies of a test in several chunks of the backward pass, and rows in several pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MIN_CHUNK", 32)
        patch.setattr(head, "CHUNK_ELEMENTS", 300)
        yield


def problem(T, D, V, seed=0, ignored=0.3, padding=0):
    """hidden [T, D] and weight [V, D] with rows that may be padded, labels of which some are IGNORE."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D + padding, generator=generator)[:, :D] for n in (T, V))
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = IGNORE
    return hidden, weight, labels


def differentiable(statistics):
    return statistics.lse, statistics.target, statistics.mean, statistics.maximum


@st.composite
def cases(draw, rows=40, width=40, words=80):
    shape = draw(st.integers(1, rows)), draw(st.integers(1, width)), draw(st.integers(1, words))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    hidden, weight, labels = problem(*shape, draw(st.integers(0, 99)), ignored, draw(st.integers(0, 3)))
    dtype = draw(DTYPES)
    weight = weight.to(draw(st.sampled_from([dtype, torch.float32])))
    return (hidden.to(dtype), weight, labels), draw(st.sampled_from([0, 5])), draw(SCALES)


def check_kernel(check_rule, device, case):
    (hidden, weight, labels), start, (temperature, softcap) = case
    options = {"temperature": temperature, "softcap": softcap, "vocab_start": start, "vocabulary": start + 100}

    def run(hidden, weight, labels):
        return differentiable(linear_statistics(hidden, weight, labels, **options))

    with small_chunks():
        check_rule(run, [hidden.to(device), weight.to(device), labels.to(device)])


@given(case=cases(20, 20, 40))
@settings(max_examples=4)
def test_kernel_obeys_the_rule(check_rule, device, case):
    check_kernel(check_rule, device, case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=25)
def test_kernel_obeys_the_rule_everywhere(check_rule, device, case):
    check_kernel(check_rule, device, case)


@given(case=cases())
def test_torch_is_the_reference_in_float64(error, gradient_error, case):
    (hidden, weight, labels), start, (temperature, softcap) = case
    results = []
    for name in ("torch", "reference"):
        leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
        with backend(name), small_chunks():
            s = linear_statistics(*leaves, labels, temperature=temperature, softcap=softcap, vocab_start=start, vocabulary=start + 100)
        loss = (s.lse.sin() + s.target.cos() * 2 + s.mean.square()).sum()
        results.append((s, torch.autograd.grad(loss, leaves)))
    (got, got_gradients), (want, want_gradients) = results
    for g, w in zip(differentiable(got), differentiable(want), strict=True):
        assert error(g, w, floor=1.0) < 1e-12
    assert torch.equal(got.argmax, want.argmax)
    assert gradient_error(got_gradients, want_gradients) < 1e-12


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 1.5)])
def test_reference_by_gradcheck(temperature, softcap):
    hidden, weight, labels = problem(4, 3, 5)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_statistics_reference(h, w, labels, 0, temperature, softcap)[:3], leaves, check_undefined_grad=False
    )


def test_reference_by_hand(error):
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in problem(3, 4, 6, ignored=0.0))
    z = 2.0 * torch.tanh((hidden @ weight.T) / 2.0) / 0.7
    p = z.exp() / z.exp().sum(1, keepdim=True)
    for name in ("reference", "torch"):
        with backend(name):
            s = linear_statistics(hidden, weight, labels, temperature=0.7, softcap=2.0)
        assert error(s.logprob, p[range(3), labels].log()) < 1e-14
        assert error(s.nll, -s.logprob) == 0
        assert error(s.entropy, -(p * p.log()).sum(1)) < 1e-14
        assert torch.equal(s.argmax, p.argmax(1))
        assert error(s.maximum, z.amax(1)) < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("outputs", [("lse",), ("target",), ("mean",), ("target", "mean")])
def test_a_loss_may_use_some_of_the_statistics(name, outputs, gradient_error, device):
    hidden, weight, labels = (x.to(device) for x in problem(20, 9, 40))
    gradients = []
    for implementation in (name, "reference"):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with backend(implementation), small_chunks():
            s = linear_statistics(*leaves, labels)
        gradients.append(torch.autograd.grad(sum(getattr(s, x).sin().sum() for x in outputs), leaves))
    assert gradient_error(*gradients) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_one_gradient_is_asked_for(name, wanted, device):
    hidden, weight, labels = (x.to(device) for x in problem(20, 9, 40))
    with backend(name):
        both = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        want = torch.autograd.grad(linear_statistics(*both, labels).lse.sum(), both)[wanted]
        one = [hidden, weight]
        one[wanted] = one[wanted].detach().requires_grad_()
        assert torch.equal(torch.autograd.grad(linear_statistics(*one, labels).lse.sum(), one[wanted])[0], want)


def shards_of(hidden, weight, labels, cuts, **options):
    bounds = [0, *cuts, weight.shape[0]]
    return merge_statistics(
        [
            linear_statistics(hidden, weight[low:high], labels, vocab_start=low, vocabulary=weight.shape[0], **options)
            for low, high in itertools.pairwise(bounds)
        ]
    )


CUTS = [(), (37,), (1, 16, 50)]
SLOW_CUTS = [pytest.param(cuts, marks=pytest.mark.slow) for cuts in CUTS[:2]]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_shards_merge_in_float64(name, cuts, error, gradient_error):
    hidden, weight, labels = problem(30, 8, 61)
    labels[:6] = torch.tensor([0, 1, 36, 37, 49, 60])  # at the borders
    hidden, weight = hidden.double(), weight.double()
    results = []
    for implementation, cut in ((name, cuts), ("reference", ())):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with backend(implementation):
            s = shards_of(*leaves, labels, cut, temperature=1.3, softcap=4.0)
        loss = (s.nll.sin() + s.entropy.square() + s.lse.cos()).sum()
        results.append((s, torch.autograd.grad(loss, leaves)))
    (got, got_gradients), (want, want_gradients) = results
    for g, w in zip(differentiable(got), differentiable(want), strict=True):
        assert error(g, w, floor=1.0) < 1e-12
    assert torch.equal(got.argmax, want.argmax)
    assert gradient_error(got_gradients, want_gradients) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [*SLOW_CUTS, CUTS[2]])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_shards_merge_in_the_kernel(check_rule, device, cuts, dtype):
    hidden, weight, labels = problem(30, 8, 61)
    labels[:6] = torch.tensor([0, 1, 36, 37, 49, 60])
    inputs = [hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)]
    check_rule(lambda h, w, y: differentiable(shards_of(h, w, y, cuts)), inputs)


def test_merging_does_not_mind_shards_of_nothing():
    def shard(lse, mean, argmax):
        lse, mean = torch.tensor(lse).requires_grad_(), torch.tensor(mean).requires_grad_()
        return HeadStatistics(lse, torch.zeros(2), mean, lse.detach(), torch.tensor(argmax))

    for order in (1, -1):
        full, nothing = shard([1.5, -torch.inf], [0.5, 0.0], [7, 8]), shard([-torch.inf] * 2, [0.0] * 2, [0, 0])
        merged = merge_statistics([full, nothing][::order])
        assert merged.lse.tolist() == [1.5, -torch.inf]
        assert merged.mean.tolist() == [0.5, 0.0]
        assert merged.argmax[0] == 7
        gradients = torch.autograd.grad(merged.mean.sum() + merged.lse[0], (full.lse, full.mean, nothing.lse, nothing.mean))
        assert [g.tolist() for g in gradients] == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ValueError, match="no shards"):
        merge_statistics([])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_of_equal_logits_the_lowest_word_is_the_argmax(name, device):
    hidden, weight = torch.ones(5, 4, device=device), torch.zeros(70, 4, device=device)
    labels = torch.full((5,), IGNORE, device=device)
    with backend(name):
        assert linear_statistics(hidden, weight, labels, vocab_start=3).argmax.tolist() == [3] * 5
        for words in ((21, 22), (13, 20), (20, 44)):  # in a half of a tile, in a slice, in two
            weight.zero_()[list(words)] = 1.0
            assert linear_statistics(hidden, weight, labels).argmax.tolist() == [words[0]] * 5
        assert shards_of(hidden, weight, labels, (21, 44)).argmax.tolist() == [20] * 5
        negative = linear_statistics(-hidden, weight.fill_(1.0).index_fill_(0, torch.tensor([33], device=device), 0.5), labels)
        assert negative.argmax.tolist() == [33] * 5
        assert negative.maximum.tolist() == [-2.0] * 5


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_large_logits_do_not_overflow(name, error, device):
    hidden, weight, labels = (x.to(device) for x in problem(20, 5, 40, ignored=0.0))
    hidden = (hidden * 1e4).requires_grad_()
    with backend(name):
        s = linear_statistics(hidden, weight, labels)
        g = torch.autograd.grad((s.nll + s.entropy).sum(), hidden)[0]
    want = linear_statistics_reference(hidden.double(), weight.double(), labels, 0, 1.0, None)
    for got, wanted in zip(differentiable(s), differentiable(want), strict=True):
        assert error(got, wanted) < 1e-6
    assert g.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_the_softcap_leaves_scores_of_any_size_their_digits(name, device):
    """Each score by itself, from far below the cap, where it is the score, to far above, where it is the cap."""
    # At 0.75 the kernel turns from one form of tanh to the other.
    x = torch.cat([torch.logspace(-30, 2, 97), torch.linspace(0.5, 1.5, 31)])
    x = torch.cat([x, -x])[:, None].to(device)
    weight, labels = torch.tensor([[1.0], [0.0]], device=device), torch.zeros(len(x), dtype=torch.int64, device=device)
    with backend(name):
        got = linear_statistics(x, weight, labels, softcap=3.0).target.double()
    want = 3.0 * torch.tanh(x.squeeze(1).double() / 3.0)
    assert ((got - want).abs() <= 8 * 2**-24 * want.abs()).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # of the interpreter
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_score_of_minus_infinity_counts_for_nothing(name, error, device):
    hidden, labels = torch.full((3, 1), 1e20, device=device), torch.tensor([1, 2, IGNORE], device=device)
    weight = torch.tensor([[-1e20], [0.0], [1e-20]], device=device)  # scores of -1e40, which is infinity in fp32, 0, and 1
    results = []
    for implementation, dtype in ((name, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        with backend(implementation):
            s = linear_statistics(*leaves, labels)
        results.append([*differentiable(s), *torch.autograd.grad((s.nll + s.entropy).sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert error(got.detach(), want.detach()) < 1e-6


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_nan_stays_in_its_row_and_is_not_hidden(name, device):
    hidden, weight, labels = (x.to(device) for x in problem(20, 5, 40, ignored=0.0))
    hidden[3] = torch.nan
    with backend(name):
        s = linear_statistics(hidden, weight, labels)
        nll = linear_cross_entropy(hidden, weight, labels)
    for x in (s.lse, s.mean, nll):
        assert x.isnan().nonzero().tolist() == [[3]]
    assert s.argmax.min() >= 0
    assert s.argmax.max() < 40


@pytest.mark.slow
@pytest.mark.parametrize("nll_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_row_depends_on_no_other(nll_only, device):
    hidden, weight, labels = (x.to(device) for x in problem(19, 8, 40, ignored=0.0))
    rows = torch.tensor([3, 15, 16, 18])

    def run(hidden, labels):
        outputs = _linear_statistics(hidden, weight, labels, 0, 1.0, None, nll_only, "triton")
        return [x for x in outputs if x.numel()]

    alone = [x[rows] for x in run(hidden, labels)]
    other = torch.randn_like(hidden) * 9
    other[rows] = hidden[rows]
    ignored = torch.full_like(labels, IGNORE)
    ignored[rows] = labels[rows]
    moved = torch.roll(hidden, 5, 0), torch.roll(labels, 5)
    for results, where in (
        (run(other, labels), rows),
        (run(hidden, ignored), rows),
        (run(*moved), (rows + 5) % 19),
        (run(hidden[rows], labels[rows]), torch.arange(4)),
        (run(torch.cat([hidden, other]), torch.cat([labels, ignored])), rows),
    ):
        for got, want in zip(results, alone, strict=True):
            assert torch.equal(got[where], want)


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    hidden, weight, labels = (x.to(device) for x in problem(20, 8, 40))
    with small_chunks():
        check_grid_order(lambda h, w, y: differentiable(linear_statistics(h, w, y)), [hidden, weight, labels])


@pytest.mark.slow
def test_compiles_whole_and_registers_well(check_operator, device):
    hidden, weight, labels = (x.to(device) for x in problem(9, 6, 20))
    check_operator(lambda h, w, y: differentiable(linear_statistics(h, w, y, softcap=3.0)), [hidden, weight, labels])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for nll_only in (False, True):
        torch.library.opcheck(_linear_statistics, (*leaves, labels, 0, 0.7, 2.0, nll_only, "triton"))
        torch.library.opcheck(_linear_statistics, (*leaves, labels, 0, 0.7, 2.0, nll_only, "torch"))


def test_a_chunk_is_small_beside_the_logits_and_fixed_by_the_vocabulary():
    for vocabulary, itemsize in ((100_352, 2), (151_936, 2), (151_936, 4)):
        chunk = head.chunk_of_words(vocabulary, itemsize, 256)
        assert chunk % 256 == 0
        assert chunk * itemsize < 0.02 * vocabulary * 4
    assert head.chunk_of_words(100, 2, 256) == 256


@pytest.mark.parametrize("hip", [torch.version.hip, "6.4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_products_are_fp32(monkeypatch, error, device, dtype, hip):
    monkeypatch.setattr(torch.version, "hip", hip)
    a, b, total = (torch.randn(s, generator=torch.Generator().manual_seed(0)).to(device) for s in ((9, 40), (40, 7), (9, 7)))
    a, b, before = a.to(dtype), b.to(dtype), total.double()
    product = head._wide_product(a, b)
    head._add_wide_product(total, a, b)
    assert product.dtype == total.dtype == torch.float32
    assert error(product, a.double() @ b.double()) < 1e-6
    assert error(total, before + a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("hip", [None, "6.4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_torch_for_amd_is_not_asked_for_products_of_16_bits_in_fp32(monkeypatch, dtype, hip):
    asked = []

    def watched(function):
        def call(*args, out_dtype=None, **rest):
            return function(*args, **rest) if out_dtype is None else asked.append((function.__name__, out_dtype))

        return call

    monkeypatch.setattr(torch, "mm", watched(torch.mm))
    monkeypatch.setattr(torch, "addmm", watched(torch.addmm))
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():  # a GPU's tensors on any machine
        a, b = torch.empty(9, 40, dtype=dtype, device="cuda"), torch.empty(40, 7, dtype=dtype, device="cuda")
        head._wide_product(a, b)
        head._add_wide_product(torch.empty(9, 7, device="cuda"), a, b)
    wide = [("mm", torch.float32), ("addmm", torch.float32)]
    assert asked == (wide if dtype != torch.float32 and hip is None else [])


@contextmanager
def counted_bytes():
    """Inside, a list of one number: the bytes that kernels load and store in the interpreter."""
    if not INTERPRET:
        pytest.skip("loads and stores can only be counted in the interpreter")
    from triton.runtime import interpreter

    builder, total = interpreter.interpreter_builder, [0]
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers, mask):
        total[0] += int(np.broadcast_to(mask.data, pointers.data.shape).sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(pointers, mask, *rest):
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers, value, mask, *rest):
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield total


@pytest.mark.slow
@pytest.mark.parametrize(("T", "D", "V"), [(32, 32, 64), (37, 20, 75), (1, 5, 17)])
@pytest.mark.parametrize("nll_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_is_what_the_formula_says(T, D, V, nll_only, dtype):
    hidden, weight, labels = problem(T, D, V, ignored=0.0)
    leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    with small_chunks(), counted_bytes() as total:
        lse, _, mean, *_ = _linear_statistics(*leaves, labels, 0, 1.0, None, nll_only, "triton")
        size = hidden.to(dtype).element_size()
        tiles = configuration("linear_statistics_forward", D, leaves[0]).tiles
        assert total[0] == forward_traffic(T, V, D, size, tiles, nll_only)
        total[0] = 0
        torch.autograd.grad(lse.sum() + mean.sum(), leaves)
        tiles = configuration("linear_statistics_backward", D, leaves[0]).tiles
        chunk = head.chunk_of_words(V, size, tiles["BLOCK_V"])
        assert total[0] == backward_traffic(T, V, D, size, tiles, chunk, with_mean=not nll_only)


def test_bad_arguments_are_named():
    hidden, weight, labels = problem(5, 4, 6)
    for arguments, options, message in (
        ((hidden, weight[:, :3], labels), {}, r"linear_statistics: hidden \(5, 4\), weight \(6, 3\)"),
        ((hidden, weight[:0], labels), {}, "is empty"),
        ((hidden, weight, labels), {"temperature": 0.0}, "temperature is 0.0"),
        ((hidden, weight, labels), {"softcap": -1.0}, "softcap is -1.0"),
        ((hidden, weight, labels), {"vocab_start": 3, "vocabulary": 8}, "6 words from 3 on do not fit into a vocabulary of 8"),
        ((hidden, weight, labels.fill_(2).index_fill_(0, torch.tensor([1]), 9)), {"vocab_start": 3}, "row 1 is 9; expected 0 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_statistics(*arguments, **options)
