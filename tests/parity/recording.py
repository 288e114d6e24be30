"""Training on drawn packs, with a record of every collective that a rank launches, in their order."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import workload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from smalt.model import pack
from smalt.parallel import ParallelModel
from smalt.parallel.compat import recorded_collectives

KINDS = ("allgather", "allreduce", "reducescatter", "alltoall", "broadcast", "barrier", "send", "recv")


def kind_of(name):
    plain = name.lower().replace("_", "")
    return next((kind for kind in KINDS if kind in plain), None)


class Recorder(TorchDispatchMode):
    """Every collective that this process launches, whichever part of torch asks for it, forward and backward.

    Each goes to ``write`` before it starts: kind, group (axis and ranks), sizes and dtype of the tensors, peer (its number in the
    group) of a send or receive, splits of an all-to-all. The rows of the exchange of tiles, [V, C], come from the data and are left
    out; every other size is a function of the layout. groups: what to call those of these names.
    """

    def __init__(self, groups, write):
        super().__init__()
        self.groups, self.write = groups, write

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # a DTensor is taken apart first: its collectives come here again
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and (kind := kind_of(func.name())):
            self._add(kind, {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)})
        return func(*args, **(kwargs or {}))

    def _add(self, kind, given):
        group = given.get("group_name", given.get("process_group"))
        if isinstance(group, torch.ScriptObject):
            group = dist.ProcessGroup.unbox(group)
        name = group if isinstance(group, str) else group.group_name
        tensors = [t for value in given.values() for t in _tensors(value)]
        sizes = [list(t.shape) for t in tensors]
        splits = [list(given[k]) for k in ("input_split_sizes", "output_split_sizes") if k in given]
        if kind == "alltoall" and len(sizes[0]) == 2:
            sizes = [["rows of tiles", *size[1:]] for size in sizes]
        self.write(
            {
                "kind": kind, "group": self.groups[name], "sizes": sizes, "dtype": str(tensors[0].dtype) if tensors else "",
                "peer": given.get("dst", given.get("src")), "splits": splits,
            }
        )  # fmt: skip


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def make_packs(step, number):
    """The packs of a drawn step: of each its documents, as runs of tokens and tiles."""
    made = []
    for i, documents in enumerate(step):
        rng = np.random.default_rng((number, i))
        drawn = [workload.make_document(runs, rng) for runs in documents]
        made.append(pack(drawn, workload.LENGTH, "bidirectional", workload.VISION.tile))
    return made


def run_steps(case, world):
    """Evaluate and train on each of the case's steps. The record is written line by line, for gloo aborts where collectives differ."""
    model = ParallelModel(workload.make_config(case["variant"]), world, 0, torch.float32, workload.ALL, workload.LENGTH)
    meshes = {f"{mesh}/{axis}": m.get_group(axis) for mesh, m in vars(world.meshes).items() for axis in m.mesh_dim_names}
    groups = {"world": dist.group.WORLD, **meshes, **({"tied": model.tied_group} if model.tied_group else {})}
    ranks = {axis: dist.get_process_group_ranks(group) for axis, group in groups.items()}
    # Of several axes that share a group, the one that comes last gives it its name.
    names = {group.group_name: f"{axis} {ranks[axis]}" for axis, group in groups.items()}
    with Path(f"{case['out']}.record-{world.rank}").open("w", buffering=1) as file:

        def write(what, value):
            file.write(json.dumps([what, value]) + "\n")

        write("groups", {name: ranks[name.split()[0]] for name in names.values()})
        for number, step in enumerate(case["steps"]):
            write("step", number)
            newest = max((entry["record_id"] for entry in recorded_collectives(stacks=False)), default=-1)
            with Recorder(names, partial(write, "entry")):
                run_step(model, make_packs(step, number))
            launched = [entry for entry in recorded_collectives(stacks=False) if entry["record_id"] > newest]
            kinds = [kind_of(entry["profiling_name"].removeprefix("gloo:")) for entry in launched]
            write("launched", [[kind, names[entry["process_group"][0]]] for kind, entry in zip(kinds, launched, strict=True)])


def run_step(model, packs):
    """All of a step but the update of the weights, which launches nothing."""
    world = model.world
    mine, total = packs[world.replica :: world.num_replicas], max(1.0, workload.denominator(packs))

    def loss(nll, shard):
        return (nll * shard.loss_weight).sum() / total

    model.evaluate(mine, loss, len(mine))
    world.sum(model.accumulate(mine, loss))
    model.clip_gradients(workload.MAX_NORM)
    for parameter in model.parameters():
        parameter.grad = None
