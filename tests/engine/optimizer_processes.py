"""Run by torchrun from test_optimizers_distributed.py: optimisers and norms on every layout of the processes, against one process.

Writes what it found as JSON to the file named on the command line: {case: {finding: number}}.
"""

import json
import sys
from itertools import count

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from smalt.engine.muon import Muon
from smalt.engine.norms import module_norms, optimizer_norms
from smalt.engine.optimizers import build_optimizer, optimizer_tensors, set_learning_rate
from smalt.engine.sections import OptimizerConfig, StageConfig
from smalt.kernels import AdamW
from smalt.model import LanguageConfig, ModelConfig, VisionConfig, build_model
from smalt.parallel import ParallelConfig, World, alone
from smalt.parallel.layout import first_index, part_bounds
from smalt.parallel.mesh import build_meshes
from smalt.parallel.whole import rounds

# No dim of 20 or 12 rows divides by 8, and vectors of 6 leave processes of 4 with nothing at chunks of 2.
MODEL = ModelConfig(
    vision=VisionConfig(num_layers=2, width=12, num_heads=2, ffn=20, patch=2, tile=4),
    language=LanguageConfig(num_layers=2, width=10, num_heads=2, num_kv_heads=1, head_dim=6, ffn=14, vocabulary=29, rope_theta=1e4),
)
STAGE = StageConfig(
    steps=3, sequence_length=8, mixture={"read": 1.0}, trainable={"vision": 0.5, "projector": 1.0, "language": 1.0},
    learning_rate=1e-2, vision_layer_decay=0.7,
)  # fmt: skip
STEPS = 3
KINDS = {
    "adamw": {},
    "smalt_adamw": {},
    "muon": {},
    "adamw, offload": {"offload": "cpu"},
    "smalt_adamw, offload": {"offload": "cpu"},
}


def optimizer_of(model, kind, **values):
    return build_optimizer(model, STAGE, OptimizerConfig(kind=kind.split(",")[0], **values))


def gradient(name, shape, step, dtype):
    generator = torch.Generator().manual_seed(sum(name.encode()) * 100 + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train(model, optimizer):
    """Steps with gradients that depend on the name and the step alone; torch cuts them."""
    for step in range(STEPS):
        for name, p in model.named_parameters():
            full = gradient(name, p.shape, step, p.dtype)
            p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full
        set_learning_rate(optimizer, 1e-2 * (step + 1))
        optimizer.step()


def sharded(layout, dtype):
    """fsdp: cut over all processes. hsdp: the vision tower so, everything else over half of them, with replicas: two meshes."""
    model, size = build_model(MODEL, 0, "cpu", dtype), dist.get_world_size()
    vision = rest = init_device_mesh("cpu", (size,), mesh_dim_names=("fsdp",))
    if layout == "hsdp":
        rest = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "fsdp"))
    fully_shard(model.vision, mesh=vision)
    for block in model.language.blocks.values():
        fully_shard(block, mesh=rest)
    return fully_shard(model, mesh=rest)


def everything(model, optimizer):
    names = {p: n for n, p in model.named_parameters()}
    return {**{n: whole(p) for p, n in names.items()}, **{k: whole(t) for k, t in optimizer_tensors(optimizer, names).items()}}


def error(got, want):
    assert got.keys() == want.keys()
    return max(float((got[k].double() - want[k].double()).abs().max() / want[k].double().abs().max().clamp(min=1e-3)) for k in want)


def largest(value):
    """Of all processes."""
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def model_case(layout):
    """Weights and state of every kind, in float64, and of rounding to bfloat16 and of the CPU, to the bit."""
    found = {}
    for kind, values in KINDS.items():
        one = build_model(MODEL, 0, "cpu", torch.float64)
        ours = sharded(layout, torch.float64)
        optimizers = [optimizer_of(m, kind, **values) for m in (ours, one)]
        for model, optimizer in zip((ours, one), optimizers, strict=True):
            train(model, optimizer)
        found[kind] = largest(error(everything(ours, optimizers[0]), everything(one, optimizers[1])))
        moments = [
            t for k, t in optimizer_tensors(optimizers[0], {p: n for n, p in ours.named_parameters()}).items() if ".step." not in k
        ]
        assert all(isinstance(t, DTensor) for t in moments)
        found[f"{kind}: share of the state"] = largest(sum(t.to_local().numel() for t in moments) / sum(t.numel() for t in moments))
        found[f"{kind}: norms"] = largest(norms_error(ours, one, optimizers))
    for values in ({}, {"offload": "cpu"}):
        one, ours = build_model(MODEL, 0), sharded(layout, torch.float32)
        optimizers = [optimizer_of(m, "smalt_adamw", state_dtype="bfloat16", **v) for m, v in ((ours, values), (one, {}))]
        for model, optimizer in zip((ours, one), optimizers, strict=True):
            train(model, optimizer)
        got, want = everything(ours, optimizers[0]), everything(one, optimizers[1])
        found[f"rounded, {values}"] = largest(sum(not torch.equal(got[k], want[k]) for k in want))
    for kind in ("adamw", "smalt_adamw"):
        pair = [sharded(layout, torch.float32) for _ in range(2)]
        optimizers = [optimizer_of(pair[0], kind), optimizer_of(pair[1], kind, offload="cpu")]
        for model, optimizer in zip(pair, optimizers, strict=True):
            train(model, optimizer)
        want, got = (everything(m, o) for m, o in zip(pair, optimizers, strict=True))
        found[f"offload bits, {kind}"] = largest(sum(not torch.equal(got[k], want[k]) for k in want))
    return found


def worlds():
    """All processes, and this one alone."""
    size, single = dist.get_world_size(), alone(torch.device("cpu"))
    parallel = ParallelConfig(fsdp=size)
    return World(dist.get_rank(), size, single.device, parallel, build_meshes(parallel, "cpu")), single


def norms_error(ours, one, optimizers):
    """Of weights, gradients and state, all against one process; each process must have the same."""
    errors = []
    pairs = [
        [module_norms(dict(m.named_parameters()), w) for m, w in zip((ours, one), worlds(), strict=True)],
        [module_norms({n: p.grad for n, p in m.named_parameters()}, w) for m, w in zip((ours, one), worlds(), strict=True)],
        [
            optimizer_norms(o, {p: n for n, p in m.named_parameters()}, w)
            for m, o, w in zip((ours, one), optimizers, worlds(), strict=True)
        ],
    ]
    for got, want in pairs:
        assert list(got) == list(want)
        errors += [abs(got[k] - want[k]) / want[k] for k in want]
    return max(errors)


class Blocks(nn.Module):
    """Two projections as tensor parallelism cuts them, by columns and by rows, and a norm that it leaves whole."""

    def __init__(self, tp):
        super().__init__()
        torch.manual_seed(0)
        for i in range(3):
            # An odd number of rows a process, which FSDP2 then cuts unevenly.
            self.add_module(f"up{i}", nn.Linear(6, tp * (5 + 2 * i), bias=False))
            self.add_module(f"down{i}", nn.Linear(tp * (5 + 2 * i), 6, bias=False))
        self.norm = nn.LayerNorm(6)
        self.double()

    def forward(self, x):
        for i in range(3):
            x = x + self.get_submodule(f"down{i}")(self.get_submodule(f"up{i}")(self.norm(x)).tanh())
        return x


def tensor_parallel(mesh, data, model):
    plan = {f"up{i}": ColwiseParallel() for i in range(3)} | {f"down{i}": RowwiseParallel() for i in range(3)}
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh[data])
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    return model


def tensor_parallel_case(shape, axes):
    """Muon over FSDP2 on tensor parallelism, with the gradients of a real backward pass."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    data = axes[:-1] if len(axes) > 2 else axes[0]
    ours, one = tensor_parallel(mesh, data, Blocks(shape[-1])), Blocks(shape[-1])
    index, shares = dist.get_rank() // shape[-1], dist.get_world_size() // shape[-1]
    optimizers = []
    for model in (ours, one):
        groups = [{"params": [p], "weight_decay": 0.1, "multiplier": 1.0, "muon": p.ndim == 2} for p in model.parameters()]
        optimizers.append(Muon(groups))
    for step in range(STEPS):
        x = gradient("x", (4 * shares, 6), step, torch.float64)
        for model, rows, optimizer in ((ours, x[4 * index : 4 * index + 4], optimizers[0]), (one, x, optimizers[1])):
            model(rows).square().sum().backward()
            set_learning_rate(optimizer, 1e-2)
            optimizer.step()
            if step < STEPS - 1:
                optimizer.zero_grad()
    placements = [str(p.placements) for p in ours.parameters()]
    names = [f"language.blocks.0.{n}" for n, _ in ours.named_parameters()]
    grads = [
        module_norms({n: p.grad for n, p in zip(names, m.parameters(), strict=True)}, w)
        for m, w in zip((ours, one), worlds(), strict=True)
    ]
    calls = count()
    matrices = [p for p in ours.parameters() if p.ndim == 2]
    for dealt in rounds(matrices):
        dealt.map([p.to_local().detach() for p in dealt.matrices], lambda m: (next(calls), m)[1])
    computed = torch.tensor([next(calls)])
    dist.all_reduce(computed)
    for p in matrices:
        full = whole(p)
        bounds = part_bounds(p, p.device_mesh.get_coordinate())
        assert torch.equal(full[tuple(slice(*b) for b in bounds)], p.to_local())
    norm = grads[0]["language.blocks.0"] / grads[1]["language.blocks.0"] - 1
    return {
        "strided": sum("_S" in p for p in placements),
        "error": largest(error(everything(ours, optimizers[0]), everything(one, optimizers[1]))),
        "norm": largest(abs(norm)),
        "matrices computed": int(computed),
        "matrices": len(matrices) * (shape[0] if len(axes) > 2 else 1),
    }


def placements_case():
    """Any placements: norms, whole matrices and first indices, with parts of unequal size and empty ones."""
    size = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (2, size // 2))]
    tensors, wholes, worst = {}, {}, 0.0
    for m, mesh in enumerate(meshes):
        choices = [Shard(0), Shard(1), Replicate()]
        for i, placements in enumerate([[c] for c in choices] if mesh.ndim == 1 else [[a, b] for a in choices for b in choices]):
            for shape in ((3, 7), (8, 4), (1, 1)):
                name = f"language.blocks.{m}{i}{shape[0]}.up"
                wholes[name] = gradient(name, shape, 0, torch.float64)
                tensors[name] = distribute_tensor(wholes[name], mesh, placements)
                coordinate = mesh.get_coordinate()
                bounds = part_bounds(tensors[name], coordinate)
                assert torch.equal(wholes[name][tuple(slice(*b) for b in bounds)], tensors[name].to_local()), (name, placements)
                if tensors[name].to_local().numel():
                    assert wholes[name].flatten()[first_index(tensors[name])] == tensors[name].to_local().flatten()[0]
    norms = [module_norms(t, w) for t, w in zip((tensors, wholes), worlds(), strict=True)]
    worst = max(abs(norms[0][k] - norms[1][k]) / norms[1][k] for k in norms[1])
    inverse = {tensor: name for name, tensor in tensors.items()}
    exchange = 0.0
    for dealt in rounds(tensors.values()):
        parts = dealt.map([t.to_local() for t in dealt.matrices], lambda m: m.flip(0) * m.sum())
        for tensor, part in zip(dealt.matrices, parts, strict=True):
            full = wholes[inverse[tensor]]
            want = (full.flip(0) * full.sum())[tuple(slice(*b) for b in part_bounds(tensor, tensor.device_mesh.get_coordinate()))]
            exchange = max([exchange, *(part - want).abs().flatten().tolist()])
    return {"norms": largest(worst), "exchange": largest(exchange)}


def main(path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    assert AdamW.first_index is None
    found = {"fsdp": model_case("fsdp"), "hsdp": model_case("hsdp"), "placements": placements_case()}
    found["tp"] = tensor_parallel_case((1, size), ("fsdp", "tp"))
    if size == 4:
        found["tp and fsdp"] = tensor_parallel_case((2, 2), ("fsdp", "tp"))
        found["tp, fsdp and replicas"] = tensor_parallel_case((2, 1, 2), ("dp", "fsdp", "tp"))
    if dist.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
