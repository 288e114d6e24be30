"""A stage of longer packs with YaRN goes on from the weights of the short one, and everything after it has what it set."""

import json
import shutil

import pytest
import torch

from smalt.engine.checkpoints import Checkpoint, check_architecture
from smalt.engine.config import parse_config
from smalt.engine.errors import UserError
from smalt.engine.inference import load_run
from smalt.model import ModelConfig, YarnConfig

YARN = {"factor": 8.0, "original_length": 128}
LONG = {
    "sequence_length": 1024, "packs_per_step": 1, "steps": 3, "mixture": {"sum": 1.0}, "trainable": {"language": 1.0}, "yarn": YARN,
    "schedule": "continued",
}  # fmt: skip


def test_a_stage_inherits_the_yarn_of_those_before_it(tiny_values):
    later = {**LONG, "yarn": {**YARN, "factor": 1.0}}
    stages = {**tiny_values()["stages"], "long": LONG, "after": {**LONG, "yarn": None}, "last": later}
    config = parse_config(tiny_values({"stages": stages}), "here")
    found = {name: config.model_of(name).language.yarn for name in config.stages}
    assert found == {
        "align": None,
        "sft": None,
        "long": YarnConfig(**YARN),
        "after": YarnConfig(**YARN),
        "last": YarnConfig(**later["yarn"]),
    }
    assert [config.packs_of(name) for name in config.stages] == [2, 2, 1, 1, 1]
    assert config.model_of("long").vision == config.model.vision
    of_model = parse_config(tiny_values({"stages": stages, "model.language.yarn": {**YARN, "factor": 2.0}}), "here")
    assert [yarn and yarn.factor for yarn in (of_model.model_of(n).language.yarn for n in stages)] == [2.0, 2.0, 8.0, 8.0, 1.0]


def _saved(model, tmp_path):
    return Checkpoint(tmp_path / "step-1", 1, {"model": model})


def test_a_checkpoint_of_another_yarn_or_of_before_it_is_taken_and_one_of_other_sizes_is_not(tiny_values, tmp_path):
    plain = parse_config(tiny_values(), "here").model
    scaled = plain.model_copy(update={"language": plain.language.model_copy(update={"yarn": YarnConfig(**YARN)})})
    before = plain.model_dump()
    del before["language"]["yarn"]
    for saved in (plain.model_dump(), scaled.model_dump(), before):
        for wanted in (plain, scaled):
            check_architecture(_saved(saved, tmp_path), wanted)
    before["language"]["ffn"] = 96
    with pytest.raises(UserError, match=r"\n  model\.language\.ffn: 96 in the checkpoint, 64 here$"):
        check_architecture(_saved(before, tmp_path), scaled)


def _figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["stage"], line["loss"], line["learning_rate"]) for line in lines]


@pytest.mark.slow
def test_a_run_through_a_longer_stage_and_one_that_was_stopped_inside_it(tiny_config, tmp_path, train):
    changes = {"checkpoint.every": 1, "checkpoint.keep": 20, "stages.align": None, "evaluation.budget_tasks": []}
    config, whole = tiny_config({**changes, "stages.long": LONG}), tmp_path / "whole"
    train([config, "--folder", whole])
    run = load_run(whole)
    assert run.model.config.language.yarn == YarnConfig(**YARN)
    assert run.config.model.language.yarn is None
    states = [json.loads((path / "state.json").read_text()) for path in sorted((whole / "checkpoints").glob("step-*"))]
    assert [s["model"]["language"]["yarn"] and s["model"]["language"]["yarn"]["factor"] for s in states] == [None] * 4 + [8.0] * 3
    assert all(ModelConfig.model_validate(s["model"]).vision == run.config.model.vision for s in states)
    rates = [rate for *_, rate in _figures(whole)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)

    # One that stopped at the border and goes on is the same; without the YaRN it is another.
    for name, options in (("same", []), ("plain", ["--stages.long.yarn.factor", "1"])):
        stopped = shutil.copytree(whole, tmp_path / name)
        for path in sorted((stopped / "checkpoints").glob("step-*"))[4:]:
            shutil.rmtree(path)
        train([config, "--folder", stopped, "--resume", *options])
        assert (_figures(stopped) == _figures(whole)) == (name == "same")
    weights = [load_run(tmp_path / name).model.state_dict() for name in ("whole", "same", "plain")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
