"""Interval attention in plain torch against the definition in float64, shards and their merging, and what the compiler sees."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from smalt.kernels import attention, attention_plan, backend, decode_attention, merge_attention
from smalt.kernels.attention import _attention, _attention_backward, intervals

from .intervals import CAUSAL, EMPTY, IMAGE, chunk, pack_intervals, packs, rising_bounds, tensors

module = importlib.import_module("smalt.kernels.attention")  # the package's attribute of this name is the function

cases = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(1, 1), (4, 2), (3, 1)]),
        "D": st.sampled_from([1, 6, 8]),
        "layout": st.sampled_from(["contiguous", "heads", "strided", "packed"]),
        "seed": st.integers(0, 1000),
    }
)
PLAIN = {"heads": (4, 2), "D": 8, "layout": "contiguous", "seed": 0}
options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([None, None, 0.1, 3.0]),
        "softcap": st.sampled_from([None, None, 0.5, 20.0]),
        "return_lse": st.booleans(),
    }
)
NO_OPTIONS = {"scale": None, "softcap": None, "return_lse": False}


def results(function, inputs, upstream, name):
    """Outputs of function(q, k, v) on a backend, and the gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend(name):
        outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, [upstream, upstream.to(outputs[-1].dtype)[..., 0]][: len(outputs)])
    return [y.detach() for y in outputs], list(gradients)


def agree(got, want, error, gradient_error):
    """Outputs and gradients to 1e-12; rows that see nothing alike."""
    for g, w in zip(got[0], want[0], strict=True):
        assert g.dtype == w.dtype
        finite = w.isfinite()
        assert torch.equal(g[~finite], w[~finite])
        assert error(g[finite], w[finite]) <= 1e-12
    assert gradient_error(got[1], want[1], floor=1e-2) <= 1e-12


def compare(bounds, S, case, given, error, gradient_error):
    *inputs, upstream = tensors(len(bounds[0]), S, **case)
    got, want = (results(lambda *qkv: attention(*qkv, *bounds, **given), inputs, upstream, name) for name in ("torch", "reference"))
    agree(got, want, error, gradient_error)
    empty = bounds[0] >= bounds[1]
    for outputs, gradients in (got, want):
        for x in (outputs[0][empty], gradients[0][empty]):
            assert torch.equal(x, torch.zeros_like(x))
        assert (outputs[-1][empty] == (float("-inf") if given["return_lse"] else 0)).all()


@given(pack=packs(), case=cases, given=options, query_rows=st.tuples(st.floats(0, 0.9), st.floats(0.1, 1)))
@example(pack=pack_intervals([], tail=40), case=PLAIN, given=NO_OPTIONS, query_rows=(0, 1))
@example(pack=pack_intervals([], tail=40), case=PLAIN, given=NO_OPTIONS | {"return_lse": True}, query_rows=(0, 1))
@example(pack=pack_intervals([[(1, CAUSAL)]] * 64), case=PLAIN, given=NO_OPTIONS, query_rows=(0, 1))
@example(pack=pack_intervals([[(3, CAUSAL), (40, IMAGE)]], tail=1), case=PLAIN, given=NO_OPTIONS, query_rows=(0.2, 0.5))
def test_blocks_are_the_definition_over_packs(pack, case, given, query_rows, error, gradient_error):
    # Context parallelism holds a slice of the rows, their intervals in the coordinates of all keys.
    T = len(pack[0])
    low = min(int(query_rows[0] * T), T - 1)
    rows = slice(low, max(low + 1, int(query_rows[1] * T)))
    compare((pack[0][rows], pack[1][rows]), T, case, given, error, gradient_error)


@given(T=st.integers(1, 70), S=st.integers(1, 90), seed=st.integers(0, 1000), case=cases, given=options)
def test_blocks_are_the_definition_over_any_rising_bounds(T, S, seed, case, given, error, gradient_error):
    compare(rising_bounds(T, S, seed), S, case, given, error, gradient_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_other_dtypes_come_as_near_as_they_can(name, dtype, error, gradient_error):
    bounds = pack_intervals([[(30, CAUSAL), (9, IMAGE)], [(1, CAUSAL)]], tail=3, window=20)
    *inputs, upstream = tensors(43, 43, (4, 2), 8, dtype)

    def function(q, k, v):
        return attention(q, k, v, *bounds, softcap=5.0, return_lse=True)

    (out, lse), gradients = results(function, inputs, upstream, name)
    want, want_gradients = results(function, [x.double() for x in inputs], upstream.double(), "reference")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    seen = lse.isfinite()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert error(out, want[0]) <= tolerance
    assert error(lse[seen], want[1][seen]) <= tolerance
    assert gradient_error(gradients, want_gradients, floor=1.0) <= 2 * tolerance


@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("S", [0, 3])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_nothing_to_see(T, S, name):
    *inputs, upstream = tensors(T, S, (4, 2), 3)
    empty = torch.zeros(T, dtype=torch.int32)
    for chosen in (NO_OPTIONS, {"softcap": 2.0, "return_lse": True}):
        outputs, gradients = results(lambda *qkv: attention(*qkv, empty, empty, **chosen), inputs, upstream, name)  # noqa: B023
        for got, like in zip((outputs[0], *gradients), (inputs[0], *inputs), strict=True):
            assert torch.equal(got, torch.zeros_like(like))
    assert torch.equal(outputs[1], torch.full((T, 4), float("-inf"), dtype=torch.float64))


@given(pack=packs(), poisoned=st.integers(0, 4))
def test_poison_stays_where_it_is(pack, poisoned):
    # NaN in the tail, and in all that one document holds, touches no other row.
    kv_start, kv_end = pack
    filled = kv_start < kv_end
    assume(filled.any())
    firsts = (filled & (kv_start >= torch.cat([torch.tensor([-1]), kv_end[:-1]]))).nonzero().flatten()
    document = torch.bucketize(torch.arange(len(kv_start)), firsts, right=True) - 1
    sick = ~filled | (document == poisoned)
    *inputs, upstream = tensors(len(kv_start), len(kv_start), (4, 2), 3)
    well = results(lambda *qkv: attention(*qkv, *pack), inputs, upstream, "torch")
    *inputs, upstream = (x.masked_fill(sick[:, None, None], torch.nan) for x in (*inputs, upstream))
    ill = results(lambda *qkv: attention(*qkv, *pack), inputs, upstream, "torch")
    for got, want in zip((*ill[0], *ill[1]), (*well[0], *well[1]), strict=True):
        assert torch.equal(got[~sick], want[~sick])


def test_one_row_by_hand(error):
    q, k, v, _ = tensors(1, 7, (4, 2), 6, seed=3)
    for name in ("reference", "torch"):
        with backend(name):
            bounds = torch.tensor([2]), torch.tensor([5])
            out, lse = attention(q, k, v, *bounds, scale=0.7, softcap=1.5, return_lse=True)
        for head in range(4):
            scores = torch.stack([1.5 * torch.tanh(0.7 * (q[0, head] @ k[s, head // 2]) / 1.5) for s in (2, 3, 4)])
            weights = torch.softmax(scores, 0)
            assert error(out[0, head], sum(w * v[s, head // 2] for w, s in zip(weights, (2, 3, 4), strict=True))) <= 1e-14
            assert error(lse[0, head], scores.exp().sum().log()) <= 1e-14


def test_the_scale_is_that_of_the_head_dim_where_none_is_given():
    q, k, v, _ = tensors(5, 5, (2, 1), 4)
    bounds = pack_intervals([[(5, CAUSAL)]])
    assert torch.equal(attention(q, k, v, *bounds), attention(q, k, v, *bounds, scale=0.5))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, softcap, monkeypatch):
    monkeypatch.setattr("smalt.kernels.attention_blocks.BLOCK_ROWS", 4)
    bounds = pack_intervals([[(1, CAUSAL)], [(2, CAUSAL), (3, IMAGE)], [(2, CAUSAL)], [(1, EMPTY)]], tail=2, window=2)
    leaves = [x.requires_grad_() for x in tensors(11, 11, (2, 1), 2, seed=1)[:3]]

    def function(q, k, v):
        out, lse = attention(q, k, v, *bounds, softcap=softcap, return_lse=True)
        return out, lse[bounds[0] < bounds[1]]

    with backend(name):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


# Shards


@given(
    pack=packs(),
    case=cases,
    given=options,
    cuts=st.lists(st.floats(0, 1), max_size=3),
    held=st.tuples(*[st.floats(0, 1)] * 4),
    name=st.sampled_from(["torch", "reference"]),
)
@example(pack=pack_intervals([[(40, IMAGE)]]), case=PLAIN, given=NO_OPTIONS, cuts=[0.5], held=(0, 0.3, 0.6, 1), name="torch")
@example(
    pack=pack_intervals([[(20, CAUSAL)]] * 3, tail=9),
    case=PLAIN,
    given=NO_OPTIONS,
    cuts=[0.1, 0.2],
    held=(0, 0.1, 0.9, 1),
    name="torch",
)
def test_shards_merge_to_the_whole(pack, case, given, cuts, held, name, error, gradient_error):
    # A rank holds two chunks of rows; keys come chunk by chunk, cut anywhere: inside documents, inside images.
    T = len(pack[0])
    a, b, c, d = (int(x * T) for x in sorted(held))
    rows = torch.cat([torch.arange(a, b), torch.arange(c, d)])
    borders = [0, *sorted(int(x * T) for x in cuts), T]
    q, k, v, upstream = tensors(T, T, **case)
    bounds = pack[0][rows], pack[1][rows]
    given = given | {"return_lse": True}

    def whole(q, k, v):
        return tuple(x[rows] for x in attention(q, k, v, *pack, **given))

    def merged(q, k, v):
        pieces = pairwise(borders)
        return merge_attention([attention(q[rows], k[i:j], v[i:j], *chunk(*bounds, i, j), **given) for i, j in pieces])

    want = results(whole, (q, k, v), upstream[rows], "reference")
    agree(results(merged, (q, k, v), upstream[rows], name), want, error, gradient_error)
    # The rows of a rank over all keys, which it gathered.
    sharded = results(lambda q, k, v: attention(q[rows], k, v, *bounds, **given), (q, k, v), upstream[rows], name)
    agree(sharded, want, error, gradient_error)


def test_merging_nothing_with_nothing_is_nothing():
    parts = [(torch.zeros(2, 3, 4, requires_grad=True), torch.full((2, 3), float("-inf"), requires_grad=True)) for _ in range(2)]
    out, lse = merge_attention(parts)
    assert torch.equal(out, torch.zeros(2, 3, 4))
    assert (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), [x for part in parts for x in part]):
        assert gradient.isfinite().all()


def test_merging_scores_of_any_size(error):
    # Far beyond the range of exp, and one part that counts for nothing.
    outs = [torch.full((1, 1, 2), float(i), dtype=torch.float64) for i in range(3)]
    lses = [torch.tensor([[x]], dtype=torch.float64) for x in (5000.0, 5000.0 + math.log(3), -5000.0)]
    out, lse = merge_attention(list(zip(outs, lses, strict=True)))
    assert error(out, torch.full((1, 1, 2), 0.75, dtype=torch.float64)) <= 1e-12
    assert error(lse, lses[0] + math.log(4)) <= 1e-12
    assert merge_attention([(outs[0].half(), lses[0].float())])[0].dtype == torch.float16


# Plans


@given(pack=packs())
def test_a_plan_for_all_layers_changes_nothing(pack):
    T = len(pack[0])
    q, k, v, _ = tensors(T, T, (4, 2), 3, seed=2)
    for chosen in ({}, {"softcap": 2.0, "return_lse": True}):
        planned, alone = (attention(q, k, v, *pack, plan=plan, **chosen) for plan in (attention_plan(*pack, T), None))
        for a, b in zip(planned, alone, strict=True):
            assert torch.equal(a, b)


@given(T=st.integers(0, 30), S=st.integers(0, 30), seed=st.integers(0, 1000))
def test_intervals_are_those_of_the_matrix(T, S, seed):
    kv_start, kv_end = rising_bounds(T, S, seed)
    rows, keys = intervals(kv_start, kv_end, S)
    visible = (torch.arange(S) >= kv_start[:, None]) & (torch.arange(S) < kv_end[:, None])
    for side, (start, end, origin) in ((visible, rows), (visible.T, keys)):
        first = None
        for i, line in enumerate(side):
            seen = line.nonzero().flatten().tolist()
            if seen:
                assert seen == list(range(start[i], end[i]))
                # A document goes on as long as neighbours share something.
                if first is None or not (i and (side[i - 1] & line).any()):
                    first = seen[0]
                assert origin[i] == first
            else:
                assert start[i] >= end[i]


class LargestTensor(TorchFunctionMode):
    """Elements of the largest tensor that any torch function is given or returns."""

    elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in (*args, *(kwargs or {}).values(), out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("documents", [[20] * 102, [20] * 3, [512] + [20] * 70], ids=["full", "mostly tail", "one long"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_memory_follows_the_documents(documents, return_lse):
    # A short document costs what its own rows and keys cost, whatever the tail and its neighbours; a long one less than its square.
    bounds = pack_intervals([[(rows, CAUSAL)] for rows in documents], tail=2040 - sum(documents))
    q, k, v, _ = tensors(2040, 2040, (1, 1), 4, torch.float32)
    with LargestTensor() as largest:
        attention(q, k, v, *bounds, return_lse=return_lse)
    assert 2040 * 4 <= largest.elements <= 0.75 * 512**2


# Compiler, operators, transforms


def operator_arguments(implementation):
    bounds = pack_intervals([[(7, CAUSAL)], [(4, IMAGE)]], tail=1)
    *inputs, upstream = tensors(12, 12, (2, 1), 16, torch.float32, layout="packed")
    rows, keys = intervals(*bounds, 12)
    forward = (*inputs, rows, keys, 0.25, 2.0, implementation)
    out, lse = _attention(*forward)
    return forward, (*inputs, rows, keys, out, lse, upstream, upstream[..., 0].T, 0.25, 2.0, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_operators_are_well_registered(implementation):
    forward, backward = operator_arguments(implementation)
    torch.library.opcheck(_attention, tuple(x.detach().requires_grad_() if i < 3 else x for i, x in enumerate(forward)))
    if implementation == "triton":  # the modes of the checks cannot look into the tensors of torch.func, which torch's form uses
        torch.library.opcheck(_attention_backward, backward)


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=pytest.mark.slow), "torch"])
def test_outputs_are_what_the_compiler_was_promised(implementation):
    # Strides as well: compiled code reads by them.
    forward, backward = operator_arguments(implementation)
    for operator, arguments in ((_attention, forward), (_attention_backward, backward)):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"softcap": 2.0, "return_lse": True}])
def test_compiles_whole(check_operator, device, given):
    bounds = pack_intervals([[(7, CAUSAL)], [(4, IMAGE)]], tail=1)
    q, k, v, _ = tensors(12, 12, (2, 1), 16, torch.float32, layout="packed")
    check_operator(lambda q, k, v: attention(q, k, v, *(b.to(q.device) for b in bounds), **given), [x.to(device) for x in (q, k, v)])


@pytest.mark.slow
def test_another_pack_is_not_compiled_again(error, gradient_error):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    *inputs, upstream = tensors(40, 40, (2, 1), 16)
    for documents in ([[(40, CAUSAL)]], [[(9, CAUSAL)], [(20, IMAGE)], [(11, CAUSAL)]], [[(3, CAUSAL)]]):
        bounds = pack_intervals(documents, tail=40 - sum(rows for d in documents for rows, _ in d))
        got, want = (results(lambda *qkv: f(*qkv, *bounds), inputs, upstream, "torch") for f in (compiled, attention))  # noqa: B023
        agree(got, want, error, gradient_error)
    assert counter.frame_count == 1


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", [None, "torch", "triton"])
def test_no_score_matrix_is_counted_as_memory(name):
    # Planners and compilers run on FakeTensors: forward and backward allocate nothing larger than q.
    T, H, K, D = 32768, 8, 2, 64
    with FakeTensorMode(), LargestAllocation() as largest, backend(name or module.current_backend()):
        q, k, v = (torch.empty(T, heads, D, dtype=torch.bfloat16, requires_grad=True) for heads in (H, K, K))
        bounds = torch.zeros(T, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
        plan = attention_plan(*bounds, T)
        out, lse = attention(q, k, v, *bounds, plan=plan, softcap=3.0, return_lse=True)
        gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.empty_like(out), torch.empty_like(lse)))
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((T, H, D), torch.bfloat16, (T, H), torch.float32)
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in (q, k, v)]
    assert largest.elements == T * H * D


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_functional_gradients_and_maps(name, error):
    bounds = pack_intervals([[(5, CAUSAL)], [(4, IMAGE)]], tail=1)
    q, k, v, upstream = tensors(10, 10, (2, 1), 4)

    def loss(q):
        return (attention(q, k, v, *bounds, plan=plan) * upstream).sum()

    with backend(name):
        plan = attention_plan(*bounds, 10)
        want = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
        assert error(torch.func.grad(loss)(q.detach()), want) <= 1e-14
        twice = torch.func.vmap(torch.func.grad(loss))(torch.stack([q.detach(), 2 * q.detach()]))
    assert error(twice[0], want) <= 1e-14


# Arguments


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_wrong_arguments_are_named(name):
    bounds = torch.zeros(5, dtype=torch.int32)
    x = torch.zeros(5, 3, 4)
    with backend(name):
        for q, k, v in ((x, x[:, :2], x[:, :2]), (x, x[:, :, :2], x[:, :, :2]), (x, x, x[:4]), (x[0], x, x)):
            with pytest.raises(ValueError) as raised:
                attention(q, k, v, bounds, bounds)
            assert all(str(tuple(t.shape)) in str(raised.value) for t in (q, k, v))
        for kv_start, kv_end in ((bounds[:4], bounds), (bounds, bounds[:1])):
            with pytest.raises(ValueError, match=r"kv_start .* kv_end .* must be \[5\]") as raised:
                attention(x, x, x, kv_start, kv_end)
            assert all(str(tuple(t.shape)) in str(raised.value) for t in (kv_start, kv_end))
        for given in ({"scale": 0.0}, {"scale": -1.0}, {"softcap": 0.0}, {"softcap": float("nan")}):
            with pytest.raises(ValueError, match=rf"{next(iter(given))} is .* positive"):
                attention(x, x, x, bounds, bounds, **given)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_decode_is_the_last_row_of_attention(heads, error):
    lengths = [1, 9, 4]
    q, k, v, _ = tensors(len(lengths), len(lengths) * 12, heads, 6, seed=5)
    k, v = k.unflatten(0, (3, 12)), v.unflatten(0, (3, 12))  # cells beyond the length are other numbers, as in a used cache
    got = decode_attention(q, k, v, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        bounds = torch.zeros(1, dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
        with backend("reference"):
            want = attention(q[row : row + 1], k[row, :n], v[row, :n], *bounds)
        assert error(got[row], want[0]) <= 1e-14


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_plan_of_another_pack_is_named(name):
    q, k, v, _ = tensors(5, 9, (2, 1), 16, torch.float32)
    bounds = torch.zeros(5, dtype=torch.int32), torch.full((5,), 9, dtype=torch.int32)
    with backend(name):
        for num_rows, num_keys in ((4, 9), (5, 10)):
            plan = attention_plan(bounds[0][:num_rows], bounds[1][:num_rows], num_keys)
            with pytest.raises(ValueError, match=rf"plan is of {num_rows} rows and {num_keys} keys, q has 5 rows and k 9"):
                attention(q, k, v, *bounds, plan=plan)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        ([0, 2, 1], [3, 3, 3], r"kv_start falls from 2 to 1 at row 2"),
        ([0, 0, 0], [3, 2, 3], r"kv_end falls from 3 to 2 at row 1"),
        ([0, 0, 0], [1, 3, 4], r"row 2 sees the keys 0 to 4, but there are 3"),
        ([-1, 0, 0], [1, 3, 3], r"row 0 sees the keys -1 to 1"),
    ],
)
def test_wrong_bounds_are_named(start, end, message):
    q, k, v, _ = tensors(3, 3, (1, 1), 4)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, torch.tensor(start), torch.tensor(end))


def test_for_the_kernels_wrong_bounds_end_where_the_keys_do(device):
    # Nothing looks at bounds on a GPU. In the interpreter every address is watched besides.
    leaves = [x.to(device).requires_grad_() for x in tensors(3, 3, (1, 1), 16, torch.float32)[:3]]
    results = []
    for start, end in (([-9, 0, 0], [1, 64, 900]), ([0, 0, 0], [1, 3, 3])):
        with backend("triton"):
            out = attention(*leaves, torch.tensor(start, device=device), torch.tensor(end, device=device))
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert results[0][0].abs().min() > 0
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_one_dtype_is_asked_for_and_kept(name):
    q, k, v, _ = tensors(3, 3, (1, 1), 16, torch.float32)
    bounds = torch.zeros(3, dtype=torch.int32), torch.arange(1, 4, dtype=torch.int32)
    with backend(name), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"q is torch.bfloat16, k torch.float32"):
            attention(q.bfloat16(), k, v, *bounds)
        assert attention(q, k, v, *bounds).dtype == torch.float32


def test_merging_no_sets_is_named():
    with pytest.raises(ValueError, match="merge_attention: there is nothing to merge"):
        merge_attention([])
