"""The random bits of AdamW and what is rounded with them, and the masters that are not."""

import math

import pytest
import torch

from smalt.kernels import backend
from smalt.kernels.adamw import (
    AdamW,
    Hyperparameters,
    Member,
    Table,
    launch_step,
    philox,
    random_bits,
    round_stochastically,
    torch_step,
)


def test_philox_is_that_of_its_authors():
    """Known answers of Random123 (kat_vectors)."""
    low = 0xFFFFFFFF
    for counter, key, answer in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((low, low, low, low), (low, low), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        got = philox(torch.tensor([counter[0]]), torch.tensor([counter[1]]), *counter[2:], *key)
        assert tuple(int(x) for x in got) == answer


def test_random_bits_differ_in_all_that_they_are_made_of():
    index = torch.arange(64)
    base = {"number": 1, "stream": 0, "seed": 5, "step": 3}
    changed = [{}, {"number": 2}, {"stream": 1}, {"stream": 2}, {"seed": 6}, {"seed": 5 + 2**32}, {"step": 4}]
    drawn = [random_bits(index, **{**base, **c}) for c in changed] + [
        random_bits(index + 2**35, **base),
        random_bits(index + 64, **base),
    ]
    for i, a in enumerate(drawn):
        assert a.min() >= 0 and a.max() < 2**16 and a.unique().numel() > 60  # noqa: PT018
        assert all((a == b).sum() < 4 for b in drawn[:i])


def test_each_of_the_16_bits_is_random():
    drawn = random_bits(torch.arange(4096), 1, 0, 5, 3)
    for bit in range(16):
        ones = (drawn >> bit & 1).sum().item()
        assert abs(ones - 2048) < 5 * 32, bit  # five sigma, of numbers that never change


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("first", [0, 2**35 + 13])  # the second in the middle of a block
def test_all_16_bits_decide(device, name, first):
    """A value whose cut-off bits and the random ones make 2^16 goes up; one 65536th of a unit less and it does not."""
    index = first + torch.arange(150, device=device)
    sign = 1.0 - 2 * (index % 2)
    # lr and eps are so large that the square root is lost beside them: exp_avg becomes the gradient, the weight minus that.
    h = Hyperparameters(2.0**40, (0.0, 0.0), 2.0**40, 0.0, seed=2**40 + 3, step=7)
    for stream in (0, 1):
        bits = random_bits(index, 2, stream, h.seed, h.step)
        for short in (0, 1):
            raw = 0x3F80_0000 + (index % 100 << 16) + 2**16 - bits - short
            gradient = raw.to(torch.int32).view(torch.float32) * sign
            weight, exp_avg, exp_avg_sq = (torch.zeros(150, device=device, dtype=torch.bfloat16) for _ in range(3))
            member = Member(weight, gradient, exp_avg, exp_avg_sq, None, 2, first)
            if name == "triton":
                launch_step([member], torch.ones((), device=device), h, Table())
            else:
                torch_step([member], None, h)
            want = (0x3F80_0000 + (index % 100 + 1 - short << 16)).to(torch.int32).view(torch.float32) * sign
            assert torch.equal((-weight, exp_avg)[stream].float(), want)


def test_stochastic_rounding():
    bits = torch.arange(2**16)
    for x in (1.001, -3.3e-5, 70000.0, 1e-39):
        got = round_stochastically(torch.full((2**16,), x), bits).double()
        assert got.unique().numel() == 2
        assert got.mean().item() == pytest.approx(float(torch.tensor(x)), rel=1e-12)
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e-40, math.inf, -math.inf]).bfloat16()
    for b in (0, 1, 2**16 - 1):
        assert torch.equal(round_stochastically(exact.float(), torch.full((7,), b)), exact)
        nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
        assert round_stochastically(nan, torch.full((3,), b)).isnan().all()


@pytest.mark.parametrize(("name", "numel"), [("torch", 4096), pytest.param("triton", 1024, marks=pytest.mark.slow)])
def test_steps_below_half_a_unit_are_not_lost_and_not_biased(device, name, numel):
    p = torch.nn.Parameter(torch.ones(numel, device=device, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=2.0**-12, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    with backend(name):
        for _ in range(8):
            optimizer.step()
    # A unit below 1 is 2^-8: a step is a sixteenth of it, and rounding to nearest would stay at 1.
    moved = (1 - p.detach().double()).mean().item()
    sigma = 2.0**-8 * math.sqrt(8 * 1 / 16 * 15 / 16 / numel)
    assert abs(moved - 8 * 2.0**-12) < 4 * sigma


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_parameters_round_independently(device, name):
    p, q = (torch.nn.Parameter(torch.ones(64, device=device, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW([p, q], lr=1e-3)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with backend(name):
        optimizer.step()
    assert not torch.equal(p, q)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_state_of_torchs_adamw_goes_on(device, name):
    """Options that it does not name stay those of the group, and a master that it lacks is made from the weight."""
    start = torch.linspace(-2, 2, 70).bfloat16().to(device)
    ps = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    theirs = torch.optim.AdamW([{"params": [ps[0]]}, {"params": [ps[1]]}], lr=1e-4)
    for p in ps:
        p.grad = torch.ones_like(p)
    theirs.step()
    before = [p.detach().clone() for p in ps]
    mine = AdamW([{"params": [ps[0]], "master_weights": True}, {"params": [ps[1]]}], lr=9.0, seed=3)
    mine.load_state_dict(theirs.state_dict())
    assert [(g["lr"], g["master_weights"], g["seed"]) for g in mine.param_groups] == [(1e-4, True, 3), (1e-4, False, 3)]
    with backend(name):
        mine.step()
    assert "master" not in mine.state[ps[1]]
    state = mine.state[ps[0]]
    assert float(state["step"]) == 2
    assert state["master"].dtype == torch.float32
    # A step of 1e-4, in which bf16 has no part.
    assert torch.allclose(state["master"], before[0].float() * (1 - 1e-6) - 1e-4, rtol=0, atol=1e-6)
    assert torch.equal(ps[0], state["master"].bfloat16())


def test_master_that_a_state_lacks_is_made_once():
    p = torch.nn.Parameter(torch.ones(5).bfloat16())
    p.grad = torch.ones_like(p)
    without = AdamW([p], lr=1e-5)
    without.step()
    optimizer = AdamW([p], lr=1e-5)
    optimizer.load_state_dict(without.state_dict())
    optimizer.param_groups[0]["master_weights"] = True
    with torch.no_grad():
        p.fill_(1)
    for _ in range(3):
        optimizer.step()
    # Three steps of 1e-5 and no rounding; made anew each time, it would have taken one.
    assert torch.allclose(optimizer.state[p]["master"], torch.full((5,), 1 - 3e-5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_state_that_asks_for_more_is_refused(option):
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones_like(p)
    theirs = torch.optim.AdamW([p], **{option: True})
    theirs.step()
    with pytest.raises(ValueError, match=f"group 0 of the state has {option} on"):
        AdamW([p]).load_state_dict(theirs.state_dict())
