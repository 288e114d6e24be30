"""Interval attention: the form in blocks against the definition, over random packs."""

import importlib

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from smalt.kernels import attention, attention_plan, backend, decode_attention

module = importlib.import_module("smalt.kernels.attention")  # the package's attribute of this name is the function

# Of the output, and of the gradients.
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 2e-5), torch.bfloat16: (4e-3, 1e-2)}


def pack_intervals(documents, tail, window=None):
    """kv_start and kv_end of documents, each a list of (rows, is_image) runs, and of a tail that nothing fills."""
    start, end = [], []
    for document in documents:
        first = len(start)
        for rows, is_image in document:
            low = len(start)
            for q in range(low, low + rows):
                oldest = max(first, q - window + 1) if window else first
                start.append(min(oldest, low) if is_image else oldest)
                end.append(low + rows if is_image else q + 1)
    total = len(start) + tail
    return torch.tensor(start + [total] * tail, dtype=torch.int32), torch.tensor(end + [total] * tail, dtype=torch.int32)


@st.composite
def packs(draw):
    """Packs of documents of no, one or many tokens, with image spans, a window and a tail."""
    run = st.tuples(st.one_of(st.sampled_from([0, 1]), st.integers(2, 45)), st.booleans())
    documents = draw(st.lists(st.lists(run, max_size=3), max_size=5))
    tail = draw(st.sampled_from([0, 1, 40]))
    if not any(rows for document in documents for rows, _ in document):
        tail = max(tail, 1)
    return pack_intervals(documents, tail, draw(st.sampled_from([None, 1, 5, 33])))


def rising_bounds(T, S, seed):
    """Any two non-decreasing sequences: empty rows anywhere, and rows of another pack than the keys."""
    bounds = torch.randint(S + 1, (2, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return *bounds.sort(-1).values, S


def tensors(T, S, heads, D, dtype, seed, contiguous=True):
    """q [T, H, D], k and v [S, K, D] and an upstream gradient; if asked, as strided views with the head dim outermost."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows, h in ((T, heads[0]), (S, heads[1]), (S, heads[1]), (T, heads[0])):
        x = torch.randn(h, rows, 2 * D, generator=generator, dtype=dtype)[..., ::2].transpose(0, 1)
        made.append(x.contiguous() if contiguous else x)
    return made


def outputs(q, k, v, upstream, kv_start, kv_end, name):
    """Output and gradients of q, k and v on a backend."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with backend(name):
        out = attention(q, k, v, kv_start, kv_end)
    return out.detach(), torch.autograd.grad(out, (q, k, v), upstream)


inputs = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(1, 1), (4, 2), (3, 1)]),
        "D": st.sampled_from([1, 6, 8]),
        "dtype": st.sampled_from(list(TOLERANCE)),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)
PLAIN = {"heads": (4, 2), "D": 8, "dtype": torch.float64, "contiguous": True, "seed": 0}


def compare(kv_start, kv_end, S, inputs, error, gradient_error):
    made = tensors(len(kv_start), S, **inputs)
    out, gradients = outputs(*made, kv_start, kv_end, "torch")
    want, want_gradients = outputs(*(x.double() for x in made), kv_start, kv_end, "reference")
    empty = kv_start >= kv_end
    assert out.dtype == inputs["dtype"]
    for x in (out, gradients[0]):
        assert torch.equal(x[empty], torch.zeros_like(x[empty]))
    assert error(out, want) <= TOLERANCE[out.dtype][0]
    # A row of one key has a true gradient of zero in q and k: below float64, noise relative to anything smaller than all gradients.
    floor = 1e-3 if out.dtype == torch.float64 else 1.0
    assert gradient_error(gradients, want_gradients, floor) <= TOLERANCE[out.dtype][1]


@given(pack=packs(), inputs=inputs, query_rows=st.tuples(st.floats(0, 0.9), st.floats(0.1, 1)))
@example(pack=pack_intervals([], tail=40), inputs=PLAIN, query_rows=(0, 1))  # nothing but a tail
@example(pack=pack_intervals([[(1, False)]] * 64, tail=0), inputs=PLAIN, query_rows=(0, 1))  # whole blocks of one-token documents
@example(pack=pack_intervals([[(3, False), (40, True)]], tail=1), inputs=PLAIN, query_rows=(0.2, 0.5))  # an image cut by blocks
def test_packs(pack, inputs, query_rows, error, gradient_error):
    # Context parallelism holds a slice of the rows, their intervals in the coordinates of all keys.
    T = len(pack[0])
    low = min(int(query_rows[0] * T), T - 1)
    rows = slice(low, max(low + 1, int(query_rows[1] * T)))
    compare(pack[0][rows], pack[1][rows], T, inputs, error, gradient_error)


@given(bounds=st.builds(rising_bounds, st.integers(1, 70), st.integers(1, 90), st.integers(0, 1000)), inputs=inputs)
def test_any_rising_bounds(bounds, inputs, error, gradient_error):
    compare(*bounds, inputs, error, gradient_error)


@given(pack=packs(), poisoned=st.integers(0, 4))
def test_poison_stays_where_it_is(pack, poisoned):
    # NaN in the tail, and in all that one document holds, touches no other row.
    kv_start, kv_end = pack
    filled = kv_start < kv_end
    assume(filled.any())
    start = kv_start.long()
    firsts = (filled & (start >= torch.cat([torch.tensor([-1]), kv_end[:-1].long()]))).nonzero().flatten()
    document = torch.bucketize(torch.arange(len(start)), firsts, right=True) - 1
    sick = ~filled | (document == poisoned)
    made = tensors(len(start), len(start), (4, 2), 3, torch.float64, 0)
    ill = [x.masked_fill(sick[:, None, None], torch.nan) for x in made]
    out, gradients = outputs(*made, kv_start, kv_end, "torch")
    ill_out, ill_gradients = outputs(*ill, kv_start, kv_end, "torch")
    for got, want in zip((ill_out, *ill_gradients), (out, *gradients), strict=True):
        assert torch.equal(got[~sick], want[~sick])


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize("filled", [0, 1, 40])
def test_empty_rows_are_zero(name, filled):
    kv_start, kv_end = pack_intervals([[(filled, False)]], tail=30)
    made = tensors(filled + 30, filled + 30, (2, 2), 4, torch.float32, 0)
    out, gradients = outputs(*made, kv_start, kv_end, name)
    for x in (out, *gradients):
        assert torch.equal(x[filled:], torch.zeros_like(x[filled:]))
        assert x[:filled].isfinite().all()


def test_one_row_by_hand(error):
    q, k, v, _ = tensors(1, 7, (4, 2), 6, torch.float64, 3)
    out = attention(q, k, v, torch.tensor([2]), torch.tensor([5]), scale=0.7)
    for head in range(4):
        weights = torch.softmax(torch.stack([0.7 * (q[0, head] @ k[s, head // 2]) for s in (2, 3, 4)]), 0)
        assert error(out[0, head], sum(w * v[s, head // 2] for w, s in zip(weights, (2, 3, 4), strict=True))) <= 1e-14


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck(name, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    kv_start, kv_end = pack_intervals([[(1, False)], [(2, False), (3, True)], [(2, False)]], tail=3, window=2)
    q, k, v, _ = (x.requires_grad_() for x in tensors(11, 11, (2, 1), 2, torch.float64, 1))
    with backend(name):
        assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, kv_start, kv_end), (q, k, v), fast_mode=True)


@given(pack=packs())
def test_a_plan_for_all_layers_changes_nothing(pack):
    made = [x.requires_grad_() for x in tensors(len(pack[0]), len(pack[0]), (4, 2), 3, torch.float64, 2)]
    planned, alone = (attention(*made[:3], *pack, plan=plan) for plan in (attention_plan(*pack), None))
    assert torch.equal(planned, alone)


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
def test_memory_follows_the_documents(documents):
    # A short document costs what its own rows and keys cost, whatever the tail and its neighbours; a long one less than its square.
    kv_start, kv_end = pack_intervals([[(rows, False)] for rows in documents], tail=2040 - sum(documents))
    q, k, v, _ = tensors(2040, 2040, (1, 1), 4, torch.float32, 0)
    with LargestTensor() as largest:
        attention(q, k, v, kv_start, kv_end)
    assert 2040 * 4 <= largest.elements <= 0.75 * 512**2


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_wrong_shapes_are_named(name):
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


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_decode_is_the_last_row_of_attention(heads, error):
    lengths = [1, 9, 4]
    q, k, v, _ = tensors(len(lengths), len(lengths) * 12, heads, 6, torch.float64, 5)
    k, v = k.unflatten(0, (3, 12)), v.unflatten(0, (3, 12))  # cells beyond the length are other numbers, as in a used cache
    got = decode_attention(q, k, v, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        bounds = torch.zeros(1, dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
        with backend("reference"):
            want = attention(q[row : row + 1], k[row, :n], v[row, :n], *bounds)
        assert error(got[row], want[0]) <= 1e-14
