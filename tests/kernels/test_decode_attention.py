"""The step of generation: against its definition, against the rows of attention, and apart from its batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.kernels import attention, backend, decode_attention


@st.composite
def cases(draw):
    batch, kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 5]))
    length, head_dim = draw(st.integers(1, 75)), draw(st.sampled_from([8, 16, 24]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    # A cache that is longer than its filled part, and heads that lie before positions: any strides.
    q = torch.randn(batch, kv_heads * groups, head_dim + 1, generator=generator)[..., :head_dim]
    k, v = torch.randn(2, batch, kv_heads, length + 2, head_dim, generator=generator).transpose(2, 3)[:, :, :length]
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), lengths, draw(st.sampled_from([None, 0.4])), draw(st.sampled_from([None, 2.0]))


@pytest.mark.slow
@given(case=cases())
def test_kernel_obeys_the_rule(check_rule, device, case):
    q, k, v, lengths, scale, softcap = case
    lengths = lengths.to(device)

    def run(q, k, v):
        with torch.no_grad():
            return decode_attention(q, k, v, lengths, scale, softcap)

    check_rule(run, [x.to(device) for x in (q, k, v)])


def test_a_step_is_the_last_row_of_attention(device, error):
    q, k, v = (torch.randn(1, 40, h, 16, device=device, dtype=torch.float64) for h in (4, 2, 2))
    with backend("reference"):
        rows = torch.arange(40, device=device)
        full = attention(q[0], k[0], v[0], 0 * rows, rows + 1)
        for t in (0, 17, 39):
            step = decode_attention(q[:, t], k, v, torch.tensor([t + 1], device=device))
            assert error(step[0], full[t]) < 1e-12


@pytest.mark.slow
def test_batch_and_cache_change_no_bit(device):
    q, k, v = torch.randn(3, 4, 16, device=device), *torch.randn(2, 3, 90, 2, 16, device=device)
    lengths = torch.tensor([33, 90, 1], device=device)
    with backend("triton"):
        batch = decode_attention(q, k, v, lengths)
        for b, length in enumerate(lengths.tolist()):
            alone = decode_attention(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], lengths[b : b + 1])
            assert torch.equal(batch[b : b + 1], alone)


@pytest.mark.slow
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(2, 2, 16, generator=generator), *torch.randn(2, 2, 40, 1, 16, generator=generator)
    lengths = torch.tensor([40, 9], device=device)
    check_grid_order(
        lambda q, k, v: decode_attention(q, k, v, lengths).detach(), [q.to(device), k.to(device), v.to(device)], orders=20
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.ones(2, 5, 2, 9)}, r"k \(2, 5, 2, 9\)"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths \(3,\)"),
        ({"q": torch.ones(2, 3, 8)}, r"q \(2, 3, 8\)"),
        ({"q": torch.ones(4, 8)}, r"q \(4, 8\)"),
        ({"k": torch.ones(2, 5, 0, 8), "v": torch.ones(2, 5, 0, 8)}, r"k \(2, 5, 0, 8\)"),
        ({"q": torch.ones(2, 4, 8).half()}, r"q is torch.float16, k torch.float32"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {
        "q": torch.ones(2, 4, 8),
        "k": torch.ones(2, 5, 2, 8),
        "v": torch.ones(2, 5, 2, 8),
        "lengths": torch.ones(2, dtype=torch.int64),
    }
    arguments |= {"scale": None, "softcap": None} | changed
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments.values())


@pytest.mark.parametrize("lengths", [torch.tensor([7, 0, 3, 0, 9])[::2], torch.tensor(7).expand(3), torch.tensor([50, 11, 12])])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_lengths_of_any_strides_and_beyond_the_cache(name, lengths, device, error):
    q, k, v = (x.to(device) for x in (torch.randn(3, 2, 16), *torch.randn(2, 3, 10, 1, 16)))
    with backend("reference"):
        want = decode_attention(q.double(), k.double(), v.double(), lengths.clamp(max=10).to(device))
    with backend(name):
        assert error(decode_attention(q, k, v, lengths.to(device)).double(), want) < 1e-6


@pytest.mark.parametrize("name", ["reference", "torch", "triton"])
def test_autocast_changes_no_dtype(name, device):
    q, k = torch.randn(1, 1, 16, device=device), torch.randn(1, 3, 1, 16, device=device)
    with backend(name), torch.autocast(device, torch.bfloat16):
        assert decode_attention(q, k, k, torch.tensor([3], device=device)).dtype == torch.float32
