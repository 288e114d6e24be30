import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import backend
from smalt.kernels.adamw import (
    AdamW,
    Hyperparameters,
    Member,
    Table,
    adamw_reference,
    adamw_traffic,
    launch_step,
    random_bits,
    round_stochastically,
)
from smalt.kernels.launch import INTERPRET, configuration, configured_for, recording

SHAPES = ((3, 5), (64,), (7, 40), (1,), (130,), (), (0,))
HYPER = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(shapes, dtype, seed, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(device, dtype)) for s in shapes]


def train(optimizer, parameters, steps, seed=0, first=0, **kwargs):
    """Steps with random gradients, those of step i from seed and i."""
    for i in range(first, first + steps):
        g = torch.Generator().manual_seed(1000 * seed + i)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g).to(p.device, p.dtype)
        optimizer.step(**kwargs)


def tensors(optimizer, parameters):
    """Weights and state, in order."""
    return [p.detach() for p in parameters] + [v for p in parameters for k, v in optimizer.state[p].items() if k != "step"]


def test_definition_is_torchs_adamw(error):
    mine, theirs = parameters(SHAPES, torch.float64, 1), parameters(SHAPES, torch.float64, 1)
    a, b = AdamW(mine, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    for i in range(5):
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 0.05 / (i + 1)
        train(a, mine, 1, first=i)
        train(b, theirs, 1, first=i)
    for x, y in zip(tensors(a, mine), tensors(b, theirs), strict=True):
        assert error(x, y) < 1e-12


def test_defaults_are_torchs():
    mine, theirs = (cls([torch.nn.Parameter(torch.ones(1))]).defaults for cls in (AdamW, torch.optim.AdamW))
    assert all(mine[k] == theirs[k] for k in ("lr", "betas", "eps", "weight_decay"))


def check_against_float64(device, shapes, seed, steps, clip):
    """fp32: the kernel's error after some steps is at most twice torch's own."""
    runs = {}
    for name, dtype, cls in (
        ("kernel", torch.float32, AdamW),
        ("torch", torch.float32, torch.optim.AdamW),
        ("truth", torch.float64, AdamW),
    ):
        ps = parameters(shapes, torch.float32, seed, device)
        ps = [torch.nn.Parameter(p.detach().to(dtype)) for p in ps]
        optimizer = cls(ps, **HYPER)
        with backend("triton" if name == "kernel" else "torch"):
            for i in range(steps):
                g = torch.Generator().manual_seed(seed + i)
                for p in ps:
                    p.grad = torch.randn(p.shape, generator=g).to(device, dtype)
                    if cls is not AdamW:
                        p.grad *= clip
                if cls is AdamW:
                    optimizer.step(clip_scale=torch.tensor(clip, device=device))
                else:
                    optimizer.step()
        runs[name] = tensors(optimizer, ps)
    for mine, base, want in zip(runs["kernel"], runs["torch"], runs["truth"], strict=True):
        assert mine.dtype == torch.float32
        size = want.abs().max().item() if want.numel() else 0
        worst = [(x.double() - want).abs().max().item() if want.numel() else 0 for x in (mine, base)]
        assert worst[0] <= 2 * worst[1] + 2e-7 * size


@pytest.mark.slow
def test_kernel_obeys_the_rule_on_every_shape(device):
    check_against_float64(device, SHAPES, 1, 3, 0.25)


@pytest.mark.slow
@given(
    shapes=st.lists(st.sampled_from([(), (0,), (1,), (8,), (63,), (64,), (65,), (3, 43), (200,)]), min_size=1, max_size=6),
    data=st.data(),
)
def test_kernel_obeys_the_rule(device, shapes, data):
    seed, steps, clip = (data.draw(s) for s in (st.integers(0, 99), st.integers(1, 3), st.sampled_from([1.0, 0.25, 0.0])))
    check_against_float64(device, shapes, seed, steps, clip)


FORMS = [  # weights, gradient, state, master
    (torch.float32, torch.float32, torch.float32, False),
    (torch.float32, torch.float32, torch.bfloat16, False),
    (torch.float32, torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.bfloat16, torch.float32, False),
    (torch.bfloat16, torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float16, torch.bfloat16, True),
]


def members(form, shapes, device, seed=0, first=0, offset=0):
    """Members of a launch; ``offset`` elements stand before each tensor, and eight behind it."""
    g = torch.Generator().manual_seed(seed)

    def tensor(shape, dtype, scale=1.0):
        n = math.prod(shape)
        x = torch.randn(offset + n + 8, generator=g).to(device, dtype) * scale
        return x[offset : offset + n].view(shape)

    weight, gradient, state, master = form
    made = []
    for number, shape in enumerate(shapes):
        tensors = tensor(shape, weight), tensor(shape, gradient), tensor(shape, state, 0.1), tensor(shape, state, 0.1).square_()
        made.append(Member(*tensors, tensor(shape, torch.float32) if master else None, number, first))
    return made


def around(members):
    """Copies of what stands before and behind the tensors of members."""
    found = [(t._base, t.storage_offset(), t.numel()) for m in members for t in m[:5] if t is not None]
    return [torch.cat([base[:begin], base[begin + n :]]) for base, begin, n in found]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("first", "offset"),
    [(0, 0), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((0, 1), (64, 0), (24, 0), (13, 3)))],
)
def test_every_form_is_the_rounded_definition(device, error, form, first, offset):
    """Whole blocks and ragged ones, aligned or not, shards that begin anywhere: the random bits are those of the definition."""
    h = Hyperparameters(0.05, (0.8, 0.95), 1e-6, 0.1, seed=-5 if offset else 2**40 + 3, step=7)
    given = members(form, ((130,), (4, 15)), device, first=first, offset=offset)
    wanted = [adamw_reference(m, torch.tensor(0.5, device=device), h) for m in given]
    before = around(given)
    launch_step(given, torch.tensor(0.5, device=device), h, Table())
    assert all(torch.equal(a, b) for a, b in zip(before, around(given), strict=True))
    for m, (w, exp_avg, exp_avg_sq) in zip(given, wanted, strict=True):
        if m.master is not None:
            assert error(m.master, w) < 3e-7
            assert torch.equal(m.weight, m.master.to(m.weight.dtype))
        index = first + torch.arange(w.numel(), device=device)
        for stream, (got, want) in enumerate([(m.weight, w), (m.exp_avg, exp_avg), (m.exp_avg_sq, exp_avg_sq)]):
            if got.dtype == torch.float32:
                assert error(got, want) < 3e-7
            elif m.master is None or stream:
                bits = random_bits(index, m.number, stream, h.seed, h.step).view(want.shape)
                # A last bit of fp32 can tip one rounding over in thousands; bits of another element would tip half of them.
                assert (got != round_stochastically(want, bits)).double().mean() < 0.01


@pytest.mark.parametrize(("first", "over", "offset"), [(24, 0, 0), (0, -1, 0), (0, 0, 1), (0, 1, 0)])
def test_only_whole_and_aligned_blocks_are_taken_for_such(device, error, first, over, offset):
    """A first block that begins before the tensor, a last one that ends behind it, addresses that no wide load may have."""
    h = Hyperparameters(0.05, (0.8, 0.95), 1e-6, 0.1, seed=1, step=7)
    block = configuration("adamw", 1, torch.empty(1, device=device)).tiles["BLOCK"]
    given = members(FORMS[0], ((2 * block + over,),), device, first=first, offset=offset)
    wanted = adamw_reference(given[0], None, h)
    before = around(given)
    launch_step(given, torch.ones((), device=device), h, Table())
    assert all(torch.equal(a, b) for a, b in zip(before, around(given), strict=True))
    for got, want in zip((given[0].weight, given[0].exp_avg, given[0].exp_avg_sq), wanted, strict=True):
        assert error(got, want) < 3e-7


def test_nan_and_infinity_show(device):
    weight = torch.tensor([math.nan, math.inf, 1.0], device=device).bfloat16()
    gradient = torch.tensor([0.0, 0.0, math.nan], device=device)
    for name in ("torch", "triton"):
        p = torch.nn.Parameter(weight.clone())
        p.grad = gradient.bfloat16()
        with backend(name):
            AdamW([p], state_dtype=torch.bfloat16).step()
        assert p.isnan().tolist() == [True, False, True]
        assert p[1].item() == math.inf
        # The NaN that GPUs make: any random bits would carry it over into -0.
        p = torch.nn.Parameter(torch.ones(32, device=device))
        p.grad = torch.full((32,), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
        optimizer = AdamW([p], state_dtype=torch.bfloat16)
        with backend(name):
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].isnan().all()
        assert optimizer.state[p]["exp_avg_sq"].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_blocks(device, dtype):
    results = []
    for block in (16, 64):
        given = members((dtype, dtype, torch.bfloat16, False), ((70,), (9,)), device, first=13)
        target = "interpreter" if INTERPRET else "sm_90"
        row = {"kernel": "adamw", "target": target, "size": 1, "tiles": {"BLOCK": block}, "num_warps": 1, "num_stages": 1}
        with recording(target, [{**row, "bits": b} for b in (16, 32)]) as launches:
            launch_step(given, torch.ones((), device=device), Hyperparameters(0.1, (0.9, 0.9), 1e-8, 0.1, 1, 1), Table())
        (one,) = launches
        one.kernel[one.grid](*one.args, **one.constants)
        results.append([t for m in given for t in m[:4]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_blocks_may_change_between_steps(device, error):
    """The rows of the table stay as they are, its blocks do not."""
    runs = []
    for name in ("torch", "triton"):
        ps = parameters([(3000,)], torch.float32, 1, device)
        optimizer = AdamW(ps, lr=0.1)
        for i, block in enumerate((1024, 64, 1024)):
            row = {"kernel": "adamw", "target": "sm_90", "bits": 32, "size": 1, "tiles": {"BLOCK": block}}
            with backend(name), configured_for("sm_90", [{**row, "num_warps": 1, "num_stages": 1}]):
                train(optimizer, ps, 1, first=i)
        runs.append(ps[0].detach())
    assert error(*runs) < 1e-6


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_shards_round_as_the_whole_does(device, name):
    whole = parameters([(25, 3)], torch.bfloat16, 1, device)
    shards = [torch.nn.Parameter(whole[0].detach()[a:b].clone()) for a, b in ((0, 17), (17, 25))]
    for ps in (whole, *([s] for s in shards)):
        optimizer = AdamW(ps, lr=0.1, state_dtype=torch.bfloat16)
        optimizer.first_index = lambda p: 17 * 3 if p is shards[1] else 0
        (p,) = ps
        p.grad = p.detach() * 0.7
        with backend(name):
            optimizer.step()
            optimizer.step()
    assert torch.equal(torch.cat([s.detach() for s in shards]), whole[0])


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("master", [False, True])
def test_resumes_bit_for_bit(device, name, master):
    options = {**HYPER, "state_dtype": torch.bfloat16, "master_weights": master, "seed": 3}
    straight, ps = None, parameters(SHAPES, torch.bfloat16, 1, device)
    with backend(name):
        straight = AdamW(ps, **options)
        train(straight, ps, 4)
        again = parameters(SHAPES, torch.bfloat16, 1, device)
        first = AdamW(again, **options)
        train(first, again, 2)
        file = io.BytesIO()
        torch.save([first.state_dict(), [p.detach() for p in again]], file)
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        resumed = [torch.nn.Parameter(w) for w in weights]
        second = AdamW(resumed, lr=9.0)
        second.load_state_dict(state)
        train(second, resumed, 2, first=2)
    for a, b in zip(tensors(straight, ps), tensors(second, resumed), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_state_is_where_checkpoints_look_for_it():
    ps = parameters([(3, 2)], torch.bfloat16, 0)
    optimizer = AdamW(ps, master_weights=True)
    train(optimizer, ps, 2)
    state = optimizer.state[ps[0]]
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.float32, (3, 2)),
        "exp_avg_sq": (torch.float32, (3, 2)),
        "master": (torch.float32, (3, 2)),
    }
    assert float(state["step"]) == 2
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["lr"] == 1e-3
    twin.step()


def test_groups_and_missing_gradients(device, error):
    """Each group has its own numbers; a parameter without a gradient is left alone, and counts its own steps."""
    runs = []
    for cls, name in ((AdamW, "triton"), (torch.optim.AdamW, "torch")):
        a, b, c = parameters([(70,), (5,), (9,)], torch.float32, 2, device)
        optimizer = cls([{"params": [a, b], "weight_decay": 0.3}, {"params": [c], "lr": 0.2}], lr=0.1)
        with backend(name):
            train(optimizer, [a, c], 1)
            b.grad, b_before = None, b.detach().clone()
            assert torch.equal(b, b_before)
            train(optimizer, [a, b, c], 2, first=1)
        assert float(optimizer.state[b]["step"]) == 2
        runs.append(tensors(optimizer, [a, b, c]))
    assert all(error(x, y) < 1e-6 for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_which_parameters_have_gradients_may_change(device, name):
    small, large = parameters([(5,), (70,)], torch.float32, 2, device)
    optimizer = AdamW([small, large], lr=0.1)
    with backend(name):
        for p in (small, large):
            optimizer.zero_grad()
            before = p.detach().clone()
            train(optimizer, [p], 1)
            assert (p != before).all()


def test_gradients_may_move_and_state_may_be_replaced(device):
    """Addresses are kept between steps, and must be noticed when they change."""
    runs = []
    for name in ("torch", "triton"):
        ps = parameters([(70,), (5,)], torch.float32, 3, device)
        optimizer = AdamW(ps, lr=0.1)
        with backend(name):
            train(optimizer, ps, 2)
            kept = [p.grad for p in ps]
            for p, g in zip(ps, kept, strict=True):
                g.neg_()
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] * 2
                optimizer.state[p]["step"] = optimizer.state[p]["step"].to(device)
            optimizer.step()
            for p in ps:
                p.grad = p.detach().clone()
            ps[0].data = ps[0].data.clone()
            optimizer.step()
        runs.append(tensors(optimizer, ps))
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(*runs, strict=True))


def test_strides_that_differ_run_too(device):
    runs = []
    for name in ("torch", "triton"):
        p = torch.nn.Parameter(torch.arange(12.0, device=device).view(3, 4).T)
        q = torch.nn.Parameter(torch.arange(12.0, device=device).view(4, 3))
        p.grad, q.grad = (
            torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).to(device),
            q.detach().reshape(3, 4).T.contiguous().view(3, 4).T,
        )
        with backend(name):
            AdamW([p, q], lr=0.1).step()
        runs.append([p.detach(), q.detach()])
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(*runs, strict=True))


def test_dtensors_are_updated_by_their_shards_and_saved_by_dcp():
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        models = []
        for _ in range(3):
            models.append(torch.nn.Linear(3, 4))
            models[-1].load_state_dict(models[0].state_dict())
            models[-1].bfloat16()
        plain, sharded, resumed = models
        for model in (sharded, resumed):
            for name, p in list(model.named_parameters()):
                setattr(model, name, torch.nn.Parameter(DTensor.from_local(p.detach(), mesh, [Shard(0)])))
        optimizers = [AdamW(m.parameters(), lr=0.1, state_dtype=torch.bfloat16) for m in models]
        steps = [(plain, 0, 2), (sharded, 0, 1), (resumed, 1, 1)]
        for (model, first, number), optimizer in zip(steps, optimizers, strict=True):
            if model is resumed:
                resumed.load_state_dict(sharded.state_dict())
                set_optimizer_state_dict(resumed, optimizer, get_optimizer_state_dict(sharded, optimizers[1]))
            for i in range(first, first + number):
                for p in model.parameters():
                    g = torch.full(p.shape, i + 1.0, dtype=p.dtype)
                    p.grad = g if model is plain else DTensor.from_local(g, mesh, [Shard(0)])
                optimizer.step()
        for p, q in zip(plain.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(p, q.to_local())
            state, other = optimizers[0].state[p], optimizers[2].state[q]
            assert torch.equal(state["exp_avg"], other["exp_avg"].to_local())
            assert float(state["step"]) == float(other["step"]) == 2
    finally:
        dist.destroy_process_group()


def test_closure_and_clip_scale():
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() < 3.0
    optimizer = AdamW([p], betas=(0.0, 0.0))
    p.grad = torch.tensor([4.0])
    optimizer.step(clip_scale=torch.tensor(0.5))
    assert optimizer.state[p]["exp_avg"].item() == 2.0
    assert p.grad.item() == 4.0
    for scale, message in ((0.5, "clip_scale is 0.5; pass a tensor"), (torch.ones(1), r"clip_scale is \(1,\); pass a tensor")):
        with pytest.raises(ValueError, match=message):
            optimizer.step(clip_scale=scale)


@pytest.mark.slow
def test_any_order_of_the_grid_gives_the_same_bits(check_grid_order, device):
    form = (torch.bfloat16, torch.float32, torch.bfloat16, False)

    def function():
        given = members(form, ((150,), (40,)), device, offset=1)
        launch_step(given, torch.ones((), device=device), Hyperparameters(0.1, (0.9, 0.9), 1e-8, 0.1, 1, 1), Table())
        return tuple(t for m in given for t in m[:4])

    check_grid_order(function, [])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="loads and stores are counted in the interpreter")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_traffic_is_the_formula(monkeypatch, form):
    """Of whole blocks; beside them a program reads its row of the table, which is counted apart."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = {"bytes": 0, "small": 0}

    def counting(name, value):
        original = getattr(InterpreterBuilder, name)

        def method(self, *args):
            out = original(self, *args)
            pointers, data = args[0].data, (args[1] if value else out).data
            moved["bytes" if pointers.size > 1 else "small"] += pointers.size * data.dtype.itemsize
            return out

        monkeypatch.setattr(InterpreterBuilder, name, method)

    counting("create_masked_load", False)
    counting("create_masked_store", True)
    block = configuration("adamw", 1, torch.empty(1, dtype=form[0])).tiles["BLOCK"]
    given = members(form, ((2 * block,), (block,)), "cpu")
    launch_step(given, torch.ones(()), Hyperparameters(0.1, (0.9, 0.9), 1e-8, 0.1, 1, 1), Table())
    assert moved["bytes"] == adamw_traffic(3 * block, form[0], form[1], form[2], form[3])
    assert moved["small"] < 300 * 3


def test_traffic_of_known_forms():
    assert adamw_traffic(10, torch.float32, torch.float32, torch.float32, False) == 280
    assert adamw_traffic(10, torch.bfloat16, torch.bfloat16, torch.float32, False) == 220
    assert adamw_traffic(10, torch.bfloat16, torch.bfloat16, torch.bfloat16, False) == 140
    assert adamw_traffic(10, torch.bfloat16, torch.bfloat16, torch.float32, True) == 280


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas = \(1.0, 0.9\)"),
        ({"state_dtype": torch.float16}, "state_dtype = torch.float16"),
        ({"params": [torch.nn.Parameter(torch.ones(2).half())]}, r"a parameter \(2,\) of torch.float16"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"params": [torch.nn.Parameter(torch.ones(1))], **changes})


def test_sparse_gradients_are_refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"parameter 0 \(3,\) is sparse"):
        AdamW([p]).step()
