"""One rank of an evaluation on gloo: takes the config of a run, and every rank writes scores and answers beside it."""

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from smalt.engine.config import load_config
from smalt.engine.data.chat import ChatEncoder
from smalt.engine.errors import UserError
from smalt.engine.evaluation import conditions_of, evaluate
from smalt.engine.trainer import open_data
from smalt.model import build_model
from smalt.parallel import ParallelConfig
from smalt.parallel.mesh import World, build_meshes


class Forgetful(ChatEncoder):
    """Cannot read a question again that it has read."""

    def prompt(self, record, mode):
        seen = self.__dict__.setdefault("seen", set())
        if record.number in seen:
            raise UserError("the disk is gone")
        seen.add(record.number)
        return super().prompt(record, mode)


def main(path, rank, size, fault):
    dist.init_process_group(
        "gloo", store=dist.FileStore(path + ".store", size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    parallel = ParallelConfig().sized(size)
    world = World(rank, size, torch.device("cpu"), parallel, build_meshes(parallel, "cpu"))
    config = load_config(Path(path))
    data, settings = open_data(config), config.evaluation
    if fault and rank == 1:
        data.encoder.__class__ = Forgetful
    model = build_model(config.model, 0, dtype=torch.float64).eval()
    try:
        tasks = data.questions
        found = evaluate(model, data.encoder, tasks, conditions_of(tasks), settings, settings.questions, world)
        result = [list(map(asdict, found.scores)), list(map(asdict, found.answers))]
    except UserError as error:
        result = str(error)
    Path(f"{path}.found-{rank}").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fault")
