"""Eight processes that stay for all rows of the matrix: a start takes far longer than a row."""

import json
import os
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SIZE = 8
WORKER = Path(__file__).parent / "worker.py"


class Workers:
    """run(...) has all processes take one row and gives what rank 0 found; raises RowFailed with every rank's traceback."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, count()
        self.store = dist.TCPStore("127.0.0.1", 0, None, is_master=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.processes = []
        for rank in range(SIZE):
            with (folder / f"stderr-{rank}").open("w") as stderr:
                command = [sys.executable, str(WORKER), str(rank), str(self.store.port)]
                self.processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
                )

    def run(self, num_processes, parallel, variant="", trainable="all", dtype="float64", fault=None, timeout=60):
        identity = str(next(self.numbers))
        case = {
            "id": identity, "num_processes": num_processes, "parallel": parallel, "variant": variant, "trainable": trainable,
            "dtype": dtype, "fault": fault, "timeout": timeout, "out": str(self.folder / f"{identity}.pt"),
        }  # fmt: skip
        for process in self.processes:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        errors = {}
        for rank, process in enumerate(self.processes):
            answer = self._answer(process)
            if answer is None:
                errors[rank] = (self.folder / f"stderr-{rank}").read_text()[-2000:] or "no answer"
            elif "error" in answer:
                errors[rank] = answer["error"]
        if errors:
            raise RowFailed("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        result = torch.load(case["out"])
        Path(case["out"]).unlink()
        return result

    def _answer(self, process):
        # Whatever a library prints on the way is not an answer. A worker that hangs past every timeout is ended.
        timer = threading.Timer(300, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("answer "):
                    return json.loads(line.removeprefix("answer "))
            return None
        finally:
            timer.cancel()

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class RowFailed(Exception):
    pass


@pytest.fixture(scope="session")
def row_failed():
    return RowFailed


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    pool = Workers(tmp_path_factory.mktemp("parity"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def reference(workers):
    """reference(variant, trainable, dtype): what one process finds with the plain model."""
    found = {}

    def get(variant="", trainable="all", dtype="float64"):
        key = variant, trainable, dtype
        if key not in found:
            found[key] = workers.run(0, {}, *key)
        return found[key]

    return get
