"""What the processes of test_traces_recorded.py run: collectives waited for in different ways, context parallel; a trace of each."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh

from smalt.model import Document, LanguageConfig, ModelConfig, VisionConfig, pack
from smalt.parallel import ParallelConfig, ParallelModel, World
from smalt.parallel.compat import set_unshard_async
from smalt.parallel.mesh import build_meshes
from smalt.profiling.bench_overlap import context_step, sharded_model
from smalt.profiling.record import TraceRecorder

WIDTH, STEPS = 512, 5


def record(folder, step, axes):
    recorder = TraceRecorder(folder, dist.get_rank(), 2, STEPS, axes)
    for _ in range(STEPS + 1):
        step()
        recorder.step()
    recorder.close()


def forward_and_backward(model):
    rows_TC = torch.randn(128, WIDTH)

    def step():
        model(rows_TC).square().mean().backward()
        model.zero_grad()

    return step


def other_collectives(groups):
    """A collective in flight over arithmetic, the same waited for at once, a list, and a pair of sends, each in a group of its own."""
    big, small, square = torch.ones(1 << 21), torch.ones(500), torch.randn(600, 600)
    peer = 1 - dist.get_rank()

    def step():
        work = dist.all_reduce(big, group=groups["cp"], async_op=True)
        square.mm(square)
        work.wait()
        dist.all_reduce(big, group=groups["dp"])
        square.mm(square)
        gathered = functional.all_gather_tensor(small, 0, groups["tp"])
        square.mm(square)
        gathered + 1
        dist.reduce_scatter(torch.empty(250), [small[:250].clone(), small[250:].clone()], group=groups["tp"])
        dist.all_to_all_single(torch.empty(500), small, group=groups["tp"])
        dist.broadcast(small, 0, group=groups["tp"])
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, small, peer), dist.P2POp(dist.irecv, torch.empty(500), peer)])
        square.mm(square)
        for work in works:
            work.wait()

    return step


def engine_step(prefetch):
    """A step of the engine's own model, whose decoder has four blocks."""
    parallel = ParallelConfig(fsdp=2, prefetch=prefetch)
    world = World(dist.get_rank(), 2, torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
    vision = VisionConfig(num_layers=1, width=32, num_heads=2, ffn=32, patch=2, tile=4)
    language = LanguageConfig(num_layers=4, width=WIDTH, num_heads=8, num_kv_heads=8, head_dim=64, ffn=WIDTH, vocabulary=256)
    model = ParallelModel(ModelConfig(vision=vision, language=language), world, 0, torch.float32, ("language",), 128)
    tokens = np.arange(128) % 256
    text = Document(tokens, np.ones(128, bool), tokens[:0], np.zeros((0, 3, 4, 4), np.float32), np.zeros((0, 2), np.int64))
    packs = [pack([text], 128, "causal", 4)]

    def step():
        model.accumulate(packs, lambda nll, shard: nll.mean())
        for p in model.parameters():
            p.grad = None

    return step, dict(world.groups)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "cp"))
    flat = mesh["fsdp", "cp"]._flatten("fsdp_cp")
    prefetched = sharded_model(flat, prefetch=True, width=WIDTH)
    axes = {"fsdp_cp": flat.get_group()}
    record(folder / "prefetch", forward_and_backward(prefetched), axes)
    # The same prefetches, but FSDP2 waits for each where it launches it.
    set_unshard_async(prefetched, False)
    record(folder / "at-once", forward_and_backward(prefetched), axes)
    # No prefetch in the forward pass; that of the backward pass is FSDP2's own.
    late = sharded_model(flat, prefetch=False, width=WIDTH)
    set_unshard_async(late, True)
    record(folder / "backward-only", forward_and_backward(late), axes)
    record(folder / "keys-whole", context_step(flat, 1), {})
    record(folder / "keys-in-parts", context_step(flat, 4), {})
    for name, prefetch in (("engine", True), ("engine-late", False)):
        step, axes = engine_step(prefetch)
        record(folder / name, step, {"fsdp_cp": axes["fsdp_cp"]})
    groups = {name: dist.new_group([0, 1], group_desc=f"mesh_{name}") for name in ("cp", "dp", "tp", "pp")}
    record(folder / "others", other_collectives(groups), {"pp": groups["pp"]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
