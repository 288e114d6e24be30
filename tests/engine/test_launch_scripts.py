"""The launch scripts of the documentation, as they stand: two nodes on one machine, and Slurm's with its commands replaced."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "docs" / "launch"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_nodes(tiny_config, tmp_path, train):
    config, run = tiny_config({"evaluation.sources": {}, "evaluation.budget_tasks": []}), tmp_path / "run"
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_PORT": str(free_port()),
        "TORCHRUN": str(torchrun), "MAX_RESTARTS": "0",
    }  # fmt: skip
    command = [str(SCRIPTS / "torchrun.sh"), str(config), "--folder", str(run)]
    nodes = [subprocess.Popen(command, env={**common, "NODE_RANK": str(rank)}, cwd=tmp_path) for rank in range(2)]
    try:
        assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 7


def test_slurm_starts_one_torchrun_a_node(tmp_path):
    # scontrol and srun stand in for Slurm's: the first names the nodes, the second runs its command once a node.
    fake = {
        # More than a pipe holds: a reader of the first line alone would break it.
        "scontrol": 'echo "node-a"; seq -f node-%.0f 20000',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "torchrun": f'{sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
    }
    for name, body in fake.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_SUBMIT_DIR": str(ROOT), "TORCHRUN": "torchrun", "NPROC_PER_NODE": "8",
    }  # fmt: skip
    script = ["bash", str(SCRIPTS / "slurm.sbatch"), "configs/mine.toml", "--stages.sft.steps", "7"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    for rank, line in enumerate(done.stdout.splitlines()):
        words = json.loads(line)
        options = dict(zip(words[0::2], words[1::2], strict=False))
        assert options["--nnodes"] == "2"
        assert options["--node-rank"] == str(rank)
        assert options["--nproc-per-node"] == "8"
        assert options["--rdzv-endpoint"] == "node-a:29500"
        assert options["--rdzv-id"] == "77"
        assert words[-4:] == ["engine/train.py", "configs/mine.toml", "--stages.sft.steps", "7"]
    assert rank == 1
