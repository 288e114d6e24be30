"""A stage that continues another one goes on with its optimiser: over the same data the two are one longer stage, to the bit."""

import json

import pytest
import torch

from smalt.engine.config import parse_config
from smalt.engine.stage import Stage
from smalt.engine.trainer import open_data
from smalt.parallel import alone

STAGE = {
    "sequence_length": 128, "mixture": {"one": 1.0}, "trainable": {"language": 1.0, "projector": 0.5}, "learning_rate": 1e-2,
    "warmup_steps": 2, "schedule": "cosine", "think": 0.0,
}  # fmt: skip
MORE = {**STAGE, "schedule": "continued"}
del MORE["learning_rate"], MORE["warmup_steps"]


@pytest.fixture
def trained(tiny_values, tmp_path):
    """trained(stages, changes={}): weights and optimiser state after all of the stages, which read one record again and again."""
    record = tmp_path / "one.jsonl"
    record.write_text(json.dumps({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one of one"}]}))

    def train(stages, changes=()):
        values = tiny_values({"data.sources": {"one": str(record)}, "data.validation": {}, "evaluation": {}, **dict(changes)})
        config = parse_config({**values, "stages": stages}, "here")
        data, stage = open_data(config), None
        for name in stages:
            stage = Stage(config, name, alone(torch.device("cpu")), data, stage, None)
            for batch in stage.batches():
                assert stage.train_step(batch).skipped is None
            stage.end()
            stage.close()
        return {key: tensor for key, tensor in stage.tensors().items() if not key.startswith("random_state")}

    return train


@pytest.mark.parametrize(
    "optimizer",
    [
        {"kind": "adamw"},
        {"kind": "muon"},
        {"kind": "smalt_adamw", "state_dtype": "bfloat16"},
        {"kind": "smalt_adamw", "state_dtype": "bfloat16", "offload": "cpu"},
    ],
    ids=lambda optimizer: "-".join(optimizer.values()),
)
def test_two_stages_of_one_schedule_are_one_stage_of_both_lengths(optimizer, trained):
    changes = {"optimizer": optimizer}
    whole = trained({"a": {**STAGE, "steps": 7}}, changes)
    parts = trained({"a": {**STAGE, "steps": 3}, "b": {**MORE, "steps": 4}}, changes)
    assert parts.keys() == whole.keys()
    assert not [key for key in whole if not torch.equal(parts[key], whole[key])]


def test_what_learns_in_both_stages_goes_on_and_the_rest_begins(trained):
    steps = trained(
        {
            "a": {**STAGE, "steps": 3},
            "b": {**MORE, "steps": 2, "trainable": {"vision": 1.0, "language": 1.0}},
            "c": {**MORE, "steps": 1, "trainable": {"vision": 1.0, "projector": 1.0}},
        }
    )
    counts = {(key.split(".")[2], int(value)) for key, value in steps.items() if key.startswith("optimizer.step.")}
    assert counts == {("vision", 3), ("projector", 1)}


def test_a_stage_with_a_schedule_of_its_own_begins_anew(trained):
    state = trained({"a": {**STAGE, "steps": 3}, "b": {**STAGE, "steps": 2}})
    assert {int(value) for key, value in state.items() if key.startswith("optimizer.step.")} == {2}
