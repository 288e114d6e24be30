"""Processes for the rows of the matrix."""

import json
import os
import subprocess
import sys
import warnings
from itertools import count
from pathlib import Path

import pytest
import torch

RANKS = Path(__file__).parent / "ranks.py"


class Workers:
    """run(...) has processes take one row and gives what rank 0 found; raises RowFailed with every rank's traceback.
    A row of which a rank was killed in native code is run once more, with a warning.

    record(...) has them train on given packs and gives what each rank launched, and what went wrong, by rank.
    initial(...) has them read weights from folders and gives the whole ones.
    distill(...) has them take one row with a teacher.
    border(...) has them go from one stage of a run to the next and gives what rank 0 found.
    """

    def __init__(self, folder):
        self.folder, self.numbers = folder, count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.stderr = (folder / "stderr").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(RANKS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, env=environment
        )

    def run(self, num_processes, parallel, variant="", trainable="all", dtype="float64", fault=None, timeout=60):
        return self._result(num_processes, parallel, variant, fault, timeout, trainable=trainable, dtype=dtype)

    def distill(self, num_processes, parallel, variant="", distance="cosine"):
        return self._result(num_processes, parallel, variant, None, 60, trainable="all", dtype="float64", distance=distance)

    def border(self, num_processes, parallel):
        return self._result(num_processes, parallel, "", None, 60, border=True)

    def initial(self, num_processes, parallel, folders, tie):
        return self._result(num_processes, parallel, "", None, 60, folders=str(folders), tie=tie)

    def _result(self, num_processes, parallel, *common, **special):
        for again in (False, True):
            case = self._case(num_processes, parallel, *common) | special
            said = (self.folder / "stderr").stat().st_size
            errors = self._ask(case)
            if not errors:
                break
            stderr = (self.folder / "stderr").read_bytes()[said:].decode(errors="replace")
            report = "\n".join(f"rank {rank}: {text}" for rank, text in errors.items()) + f"\nstderr: {stderr[-8000:]}"
            if again or not any(text.startswith("killed by signal") for text in errors.values()):
                raise RowFailed(report)
            # Twice in some thousand rows glibc ended a rank whose heap was damaged, with torch 2.13 on CPUs; docs/parallel.md.
            warnings.warn(
                f"a rank of {num_processes}, {parallel} was killed in native code; the row is run once more:\n{report}", stacklevel=2
            )
        result = torch.load(case["out"])
        Path(case["out"]).unlink()
        return result

    def record(self, num_processes, parallel, steps, fault=None, timeout=60):
        case = self._case(num_processes, parallel, "", fault, timeout) | {"steps": steps}
        errors = self._ask(case)
        return [read_record(Path(f"{case['out']}.record-{rank}")) for rank in range(num_processes)], errors

    def _case(self, num_processes, parallel, variant, fault, timeout):
        return {
            "num_processes": num_processes, "parallel": parallel, "variant": variant, "fault": fault, "timeout": timeout,
            "out": str(self.folder / f"{next(self.numbers)}.pt"),
        }  # fmt: skip

    def _ask(self, case):
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        # Whatever a library prints on the way is not an answer.
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        return {"all": "the processes are gone"}

    def close(self):
        self.process.kill()
        self.process.wait()
        self.stderr.close()


class RowFailed(Exception):
    pass


def read_record(path):
    """What recording.py wrote: the ranks of groups, and of each step the entries and what gloo launched, None where it did not end."""
    record = {"groups": {}, "steps": []}
    for what, value in map(json.loads, path.read_text().splitlines()):
        if what == "groups":
            record["groups"] = value
        elif what == "step":
            record["steps"].append({"entries": [], "launched": None})
        elif what == "entry":
            record["steps"][-1]["entries"].append(value)
        else:
            record["steps"][-1]["launched"] = value
    return record


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
