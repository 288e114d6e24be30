"""One rank of a run that stalls in a given way, for test_watchdog.py: ``python stalling.py FAULT REPORT``."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from smalt.parallel.compat import record_collectives
from smalt.parallel.watchdog import GRACE, Watchdog, group_timeout

LIMIT = timedelta(seconds=2)
# The rank that does wrong.
CULPRIT = 1


def read_slowly(seconds):
    time.sleep(seconds)


def exchange(x, group):
    dist.all_to_all_single(torch.empty_like(x), x, group=group)


def gather(x, group):
    dist.all_gather([torch.empty_like(x) for _ in range(3)], x, group=group)


class Fault:
    """What happens in step 3 of every rank; all steps before it are healthy."""

    def __init__(self, watchdog, mesh, rank):
        self.watchdog, self.rank, self.culprit = watchdog, rank, rank == CULPRIT
        self.cp, self.dp = mesh.get_group("cp"), dist.new_group(list(range(3)))
        watchdog.name_group(self.dp, "dp")
        self.x = torch.ones(6)

    def healthy(self):
        exchange(self.x, self.cp)
        gather(self.x, self.dp)

    def skips(self):
        if not self.culprit:
            exchange(self.x, self.cp)
        gather(self.x, self.dp)

    def differs(self):
        if self.culprit:
            gather(self.x, self.cp)
        else:
            exchange(self.x, self.cp)

    def sleeps(self):
        if self.culprit:
            read_slowly(60)
        self.healthy()

    def dies(self):
        if self.culprit:
            os.kill(os.getpid(), signal.SIGKILL)
        self.healthy()

    def freezes(self):
        if self.culprit:
            with self.watchdog.pause("a save"):
                # Long enough that the others know of the pause.
                read_slowly(1)
                os.kill(os.getpid(), signal.SIGSTOP)
        self.healthy()

    def raises(self):
        if self.culprit:
            raise ValueError("bad tile")
        self.healthy()

    def ends(self):
        if self.culprit:
            self.watchdog.stop()
            read_slowly(60)
        self.healthy()

    def receives(self):
        if self.culprit:
            read_slowly(60)
        dist.recv(self.x, src=CULPRIT)

    def sharded(self):
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
        for layer in model:
            fully_shard(layer)
        loss = model(self.x[None]).sum()
        if self.culprit:
            read_slowly(60)
        loss.backward()


def slow(fault, step):
    """Legitimate slowness, each time longer than the limit and the grace after it."""
    seconds = LIMIT.total_seconds() + GRACE + 2
    if step == 0 and fault.culprit:
        read_slowly(seconds)
    if step == 2:
        for _ in range(20):
            if fault.culprit:
                read_slowly(seconds / 20)
            fault.healthy()
    if step == 4 and fault.culprit:
        with fault.watchdog.pause("evaluation"):
            read_slowly(seconds)
    if step == 6:
        read_slowly(seconds)


def train(name, watchdog, mesh, rank):
    fault = Fault(watchdog, mesh, rank)
    for step in range(8):
        if name == "slow":
            slow(fault, step)
        elif step == 2 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            getattr(fault, name)()
        fault.healthy()
        watchdog.beat(step + 1)


def main(name, report):
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    record_collectives()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=group_timeout(LIMIT))
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("fsdp", "cp"))
    watchdog = Watchdog(rank, size, LIMIT, store, Path(report))
    watchdog.name_mesh(mesh)
    with watchdog:
        train(name, watchdog, mesh, rank)
    dist.destroy_process_group()
    print(f"rank {rank} is done")


if __name__ == "__main__":
    main(*sys.argv[1:])
