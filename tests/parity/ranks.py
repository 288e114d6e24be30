"""Runs rows of the matrix: takes them from its standard input, a line of JSON each, and answers each with a line.

It imports everything once and forks a child for every rank of a row: a start takes far longer than a row, and torch keeps what it
found out about a mesh, groups included, for the next one that looks alike.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import borders
import distilled
import faults
import initial
import recording
import torch
import torch.distributed as dist
import workload
from torch._dynamo.utils import counters

from smalt.parallel import ParallelConfig, ParallelModel
from smalt.parallel.mesh import World, alone, build_meshes

LIMIT = 200  # seconds of a row, far beyond every timeout of a collective
KILLED = "killed by signal"


def run_layout(case, world):
    dtype, trainable = workload.DTYPES[case["dtype"]], workload.TRAINABLE[case["trainable"]]
    config, autocast = workload.make_config(case["variant"]), case["dtype"] == "bfloat16"
    model = ParallelModel(config, world, 0, dtype, trainable, workload.LENGTH, autocast=autocast)
    if "distance" in case:
        model.distillation = distilled.make_distillation(model, case["variant"], case["distance"])
    optimizer = workload.make_optimizer(p for _, p in model.named_parameters())
    result = workload.train_layout(model, optimizer, workload.make_steps(case["variant"], dtype), whole_gradients)
    result["graphs"] = counters["stats"]["unique_graphs"]
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


def run_case(case, rank):
    size = case["num_processes"]
    if size == 0 and "distance" in case:
        return distilled.run_reference(case["variant"], case["distance"])
    if size == 0:
        return workload.run_reference(case["variant"], case["trainable"], case["dtype"])
    parallel = ParallelConfig(**case["parallel"]).sized(size)
    if size == 1:
        return run_layout(case, alone(torch.device("cpu"), parallel))
    timeout = timedelta(seconds=case["timeout"])
    dist.init_process_group("gloo", store=dist.FileStore(case["out"] + ".store", size), rank=rank, world_size=size, timeout=timeout)
    try:
        world = World(rank, size, torch.device("cpu"), parallel, build_meshes(parallel, "cpu", timeout))
        # Weights and keys on their way would wait for each other in one group.
        assert len({group.group_name for _, group in world.groups}) == len(world.groups)
        if case.get("border"):
            return borders.run(world)
        if case.get("folders"):
            return initial.run(world, case["folders"], case["tie"])
        with faults.planted(case["fault"]):
            return recording.run_steps(case, world) if "steps" in case else run_layout(case, world)
    finally:
        dist.destroy_process_group()


def run_rank(case, rank):
    """The child of one rank: its result, or what went wrong, into a file."""
    # In which line of Python each thread was when it dies in native code; on stderr those of two ranks would be mixed.
    faulthandler.enable(Path(f"{case['out']}.native-{rank}").open("w"))  # noqa: SIM115 - open as long as the process lives
    try:
        result = run_case(case, rank)
        if rank == 0:
            torch.save(result, case["out"])
    except Exception:
        Path(f"{case['out']}.error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # a process group that was left in the middle of a collective would wait in its destructor


def run_row(case):
    """What went wrong, by rank."""
    children = []
    for rank in range(max(1, case["num_processes"])):
        child = os.fork()
        if child == 0:
            run_rank(case, rank)
        children.append(child)
    errors, deadline = {}, time.monotonic() + LIMIT
    for rank, child in enumerate(children):
        status = None
        while status is None:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = code
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                errors[rank] = f"killed after {LIMIT} s"
                deadline = time.monotonic() + 5
            else:
                time.sleep(0.01)
        file = Path(f"{case['out']}.error-{rank}")
        if file.exists():
            errors[rank] = file.read_text()
        elif status and os.WIFSIGNALED(status):
            where = Path(f"{case['out']}.native-{rank}").read_text()
            errors.setdefault(rank, f"{KILLED} {-os.waitstatus_to_exitcode(status)}: {where}")
        elif status:
            errors.setdefault(rank, "ended without a word")
    return errors


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        print("answer " + json.dumps(run_row(case)), flush=True)


if __name__ == "__main__":
    main()
