"""Benchmarks of several processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys

PROCESSES = 2


def run_module(module: str, *arguments: object) -> None:
    """Run a module's ``__main__`` as ``PROCESSES`` processes of one thread each, which torchrun starts.

    Raises RuntimeError with what the processes said where they fail.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the processes of {module} failed:\n{done.stderr}")
