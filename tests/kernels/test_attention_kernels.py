"""The kernels of attention against the rule: packs, layouts, options, bits, and indices beyond 2^31."""

import itertools
import mmap

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from smalt.kernels import attention, attention_kernels, backend, merge_attention
from smalt.kernels.attention import Intervals, intervals
from smalt.kernels.launch import INTERPRET, Config, cdiv, jit, launch, tl
from smalt.profiling.kernels.bench_gate import FLOOR

from .intervals import CAUSAL, EMPTY, IMAGE, chunk, pack_intervals, packs, rising_bounds, tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = {"heads": (2, 1), "D": 24, "dtype": torch.float32, "layout": "contiguous", "seed": 0}
NO_OPTIONS = {"scale": None, "softcap": None, "return_lse": False}
# Whole and partial blocks, several documents in a tile, an image over a border of tiles, empty rows, a tail.
MIXED = pack_intervals([[(20, CAUSAL), (19, IMAGE), (9, CAUSAL)], [(1, CAUSAL)], [(3, EMPTY)], [], [(13, IMAGE)]], tail=5)

layouts = st.fixed_dictionaries(
    {
        "heads": st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
        "D": st.sampled_from([16, 16, 24, 40]),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["contiguous", "heads", "strided", "packed"]),
        "seed": st.integers(0, 99),
    }
)
options = st.fixed_dictionaries(
    {
        # Larger ones leave rows one key alone, and gradients the noise of rounding: docs/kernels.md has them among the exceptions.
        "scale": st.sampled_from([None, None, 0.1, 0.5]),
        "softcap": st.sampled_from([None, None, 1.0, 30.0]),
        "return_lse": st.booleans(),
    }
)


def attention_over(bounds, **given):
    return lambda q, k, v: attention(q, k, v, *bounds, **given)


def more_than_one_key(kv_start, kv_end):
    """Where no row sees two keys the gradients of q and k are zero, and what rounding leaves is measured elsewhere."""
    return (kv_end - kv_start).max() != 1


def on(device, tensors):
    return [x.to(device) for x in tensors]


def bits(function, inputs, upstream):
    """Outputs and gradients of the kernels, for the given upstream gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with backend("triton"):
        outputs = function(*leaves)
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, upstream))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "given"),
    [
        (PLAIN | {"layout": "packed"}, {"softcap": 2.0, "return_lse": True}),
        (PLAIN | {"dtype": torch.bfloat16, "heads": (4, 2), "D": 16}, {"scale": 0.3, "return_lse": True}),
    ],
    ids=["fp32", "bf16"],
)
def test_a_mixed_pack_obeys_the_rule(check_rule, device, case, given):
    q, k, v, _ = tensors(len(MIXED[0]), len(MIXED[0]), **case)
    check_rule(attention_over(on(device, MIXED), **given), on(device, (q, k, v)))


@pytest.mark.slow
@given(pack=packs(rows=36, documents=4), layout=layouts, given=options)
@example(pack=MIXED, layout=PLAIN, given=NO_OPTIONS)
@example(pack=pack_intervals([[(64, CAUSAL)]]), layout=PLAIN, given=NO_OPTIONS)  # tiles and blocks end together
@example(pack=pack_intervals([[(40, CAUSAL)]], window=16), layout=PLAIN, given=NO_OPTIONS)
@example(pack=pack_intervals([], tail=40), layout=PLAIN, given=NO_OPTIONS | {"return_lse": True})
@settings(max_examples=50)
def test_packs_obey_the_rule(check_rule, device, pack, layout, given):
    assume(more_than_one_key(*pack))
    q, k, v, _ = tensors(len(pack[0]), len(pack[0]), **layout)
    check_rule(attention_over(on(device, pack), **given), on(device, (q, k, v)))


@pytest.mark.slow
@given(T=st.integers(1, 70), S=st.integers(1, 70), seed=st.integers(0, 999), layout=layouts, given=options)
@settings(max_examples=50)
def test_any_rising_bounds_obey_the_rule(check_rule, device, T, S, seed, layout, given):
    bounds = rising_bounds(T, S, seed)
    assume(more_than_one_key(*bounds))
    q, k, v, _ = tensors(T, S, **layout)
    check_rule(attention_over(on(device, bounds), **given), on(device, (q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [64, 72, 80, 96, 128, 256])
def test_head_dims_obey_the_rule(check_rule, device, D, dtype):
    pack = pack_intervals([[(21, CAUSAL), (15, IMAGE)], [(8, IMAGE)]], tail=3)
    q, k, v, _ = tensors(47, 47, (2, 1), D, dtype, layout="packed")
    check_rule(attention_over(on(device, pack), return_lse=True), on(device, (q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "given"),
    [
        (10.0, {"softcap": 30.0}),
        (100.0, {"softcap": 5.0}),
        (1.0, {"softcap": 1000.0}),
        (4.0, {"scale": 2.0}),
        (6.0, {"scale": 5.0}),
        (6.0, {"scale": 5.0, "softcap": 1000.0}),
        (1.0, {"scale": 1e-4}),
        (0.0, {}),
    ],
)
def test_scores_of_any_size_obey_the_rule(check_rule, device, size, given, dtype):
    q, k, v, _ = tensors(len(MIXED[0]), len(MIXED[0]), (2, 1), 16, dtype)
    check_rule(attention_over(on(device, MIXED), return_lse=True, **given), on(device, (size * q, k, v)))


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="known: delta is formed of the rounded output, and too few columns average its error")
@pytest.mark.parametrize(
    ("T", "S", "bounds", "layout", "given"),
    [
        (13, 59, 270, {"heads": (1, 1), "D": 1, "dtype": torch.float16, "seed": 13}, {"scale": 0.1, "softcap": 30.0}),
        (35, 47, 17, {"heads": (2, 1), "D": 8, "dtype": torch.bfloat16, "seed": 58}, {}),
    ],
)
def test_few_columns_obey_the_rule(check_rule, device, T, S, bounds, layout, given):
    q, k, v, _ = tensors(T, S, layout="contiguous", **layout)
    check_rule(attention_over(on(device, rising_bounds(T, S, bounds)), **given), on(device, (q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T", "S", "bounds", "layout", "given"),
    [
        (5, 6, 233, {"heads": (3, 1), "D": 16, "layout": "heads", "seed": 40}, {"scale": 2.0}),
        (29, 45, 112, {"heads": (2, 1), "D": 24, "layout": "heads", "seed": 7}, {"scale": 2.0, "softcap": 1.0}),
    ],
)
def test_saturated_scores_err_little_more(check_rule, device, T, S, bounds, layout, given):
    q, k, v, _ = tensors(T, S, dtype=torch.float32, **layout)
    check_rule(attention_over(on(device, rising_bounds(T, S, bounds)), **given), on(device, (q, k, v)), 10 * FLOOR[torch.float32])


@pytest.mark.slow
@given(
    layouts=st.tuples(*[st.sampled_from(["contiguous", "sliced", "transposed", "expanded", "strided"])] * 4),
    dtype=st.sampled_from(DTYPES),
)
@example(layouts=("contiguous", "contiguous", "contiguous", "expanded"), dtype=torch.bfloat16)
@example(layouts=("sliced", "transposed", "expanded", "strided"), dtype=torch.float32)
@settings(max_examples=20)
def test_strides_change_no_bit(check_layouts, device, layouts, dtype):
    pack = pack_intervals([[(5, CAUSAL)], [(30, CAUSAL)]], tail=1)
    q, k, v, _ = tensors(36, 36, (2, 1), 16, dtype)
    check_layouts(attention_over(on(device, pack)), on(device, (q, k, v)), layouts)


@pytest.mark.slow
@given(pack=packs(rows=36, documents=4), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)), layout=layouts, given=options)
@settings(max_examples=20)
def test_shards_obey_the_rule(check_rule, device, pack, cuts, layout, given):
    # A rank holds two chunks of the rows, far apart, and sees the keys in three chunks.
    assume(more_than_one_key(*pack))
    T = len(pack[0])
    rows = torch.cat([torch.arange(0, T // 3), torch.arange(T // 2, T)])
    low, high = (int(c * T) for c in sorted(cuts))
    q, k, v, _ = tensors(T, T, **layout)
    bounds = on(device, [b[rows] for b in pack])
    given = given | {"return_lse": True}

    def merged(q, k, v):
        pieces = [(0, low), (low, high), (high, T)]
        return merge_attention([attention(q, k[a:b], v[a:b], *chunk(*bounds, a, b), **given) for a, b in pieces])

    check_rule(merged, on(device, (q[rows], k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_is_the_whole_of_attention(device, dtype):
    bounds = pack_intervals([[(1, CAUSAL)]] * 35)
    q, k, v, upstream = on(device, tensors(35, 35, (2, 1), 16, dtype))
    (out, lse), (dq, dk, dv) = bits(
        attention_over(on(device, bounds), return_lse=True), (q, k, v), (upstream, torch.zeros(35, 2, device=device))
    )
    assert torch.equal(out, v.expand(35, 2, 16))
    assert torch.allclose(lse.double(), (q.double() * k.double()).sum(-1) / 4, rtol=1e-6, atol=1e-6)
    assert torch.allclose(dv.double(), upstream.double().sum(1, keepdim=True), rtol=torch.finfo(dtype).eps, atol=0)
    assert max(dq.abs().max(), dk.abs().max()) <= 1e-5


@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("S", [0, 3])
def test_nothing_to_see(device, T, S):
    q, k, v, upstream = on(device, tensors(T, S, (2, 1), 16, torch.float32))
    empty = torch.zeros(T, dtype=torch.int32, device=device)
    (out, lse), gradients = bits(attention_over((empty, empty), return_lse=True), (q, k, v), (upstream, upstream[..., 0]))
    assert lse.shape == (T, 2)
    assert (lse == float("-inf")).all()
    for got, like in zip((out, *gradients), (q, q, k, v), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


def test_empty_rows_are_zero_in_poisoned_memory(device):
    # The upstream gradient at empty rows is NaN and infinite: nothing takes it.
    kv_start, kv_end = pack_intervals([[(18, CAUSAL)], [(5, EMPTY)], [(8, IMAGE)]], tail=4)
    empty = kv_start >= kv_end
    q, k, v, upstream = on(device, tensors(35, 35, (2, 1), 16, torch.bfloat16))
    dlse = upstream[..., 0].float()
    upstream[empty], dlse[empty] = torch.nan, torch.inf
    (out, lse), (dq, dk, dv) = bits(attention_over(on(device, (kv_start, kv_end)), return_lse=True), (q, k, v), (upstream, dlse))
    for x in (out, dq, dk, dv):
        assert torch.equal(x[empty], torch.zeros_like(x[empty]))
        assert x.isfinite().all()
    assert (lse[empty] == float("-inf")).all()
    assert lse[~empty].isfinite().all()


# Bits


def place(document, before, behind, window, dtype, given, device):
    """Outputs and gradients of a document between others."""
    bounds = pack_intervals([*before, document, *behind], tail=2, window=window)
    low, length = (sum(rows for d in documents for rows, _ in d) for documents in (before, [document]))
    mine = slice(low, low + length)
    T = len(bounds[0])
    inputs = tensors(T, T, (2, 1), 16, dtype, seed=low)
    for x, own in zip(inputs, tensors(length, length, (2, 1), 16, dtype, seed=1000), strict=True):
        x[mine] = own
    q, k, v, upstream = on(device, inputs)
    outputs, gradients = bits(
        attention_over(on(device, bounds), return_lse=True, **given), (q, k, v), (upstream, upstream[..., 0].float())
    )
    return [x[mine] for x in (*outputs, *gradients)]


runs = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([CAUSAL, IMAGE])), min_size=1, max_size=3)
others = st.lists(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([CAUSAL, IMAGE, EMPTY])), max_size=2), max_size=3)


@pytest.mark.slow
@given(
    document=runs,
    companies=st.tuples(others, others),
    window=st.sampled_from([None, None, 1, 7, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 2.0]),
)
@example(document=[(64, CAUSAL)], companies=([[(13, CAUSAL)]], []), window=None, dtype=torch.bfloat16, softcap=None)
@example(document=[(50, CAUSAL)], companies=([[(5, IMAGE)]], [[(9, CAUSAL)]]), window=20, dtype=torch.float32, softcap=None)
@settings(max_examples=30)
def test_a_documents_bits_know_nothing_of_the_pack(device, document, companies, window, dtype, softcap):
    alone = place(document, [], [], window, dtype, {"softcap": softcap}, device)
    among = place(document, *companies, window, dtype, {"softcap": softcap}, device)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), alone, among, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_nan_stays_in_the_tiles_that_hold_it(device):
    # A row takes 0 times the values of the other documents of its tile: NaN comes through there, and nowhere else.
    pack = pack_intervals([[(32, CAUSAL)], [(20, IMAGE)], [(12, CAUSAL)], [(32, CAUSAL)]])
    q, k, v, upstream = on(device, tensors(96, 96, (2, 1), 16, torch.float32))
    apart = torch.tensor([True] * 32 + [False] * 32 + [True] * 32, device=device)
    results = []
    for poison in (1.0, torch.nan):
        ill = [x.clone() for x in (q, k, v, upstream)]
        for x in ill:
            x[32:52] *= poison
        outputs, gradients = bits(attention_over(on(device, pack), return_lse=True), ill[:3], (ill[3], ill[3][..., 0]))
        results.append([*outputs, *gradients])
    for well, ill in zip(*results, strict=True):
        assert torch.equal(ill[apart], well[apart])
        assert ill[32:52].isnan().all()


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    pack = pack_intervals([[(23, CAUSAL)], [(11, IMAGE)]], tail=2)
    q, k, v, _ = tensors(36, 36, (2, 1), 16, torch.float32)
    check_grid_order(attention_over(on(device, pack), return_lse=True), on(device, (q, k, v)))


@jit
def _atomic_kernel(x, out, num_rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """A sum over rows to which every program adds, as kernels do that give keys gradients from tiles of rows."""
    t, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, D)
    rows = tl.load(x + t[:, None] * D + d[None, :], mask=(t < num_rows)[:, None], other=0.0)
    tl.atomic_add(out + d, tl.sum(rows, 0))


def test_an_atomic_add_is_found_out(check_grid_order, device):
    def atomic_sum(x):
        out = x.new_zeros(x.shape[1])
        launch("planted", _atomic_kernel, (cdiv(len(x), 4),), x.detach(), out, len(x), config=Config({"BLOCK": 4}, 1, 1), D=x.shape[1])
        return out

    with pytest.raises(AssertionError, match="changes the result"):
        check_grid_order(atomic_sum, [torch.randn(30, 16, device=device)])


# What is read


@pytest.mark.skipif(not INTERPRET, reason="loads are counted in the interpreter")
def test_blocks_that_nothing_sees_are_skipped_and_whole_ones_not_masked(monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    counts = {"masked": 0, "whole": 0}
    load, masked_load = interpreter_builder.create_load, interpreter_builder.create_masked_load

    def count(kind, original):
        def counted(ptr, *args):
            counts[kind] += ptr.data.shape == (16, 16)
            return original(ptr, *args)

        return counted

    monkeypatch.setattr(interpreter_builder, "create_masked_load", count("masked", masked_load))
    monkeypatch.setattr(interpreter_builder, "create_load", count("whole", load))
    pack = pack_intervals([[(96, CAUSAL)]])
    q, k, v, upstream = tensors(96, 96, (1, 1), 16, torch.float16)
    kernels = []
    with backend("triton"):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, *pack)
        kernels.append(dict(counts))
        torch.autograd.grad(out, leaves, upstream)
    # create_load hands on to create_masked_load. Tile i of 32 rows sees 2 i whole blocks of 16 keys and 2 partial ones; backwards
    # the dq kernel once more, and in the dk and dv kernel tile i of 32 keys is seen by 4 - 2 i whole blocks of 16 rows and 2 partial.
    assert kernels[0] == {"whole": 2 * (0 + 2 + 4), "masked": 2 * (0 + 2 + 4 + 3 * 2)}
    assert {k: counts[k] - kernels[0][k] for k in counts} == {"whole": 4 * (0 + 2 + 4), "masked": 4 * (0 + 2 + 4 + 3 * 2)}


# Indices beyond 2^31


NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on


def sparse(*shape, dtype):
    """Zeros of any size; the system gives memory to those pages alone that are written."""
    length = int(np.prod(shape))
    try:
        memory = mmap.mmap(-1, length * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no address space for {length * dtype.itemsize >> 30} GB: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _Enough(BaseException):
    """Ends a launch."""


@pytest.fixture
def corners_only(monkeypatch):
    """Launches visit the first and the last program of each axis of the grid alone, and outputs are sparse."""
    from triton.runtime.interpreter import interpreter_builder

    original, visits = interpreter_builder.set_grid_idx, []

    def set_grid_idx(x, y, z):
        if not visits:
            raise _Enough
        original(*visits.pop())

    def launch_corners(name, kernel, grid, *args, **kwargs):
        visits[:] = [(*cell, 0) for cell in itertools.product(*({0, n - 1} for n in grid))]
        with pytest.raises(_Enough):
            launch(name, kernel, grid, *args, **kwargs)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(attention_kernels, "launch", launch_corners)
    new_empty = torch.Tensor.new_empty

    def sparse_if_large(x, *shape, dtype=None, **kwargs):
        large = np.prod(shape) > 2**20
        return sparse(*shape, dtype=dtype or x.dtype) if large else new_empty(x, *shape, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", sparse_if_large)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="programs are chosen in the interpreter")
@pytest.mark.parametrize("outermost", ["rows", "heads"])
def test_indices_beyond_two_to_the_31(corners_only, outermost):
    # Row by head alone is beyond 2^31 at the last row of the last head: in q, k, v and their gradients, in lse and in what the
    # kernels hand on. The last 32 rows are a document; they must have the bits that they have alone.
    T, H, D, own = 2**24 + 32, 130, 16, 32
    made = tensors(own, own, (H, H), D, torch.bfloat16)
    bounds = intervals(*pack_intervals([[(own, CAUSAL)]]), own)
    wide = []
    for x in made:
        big = (
            sparse(x.shape[1], T, D, dtype=x.dtype).transpose(0, 1) if outermost == "heads" else sparse(T, *x.shape[1:], dtype=x.dtype)
        )
        big[-own:] = x
        wide.append(big)
    far = []
    for side in bounds:
        big = sparse(3, T, dtype=torch.int32)
        big[:, -own:] = side + (T - own)
        far.append(big)
    results = []
    for (q, k, v, upstream), (rows, keys) in ((made, bounds), (wide, Intervals(*far))):
        out, lse = attention_kernels.launch_forward(q, k, v, rows, 0.25, 0.0)
        dlse = sparse(*lse.shape, dtype=torch.float32)
        dlse[:, -own:] = made[3][..., 0].T.float()
        grads = attention_kernels.launch_backward(q, k, v, rows, keys, out, lse, upstream, dlse, 0.25, 0.0)
        results.append([x[-own:, [0, -1]].clone() for x in (out, lse.T, *grads)])
    for name, near, beyond in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert near.any(), name
        assert torch.equal(near, beyond), name
