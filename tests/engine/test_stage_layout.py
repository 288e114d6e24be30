"""A stage can set otherwise what the layout says of memory, and the next stage does not have it."""

from dataclasses import replace

import pytest
import torch

from smalt.engine.config import load_config
from smalt.engine.errors import UserError
from smalt.engine.launch import parse_launch
from smalt.engine.stage import Stage
from smalt.engine.trainer import dry_run, open_data
from smalt.parallel import ParallelConfig, alone, join_world, lay_out


@pytest.mark.parametrize(("name", "times"), [("align", 2), ("sft", 1)])
def test_memory_of_one_stage(tiny_config, name, times):
    changes = {
        "stages.align.checkpointing": "full",
        "stages.align.reshard_after_forward": True,
        "stages.align.trainable": {"language": 1.0},
    }
    config = load_config(tiny_config({**changes, "data.packs_per_step": 1}))
    stage = Stage(config, name, alone(torch.device("cpu")), open_data(config), None, None, step=9)
    assert stage.first_step == 9  # of the run, whatever the steps of the stages are now
    seen = []
    (part,) = stage.model.parts
    part.language.blocks["0"].attention.register_forward_hook(lambda *_: seen.append(1))
    stage.train_step(next(stage.batches()))
    assert len(seen) == times
    assert stage.world.parallel.reshard_after_forward is (True if times == 2 else None)
    stage.close()


def test_a_stage_whose_packs_do_not_divide_is_named(tiny_config):
    launch = parse_launch([str(tiny_config({"stages.sft.sequence_length": 60})), "--dry-run"])
    two = replace(alone(torch.device("cpu")), size=2, parallel=ParallelConfig(cp=2, fsdp=1))
    with pytest.raises(UserError, match=r"stages\.sft\.sequence_length = 60 is not a multiple of .*; 64 is$"):
        dry_run(launch, two)


def test_one_process_has_the_settings_that_need_no_second():
    assert join_world("cpu", ParallelConfig(compile=True, checkpointing="full")).parallel.checkpointing == "full"
    with pytest.raises(ValueError, match="do not multiply to the 1 processes"):
        join_world("cpu", ParallelConfig(cp=2))


def test_a_layout_that_the_device_cannot_have_is_refused(monkeypatch):
    two = replace(alone(torch.device("cpu")), size=2)
    with pytest.raises(ValueError, match="async_tp works on GPUs"):
        lay_out(two, "cpu", ParallelConfig(tp=2, compile=True, async_tp=True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: torch sees 1"):
        lay_out(two, "cuda", ParallelConfig())
