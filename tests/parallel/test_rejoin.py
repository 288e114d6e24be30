"""Processes that have left one layout take another, and nothing of the first one is in their way."""

import os
import socket
import subprocess
import sys
from ast import literal_eval

import pytest
import torch

from smalt.model import LanguageConfig, ModelConfig, VisionConfig
from smalt.parallel import ParallelConfig, ParallelModel, World
from smalt.parallel.compat import fake_process_group
from smalt.parallel.mesh import build_meshes

# Two layouts, a sum over all in each, and in each a decision of the same name, which a store knows for good.
SCRIPT = """
import torch
from smalt.parallel import ParallelConfig, lay_out, leave_world, meet, rejoin
met = meet()
found = []
for number, layout in enumerate(({}, {"tp": 2}, {"cp": 2})):
    world = lay_out(rejoin(met, f"link {number}") if number else met, "cpu", ParallelConfig(**layout))
    agreed, total = world.agree(lambda: number, "beginnings"), int(world.sum(torch.tensor(world.rank + number)))
    found.append((agreed, total, world.coordinates))
    leave_world(world)
print(found)
"""


@pytest.mark.slow
def test_processes_take_one_layout_after_another():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    for number, line in enumerate(said):
        place = {"pp": 0, "dp": 0, "fsdp": 0, "cp": 0, "tp": 0}
        wanted = [(i, 2 * i + 1, place | {axis: number}) for i, axis in enumerate(("fsdp", "tp", "cp"))]
        assert literal_eval(line) == wanted


def test_a_second_layout_of_a_process_has_nothing_of_the_first():
    config = ModelConfig(
        vision=VisionConfig(num_layers=1, width=16, num_heads=2, ffn=32, patch=4, tile=8),
        language=LanguageConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8, ffn=32, vocabulary=32),
    )
    for layout in ({"fsdp": 4}, {"fsdp": 2, "tp": 2}):
        with fake_process_group(0, 4):
            parallel = ParallelConfig(**layout).sized(4)
            world = World(0, 4, torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
            model = ParallelModel(config, world, 0, torch.float32, ["vision", "projector", "language"], 16)
            for name, weight in model.named_parameters():
                mesh = world.meshes.weights if name.startswith("language") else world.meshes.vision
                groups = [weight.device_mesh.get_group(dim) for dim in range(weight.device_mesh.ndim)]
                assert mesh.get_group(mesh.ndim - 1) in groups, name
            assert len(model.full_state()) == len(dict(model.named_parameters()))
