"""The optimisers of a stage: which parameter is in which group, what a step computes, what a checkpoint holds of them."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smalt.engine import offload
from smalt.engine.apex_adam import ApexAdam, find_fused_adam
from smalt.engine.config import load_config
from smalt.engine.errors import UserError
from smalt.engine.muon import COEFFICIENTS, ITERATIONS, Muon, newton_schulz
from smalt.engine.norms import module_norms, module_of, optimizer_norms
from smalt.engine.offload import Offloaded
from smalt.engine.optimizers import build_optimizer, optimizer_tensors, parameter_groups, set_learning_rate
from smalt.engine.sections import OptimizerConfig, StageConfig
from smalt.model import LanguageConfig, ModelConfig, VisionConfig, build_model
from smalt.parallel import alone

ALONE = alone(torch.device("cpu"))
MODEL = ModelConfig(
    vision=VisionConfig(num_layers=3, width=12, num_heads=2, ffn=20, patch=2, tile=4),
    language=LanguageConfig(num_layers=2, width=16, num_heads=2, num_kv_heads=1, head_dim=8, ffn=24, vocabulary=30, rope_theta=1e4),
)
KINDS = [
    {"kind": "adamw"},
    {"kind": "smalt_adamw"},
    {"kind": "smalt_adamw", "state_dtype": "bfloat16"},
    {"kind": "muon"},
    {"kind": "adamw", "offload": "cpu"},
    {"kind": "smalt_adamw", "offload": "cpu"},
    {"kind": "smalt_adamw", "state_dtype": "bfloat16", "offload": "cpu"},
]


def stage(**values):
    trainable = {"vision": 0.5, "projector": 1.0, "language": 1.0}
    return StageConfig(
        **{"steps": 9, "sequence_length": 8, "mixture": {"read": 1.0}, "trainable": trainable, "learning_rate": 1e-2, **values}
    )


@pytest.fixture
def make():
    """make(stage, dtype, **optimizer): a model, its optimiser and its parameters' names."""

    def build(stage=stage(), dtype=torch.float32, **values):  # noqa: B008 - it is frozen
        model = build_model(MODEL, 0, "cpu", dtype)
        for name, part in model.named_children():
            part.requires_grad_(name in stage.trainable)
        optimizer = build_optimizer(model, stage, OptimizerConfig(**values))
        return model, optimizer, {p: n for n, p in model.named_parameters()}

    return build


def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        set_learning_rate(optimizer, 1e-2 / (1 + number))
        optimizer.step()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_groups_are_few_and_hold_every_trainable_parameter_once(make):
    for kind, expected in (("adamw", 4), ("muon", 6)):
        _, optimizer, names = make(kind=kind)
        # vision at half the rate and the rest, each with and without decay; Muon's matrices apart.
        assert len(optimizer.param_groups) == expected
        found = [names[p] for group in optimizer.param_groups for p in group["params"]]
        assert sorted(found) == sorted(names.values())
    _, optimizer, names = make(stage(trainable={"projector": 1.0}))
    assert {names[p] for g in optimizer.param_groups for p in g["params"]} == {n for n in names.values() if n.startswith("projector")}


def test_matrices_decay_and_vectors_do_not(make):
    _, optimizer, _ = make(weight_decay=0.3)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_muon_has_the_matrices_of_blocks_and_projector(make):
    _, optimizer, names = make(kind="muon")
    for group in optimizer.param_groups:
        for p in group["params"]:
            inside = ".blocks." in names[p] or names[p].startswith("projector.")
            assert group["muon"] == (inside and names[p].endswith("weight") and "norm" not in names[p]), names[p]
    assert not any(g["muon"] for g in make()[1].param_groups)


def test_learning_rates_of_the_vision_tower_by_layer(make):
    _, optimizer, names = make(stage(vision_layer_decay=0.8, trainable={"vision": 0.5, "projector": 2.0, "language": 1.0}))
    set_learning_rate(optimizer, 3.0)
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for prefix, power in (("blocks.2", 1), ("blocks.1", 2), ("blocks.0", 3), ("patch_embed", 4), ("position", 4), ("norm", 0)):
        ours = {rate for name, rate in rates.items() if name.startswith(f"vision.{prefix}")}
        assert list(ours) == pytest.approx([3.0 * 0.5 * 0.8**power]), prefix
    assert {rate for name, rate in rates.items() if name.startswith("projector")} == {6.0}
    assert {rate for name, rate in rates.items() if name.startswith("language")} == {3.0}
    assert len(optimizer.param_groups) == 2 * 4 + 1 + 2 + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer.kind": "lion"}, ["optimizer.kind", "'lion'", "muon"]),
        ({"optimizer.kind": "muon", "optimizer.offload": "cpu"}, ["optimizer", "offload", "adamw and smalt_adamw", "muon"]),
        ({"optimizer.state_dtype": "bfloat16"}, ["optimizer", "state_dtype", "smalt_adamw", "not with adamw"]),
        ({"optimizer.momentum": 1.0}, ["optimizer.momentum", "1.0"]),
        ({"stages.sft.vision_layer_decay": 1.5}, ["stages.sft.vision_layer_decay", "1.5"]),
        ({"stages.sft.vision_layer_decay": 0}, ["stages.sft.vision_layer_decay", "0"]),
    ],
    ids=repr,
)
def test_a_wrong_value_is_named(tiny_config, changes, said):
    with pytest.raises(UserError) as caught:
        load_config(tiny_config(changes))
    assert all(part in str(caught.value) for part in said), caught.value


def test_a_process_with_nothing_to_train(make):
    for kind in KINDS:
        model, optimizer, names = make(**kind)
        model.requires_grad_(False)
        optimizer = build_optimizer(model, stage(), OptimizerConfig(**kind))
        before = {n: p.clone() for p, n in names.items()}
        set_learning_rate(optimizer, 1.0)
        optimizer.step()
        assert same({n: p for p, n in names.items()}, before)
        assert optimizer_tensors(optimizer, names) == {}
        assert optimizer_norms(optimizer, names, ALONE) == {}


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_newton_schulz_is_a_polynomial_of_the_singular_values(rows, columns, scale, seed):
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (matrix.norm() + 1e-7)
    for _ in range(ITERATIONS):
        s = COEFFICIENTS[0] * s + COEFFICIENTS[1] * s**3 + COEFFICIENTS[2] * s**5
    assert torch.allclose(newton_schulz(matrix), u @ s.diag() @ vh, rtol=0, atol=1e-10)


def test_newton_schulz_of_zeros():
    assert torch.equal(newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_muon_steps_by_the_formula(error):
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(6, 4).double()), nn.Parameter(torch.randn(5).double())
    groups = [
        {"params": [matrix], "weight_decay": 0.1, "muon": True},
        {"params": [vector], "weight_decay": 0.2, "muon": False},
    ]
    optimizer = Muon(groups, lr=0.02, momentum=0.9, betas=(0.8, 0.95), eps=1e-6)
    twin = nn.Parameter(vector.detach().clone())
    adamw = torch.optim.AdamW([twin], 0.02, (0.8, 0.95), 1e-6, 0.2)
    want, momentum = matrix.detach().clone(), torch.zeros(6, 4).double()
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(6, 4).double(), torch.randn(5).double()
        twin.grad = vector.grad.clone()
        momentum = 0.9 * momentum + matrix.grad
        want = want * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(6) * newton_schulz(matrix.grad + 0.9 * momentum)
        optimizer.step()
        adamw.step()
    assert error(matrix.detach(), want) < 1e-14
    assert error(vector.detach(), twin.detach()) < 1e-14


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    # Moonshot's 0.2: AdamW's steps have an RMS of 0.2 to 0.4 times the learning rate.
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([{"params": [p], "muon": True}], lr=1.0).step()
        assert 0.15 < p.detach().square().mean().sqrt() < 0.25, shape


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"shapes \[\(3,\)\] are no matrices"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "smalt_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bucket", [1, 500, 1 << 25])
def test_offload_changes_no_bit(make, monkeypatch, kind, dtype, bucket):
    monkeypatch.setattr(offload, "BUCKET", bucket)
    model, optimizer, names = make(kind=kind, dtype=dtype)
    ours, offloaded, our_names = make(kind=kind, dtype=dtype, offload="cpu")
    assert isinstance(offloaded, Offloaded)
    for m, o in ((model, optimizer), (ours, offloaded)):
        steps(m, o, range(3))
    assert same(dict(ours.named_parameters()), dict(model.named_parameters()))
    assert same(optimizer_tensors(offloaded, our_names), optimizer_tensors(optimizer, names))


def test_offload_steps_the_weights_as_they_are_now(make):
    model, optimizer, _ = make(offload="cpu")
    plain, other, _ = make()
    with torch.no_grad():
        for m in (model, plain):
            m.projector.up.weight.fill_(3.0)
    for m, o in ((model, optimizer), (plain, other)):
        steps(m, o, range(2))
    assert same(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_smalt_adamw_is_adamw(make, error):
    model, optimizer, _ = make(kind="smalt_adamw", dtype=torch.float64)
    plain, other, _ = make(dtype=torch.float64)
    for m, o in ((model, optimizer), (plain, other)):
        steps(m, o, range(3))
    assert max(error(a.detach(), b.detach()) for a, b in zip(model.parameters(), plain.parameters(), strict=True)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_tensors_restore_the_optimizer(make, kind):
    model, optimizer, names = make(**kind)
    steps(model, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, names).items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    steps(model, optimizer, range(2, 4))
    fresh, again, fresh_names = make(**kind)
    fresh.load_state_dict(weights)
    empty = optimizer_tensors(again, fresh_names)
    assert {k: (t.shape, t.dtype, t.device) for k, t in empty.items()} == {k: (t.shape, t.dtype, t.device) for k, t in saved.items()}
    assert not any(t.any() for t in empty.values())
    for key, tensor in empty.items():
        tensor.copy_(saved[key])
    steps(fresh, again, range(2, 4))
    assert same(dict(fresh.named_parameters()), dict(model.named_parameters()))
    assert same(optimizer_tensors(again, fresh_names), optimizer_tensors(optimizer, names))


def test_the_names_of_the_tensors(make):
    _, optimizer, names = make(kind="muon")
    keys = set(optimizer_tensors(optimizer, names))
    assert "optimizer.momentum.language.blocks.0.attention.q.weight" in keys
    assert {f"optimizer.{s}.language.embedding.weight" for s in ("step", "exp_avg", "exp_avg_sq")} <= keys
    _, optimizer, names = make()
    assert set(optimizer_tensors(optimizer, names)) == {
        f"optimizer.{s}.{n}" for s in ("step", "exp_avg", "exp_avg_sq") for n in names.values()
    }


def test_state_in_bfloat16(make):
    _, optimizer, names = make(kind="smalt_adamw", state_dtype="bfloat16")
    for key, tensor in optimizer_tensors(optimizer, names).items():
        assert tensor.dtype == (torch.float32 if ".step." in key else torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("vision.blocks.3.q.weight", "vision.blocks.3"),
        ("vision.patch_embed.weight", "vision.patch_embed"),
        ("vision.position", "vision.position"),
        ("projector.up.bias", "projector"),
        ("language.embedding.weight", "language.embedding"),
        ("language.blocks.0.attention.q_norm.weight", "language.blocks.0"),
        ("language.norm.weight", "language.norm"),
    ],
)
def test_modules(name, module):
    assert module_of(name) == module


def test_norms_by_module(make):
    model, optimizer, names = make(kind="muon", dtype=torch.float64)
    steps(model, optimizer, range(2))
    norms = module_norms(dict(model.named_parameters()), ALONE)
    block = torch.cat([p.detach().flatten() for p in model.language.blocks["1"].parameters()])
    assert norms["language.blocks.1"] == pytest.approx(float(block.norm()), rel=1e-14)
    assert set(norms) == {module_of(n) for n in names.values()}
    state = optimizer_norms(optimizer, names, ALONE)
    momentum = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.projector.parameters() if p.ndim == 2])
    assert state["momentum/projector"] == pytest.approx(float(momentum.norm()), rel=1e-14)
    assert {key.split("/")[0] for key in state} == {"momentum", "exp_avg", "exp_avg_sq"}
    # In float64 whatever the tensors are: float32 would overflow here.
    large = module_norms({"projector.up.weight": torch.full((2, 2), 1e30)}, ALONE)
    assert large["projector"] == pytest.approx(2e30, rel=1e-6)


# apex


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(files): packages of these files, first on the path."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    yield write
    for name in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


FUSED_ADAM = '''
import torch


class FusedAdam(torch.optim.Optimizer):
    """The arithmetic and the bookkeeping of NVIDIA's, in torch: the step is counted by group, the state is made where it is empty."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay))

    def step(self):
        for group in self.param_groups:
            group["params"][0].device
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    assert type(p.data) is torch.Tensor and type(p.grad) is torch.Tensor
                    state, (b1, b2), t = self.state[p], group["betas"], group["step"]
                    if len(state) == 0:
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                    m, v = state["exp_avg"].lerp_(p.grad, 1 - b1), state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"]) + group["weight_decay"] * p.data
                    p.data.add_(update, alpha=-group["lr"])
'''
NVIDIAS = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam"}


def test_apex_that_is_not_installed_is_named(make):
    with pytest.raises(UserError, match=r"apex is not installed; build NVIDIA's from https://github.com/NVIDIA/apex"):
        make(kind="apex")


def test_another_project_named_apex_is_named(make, install):
    folder = install({
        "apex/__init__.py": "raise RuntimeError('not to be imported')",
        "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n",
    })  # fmt: skip
    with pytest.raises(UserError) as caught:
        make(kind="apex")
    assert all(part in str(caught.value) for part in ("apex 0.9.10.dev0", str(folder), "another project than NVIDIA's", "uninstall"))


def test_apex_without_its_extension_is_named(make, install):
    install({**NVIDIAS, "apex/optimizers/fused_adam.py": FUSED_ADAM})
    with pytest.raises(UserError, match=r"without its CUDA extension amp_C"):
        make(kind="apex")


def test_apex_on_the_cpu_is_refused(make, install):
    install({**NVIDIAS, "apex/optimizers/fused_adam.py": FUSED_ADAM, "amp_C.py": ""})
    with pytest.raises(UserError, match=r"parameters are torch.float32 on cpu, and FusedAdam trains float32 on a GPU"):
        make(kind="apex")


def test_steps_of_apex_and_its_state(make, install, error):
    # NVIDIA's needs a GPU: a class with its interface stands in, to test what is around it.
    install({**NVIDIAS, "apex/optimizers/fused_adam.py": FUSED_ADAM, "amp_C.py": ""})
    plain, adamw, _ = make()
    steps(plain, adamw, range(4))

    def build():
        model = build_model(MODEL, 0)
        groups = parameter_groups(model, stage(), OptimizerConfig(kind="apex"))
        return model, ApexAdam(groups, find_fused_adam(), 1e-2, (0.9, 0.95), 1e-8), {p: n for n, p in model.named_parameters()}

    model, optimizer, names = build()
    steps(model, optimizer, range(2))
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, names).items()}
    assert all(value == 2 for key, value in saved.items() if ".step." in key)
    again, resumed, names = build()
    again.load_state_dict(model.state_dict())
    for key, tensor in optimizer_tensors(resumed, names).items():
        tensor.copy_(saved[key])
    for m, o in ((model, optimizer), (again, resumed)):
        steps(m, o, range(2, 4))
    assert same(dict(again.named_parameters()), dict(model.named_parameters()))
    assert max(error(a.detach(), b.detach()) for a, b in zip(model.parameters(), plain.parameters(), strict=True)) < 1e-5


def test_apex_counts_the_steps_of_a_part_that_began_before_the_others(make, install, error):
    install({**NVIDIAS, "apex/optimizers/fused_adam.py": FUSED_ADAM, "amp_C.py": ""})
    plain, adamw, _ = make()
    model = build_model(MODEL, 0)
    groups = parameter_groups(
        model, stage(trainable=dict.fromkeys(("vision", "projector", "language"), 1.0)), OptimizerConfig(kind="apex")
    )
    apex = ApexAdam(groups, find_fused_adam(), 1e-2, (0.9, 0.95), 1e-8)
    for group in adamw.param_groups:
        group["multiplier"] = 1.0
    for m, o in ((plain, adamw), (model, apex)):
        for learning, numbers in ((("projector",), range(3)), (("vision", "projector", "language"), range(3, 5))):
            for name, part in m.named_children():
                part.requires_grad_(name in learning)
            steps(m, o, numbers)
    assert max(error(a.detach(), b.detach()) for a, b in zip(model.parameters(), plain.parameters(), strict=True)) < 1e-5
