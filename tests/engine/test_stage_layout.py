"""A stage can set otherwise what the layout says of memory, and the next stage does not have it."""

from functools import partial

import pytest
import torch

from smalt.engine.config import load_config
from smalt.engine.stage import Stage
from smalt.engine.trainer import open_data
from smalt.parallel import alone


@pytest.mark.parametrize(("name", "computed_again"), [("align", True), ("sft", False)])
def test_memory_of_one_stage(tiny_config, name, computed_again):
    config = load_config(tiny_config({"stages.align.checkpointing": "full", "stages.align.reshard_after_forward": True}))
    stage = Stage(config, name, alone(torch.device("cpu")), open_data(config), None, None)
    (part,) = stage.model.parts
    blocks = [*part.vision.blocks, *part.language.blocks.values()]
    assert [isinstance(block.forward, partial) for block in blocks] == [computed_again] * len(blocks)
    assert stage.world.parallel.reshard_after_forward is (True if computed_again else None)
    stage.close()
