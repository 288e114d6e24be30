"""A stage can set otherwise what the layout says of memory, and the next stage does not have it."""

import pytest
import torch

from smalt.engine.config import load_config
from smalt.engine.stage import Stage
from smalt.engine.trainer import open_data
from smalt.parallel import ParallelConfig, alone, join_world


@pytest.mark.parametrize(("name", "times"), [("align", 2), ("sft", 1)])
def test_memory_of_one_stage(tiny_config, name, times):
    changes = {
        "stages.align.checkpointing": "full",
        "stages.align.reshard_after_forward": True,
        "stages.align.trainable": {"language": 1.0},
    }
    config = load_config(tiny_config({**changes, "data.packs_per_step": 1}))
    stage = Stage(config, name, alone(torch.device("cpu")), open_data(config), None, None)
    seen = []
    (part,) = stage.model.parts
    part.language.blocks["0"].attention.register_forward_hook(lambda *_: seen.append(1))
    stage.train_step(next(stage.batches()))
    assert len(seen) == times
    assert stage.world.parallel.reshard_after_forward is (True if times == 2 else None)
    stage.close()


def test_one_process_has_the_settings_that_need_no_second():
    assert join_world("cpu", ParallelConfig(compile=True, checkpointing="full")).parallel.checkpointing == "full"
    with pytest.raises(ValueError, match="do not multiply to the 1 processes"):
        join_world("cpu", ParallelConfig(cp=2))


def test_async_tp_needs_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="async_tp works on GPUs"):
        join_world("cpu", ParallelConfig(tp=2, compile=True, async_tp=True))
