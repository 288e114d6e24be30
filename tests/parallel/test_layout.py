"""Layouts that cannot be are refused, by name, before anything runs."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from smalt.model import LanguageConfig, ModelConfig, VisionConfig
from smalt.parallel import ParallelConfig, alone
from smalt.parallel.model import ParallelModel
from smalt.parallel.recompute import compile_blocks

MODEL = ModelConfig(
    vision=VisionConfig(num_layers=1, width=8, num_heads=2, ffn=8, patch=2, tile=4),
    language=LanguageConfig(num_layers=4, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn=24, vocabulary=26),
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pp": 2, "schedule": "zero_bubble", "reshard_after_forward": True}, "loses gradients"),
        ({"pp": 2, "reduce_every_pack": True}, "the schedule reduces"),
        ({"pp": 2, "schedule": "zero_bubble", "checkpointing": "selective"}, "backward comes in halves"),
        ({"memory_budget": 0.5}, "memory_budget needs compile"),
        ({"memory_budget": 0.5, "compile": True, "checkpointing": "full"}, "both choose"),
        ({"async_tp": True, "compile": True}, "tp above 1"),
        ({"tp": 0}, "greater than or equal to 1"),
        ({"ep": 2}, "Extra inputs"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 4}, "num_kv_heads = 2 is not a multiple of tp = 4"),
        ({"tp": 3}, "vocabulary = 26 is not a multiple of tp = 3; 27 is"),
        ({"tp": 5}, "ffn = 24 is not a multiple of tp = 5"),
        ({"cp": 3, "context": "scatter"}, "4 heads a rank of tp do not divide over cp = 3"),
        ({"cp": 2, "context_chunks": 5}, "length = 64 is not a multiple of cp 2 x context_chunks 5 and of cp 2 x tp 1; 70 is"),
        ({"pp": 2, "schedule": "interleaved", "virtual_stages": 3}, "lower pp or virtual_stages"),
        (
            {"pp": 2, "schedule": "interleaved", "virtual_stages": 3},
            'pp 2 x virtual_stages 3 (schedule = "interleaved") makes 6 pipeline',
        ),
        ({"pp": 5}, "pp 5 makes 5 pipeline stages, and model.language.num_layers = 4, of which each needs one; lower pp"),
    ],
)
def test_models_that_do_not_divide(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ParallelConfig(fsdp=1, **fields).check_model(MODEL, 64, "length")


def test_key_heads_that_cannot_be_repeated():
    language = MODEL.language.model_copy(update={"num_heads": 12, "num_kv_heads": 3})
    with pytest.raises(ValueError, match="3 key and value heads a rank of tp neither divide over cp = 2 nor"):
        ParallelConfig(fsdp=1, cp=2, context="scatter").check_model(MODEL.model_copy(update={"language": language}), 64)


def test_numbers_of_processes():
    assert ParallelConfig(cp=2, tp=2).sized(8).fsdp == 2
    assert ParallelConfig(dp=4).sized(4).fsdp == 1
    with pytest.raises(
        ValueError, match=r"pp 1 x dp 1 x cp 2 x tp 2 .* do not multiply to the 6 processes .* a multiple of 4 processes"
    ) as said:
        ParallelConfig(cp=2, tp=2).sized(6)
    assert str(said.value).endswith("(on one machine torchrun --nproc-per-node 4), or give --parallel.cp 1 --parallel.tp 1")
    with pytest.raises(
        ValueError, match=r"x fsdp 4 do not multiply to the 2 processes that run; start 4 processes .* --parallel.fsdp None"
    ):
        ParallelConfig(fsdp=4).sized(2)


def test_microbatches_of_a_pipeline():
    layout = ParallelConfig(pp=2, fsdp=2)
    assert layout.check_microbatches(8) == 4
    with pytest.raises(ValueError, match=r"packs_per_step = 6 over dp 1 x fsdp 2"):
        layout.check_microbatches(6)
    with pytest.raises(ValueError, match=r"packs_per_step = 7 is not a multiple of dp 1 x fsdp 2 = 2"):
        layout.check_microbatches(7)


def test_a_model_that_does_not_fit_is_refused_when_it_is_built():
    world = replace(alone(torch.device("cpu")), size=2, parallel=ParallelConfig(fsdp=1, tp=2))
    with pytest.raises(ValueError, match="sequence_length = 63 is not a multiple"):
        ParallelModel(MODEL, world, 0, torch.float32, ("language",), 63)


def test_settings_of_the_compiler_are_those_of_the_last_layout():
    """They are of the process, which may train run after run."""
    import torch._functorch.config as functorch

    part = SimpleNamespace(is_first=False, language=SimpleNamespace(blocks={}))
    for layout, share in (({"memory_budget": 0.5}, 0.5), ({}, 1.0)):
        compile_blocks(part, alone(torch.device("cpu"), ParallelConfig(compile=True, **layout)))
        assert functorch.activation_memory_budget == share
