"""One rank of the matrix: takes rows from its standard input, a line of JSON each, and answers each with a line.

python worker.py RANK PORT
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import faults
import torch
import torch.distributed as dist
import workload

from smalt.parallel import ParallelConfig, ParallelModel
from smalt.parallel.mesh import World, alone, build_meshes


def pack_loss(nll, shard):
    return (nll * shard.loss_weight).sum()


def run_layout(case, world):
    dtype = workload.DTYPES[case["dtype"]]
    trainable = workload.TRAINABLE[case["trainable"]]
    model = ParallelModel(workload.make_config(case["variant"]), world, 0, dtype, trainable, workload.LENGTH)
    optimizer = workload.make_optimizer(p for _, p in model.named_parameters())
    result = {"loss": [], "norm": [], "clipped": [], "initial": {n: p.clone() for n, p in model.full_state().items()}}
    for step, packs in enumerate(workload.make_steps(case["variant"], dtype)):
        mine, total = packs[world.replica :: world.num_replicas], workload.denominator(packs)
        before = model.evaluate(mine, pack_loss, len(mine)) / total
        loss = model.accumulate(mine, lambda nll, shard, total=total: pack_loss(nll, shard) / total)
        sums = world.sum(torch.stack([loss, before]))
        assert abs(sums[0] - sums[1]) <= 1e-5 * abs(sums[0]), f"evaluate gives {sums[1]}, training {sums[0]}"
        result["loss"].append(float(sums[0]))
        if step == 0:
            result["gradients"] = whole_gradients(model)
        result["norm"].append(model.clip_gradients(workload.MAX_NORM))
        result["clipped"].append(model.gradient_norm())
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = model.full_state()
    return result


def whole_gradients(model):
    """Every gradient whole, on rank 0 at least; None where a parameter has none."""
    own = {n: None if p.grad is None else faults.whole(p.grad).clone() for n, p in model.named_parameters()}
    if model.world.parallel.pp == 1:
        return own
    gathered = [None] * model.world.size
    dist.all_gather_object(gathered, own)
    merged = {}
    for rank_gradients in gathered:
        for name, gradient in rank_gradients.items():
            # Two pipeline stages hold a tied weight: both must have the whole gradient.
            assert name not in merged or gradient is None or torch.equal(merged[name], gradient), f"copies of {name} differ"
            merged[name] = gradient
    return merged


def run_case(case, rank, store):
    if case["num_processes"] == 0:
        return workload.run_reference(case["variant"], case["trainable"], case["dtype"]) if rank == 0 else None
    size = case["num_processes"]
    if rank >= size:
        return None
    parallel = ParallelConfig(**case["parallel"]).sized(size)
    if size == 1:
        return run_layout(case, alone(torch.device("cpu")))
    timeout = timedelta(seconds=case["timeout"])
    dist.init_process_group("gloo", store=dist.PrefixStore(case["id"], store), rank=rank, world_size=size, timeout=timeout)
    try:
        world = World(rank, size, torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
        with faults.planted(case["fault"]):
            return run_layout(case, world)
    finally:
        dist.destroy_process_group()


def answer(case, rank, port):
    """Take one row, and say so on the standard output."""
    reply = {"id": case["id"]}
    try:
        store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=timedelta(seconds=300))
        result = run_case(case, rank, store)
        if result is not None and rank == 0:
            torch.save(result, case["out"])
    except Exception:
        reply["error"] = traceback.format_exc()
    print("answer " + json.dumps(reply), flush=True)


def main():
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        # A child for each row: torch keeps what it found out about a mesh, groups included, for the next one that looks alike.
        child = os.fork()
        if child == 0:
            answer(case, rank, port)
            os._exit(0)  # a process group that was left in the middle of a collective would wait in its destructor
        _, status = os.waitpid(child, 0)
        if status:
            print("answer " + json.dumps({"id": case["id"], "error": f"the process ended with status {status}"}), flush=True)


if __name__ == "__main__":
    main()
