"""What the processes of test_bench_tiles.py run: a step of every contestant, with torch's count of its FLOPs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from smalt.kernels import backend
from smalt.model import ModelConfig
from smalt.profiling.bench_tiles import CONTESTANTS, Trainer, make_pack


def main(folder, settings, tokens, tiles):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config, counts = ModelConfig.model_validate(settings), {}
    batch = make_pack(config, tokens, tiles)
    batch = replace(batch, labels=batch.tokens)  # every logit is formed
    for contestant in CONTESTANTS:
        # The definition multiplies every row with every key.
        with backend("reference"), FlopCounterMode(display=False) as counter:
            Trainer(contestant, config, batch).step()
        counts[f"{contestant.axis}, {contestant.tiles}"] = counter.get_total_flops()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *json.loads(sys.argv[2]))
