"""Runs that begin with another run: its weights, whole or pruned; its logits, of a teacher; and the lineage that says so."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from smalt.engine.checkpoints import CheckpointWriter, latest_checkpoint
from smalt.engine.config import parse_config
from smalt.engine.errors import UserError
from smalt.engine.initial import find_beginnings
from smalt.engine.lineage import channels_kept, find_parent, make_lineage
from smalt.engine.lineage import make_parent as make_parent_entry
from smalt.engine.stage import Stage
from smalt.engine.trainer import open_data
from smalt.model import build_model
from smalt.parallel import alone

WORLD = alone(torch.device("cpu"))
LARGE = {
    "model.language.num_layers": 2, "model.language.width": 48, "model.language.num_heads": 4, "model.language.num_kv_heads": 2,
    "model.language.ffn": 80, "model.vision.ffn": 40,
}  # fmt: skip
PRUNED = {"init.prune": {"documents": 12, "mixture": {"sum": 1.0}}}


@pytest.fixture
def make_parent(tmp_path, tiny_values):
    """make_parent(changes, name="parent"): the folder of a run with one checkpoint, of random weights, with its lineage."""

    def make(changes=(), name="parent", parents=None):
        config = parse_config(tiny_values(changes), "test")
        writer = CheckpointWriter(tmp_path / name / "checkpoints", 5, WORLD, pytest.fail)
        tensors = {f"model.{key}": p.data for key, p in build_model(config.model, 5).named_parameters()}
        state = {"model": config.model.model_dump(), "lineage": make_lineage(config, {}, parents or {})}
        writer.save(7, tensors, state)
        writer.wait()
        return tmp_path / name

    return make


@pytest.fixture
def begin(tiny_values):
    """begin(changes, resumed=None): what a run begins with, and its first stage."""
    stages = []

    def make(changes, resumed=None):
        config = parse_config(tiny_values(changes), "test")
        data = open_data(config)
        found = find_beginnings(config, WORLD, data.reader, resumed)
        stages.append(Stage(config, next(iter(config.stages)), WORLD, data, None, None, beginnings=found))
        return found, stages[-1]

    yield make
    for stage in stages:
        stage.close()


def stored(parent):
    return {key.removeprefix("model."): t for key, t in load_file(next(parent.glob("checkpoints/*/*.safetensors"))).items()}


def refused(begin, changes):
    with pytest.raises(UserError) as refusal:
        begin(changes)
    return str(refusal.value)


@pytest.mark.parametrize("place", ["", "checkpoints/step-00000007"])
def test_a_run_begins_with_the_bits_of_its_parent(make_parent, begin, place):
    parent = make_parent({"model.init_std": 0.3})
    found, stage = begin({"init.run": parent / place})
    weights = stored(parent)
    assert {name for name, _ in stage.model.named_parameters()} == weights.keys()
    assert not [name for name, p in stage.model.named_parameters() if not torch.equal(p, weights[name])]
    entry = found.lineage["parents"]["init.run"]
    assert (entry["step"], entry["kept"], entry["checkpoint"]) == (7, None, str(parent / "checkpoints" / "step-00000007"))
    assert entry["lineage"]["tokenizer"] == found.lineage["tokenizer"]
    assert entry["lineage"]["config"] != found.lineage["config"]


def test_a_parent_stays_the_checkpoint_that_it_was_however_its_path_is_spelled(make_parent, tmp_path, monkeypatch):
    folder = make_parent()
    first = latest_checkpoint(folder / "checkpoints")
    known = {"init.run": make_parent_entry(folder, first)}
    shutil.copytree(first.path, first.path.with_name("step-00000009"))
    monkeypatch.chdir(tmp_path)
    for spelled in (folder, folder.relative_to(tmp_path)):
        assert find_parent("init.run", spelled, known).path == first.path


@pytest.mark.slow
def test_a_pruned_run_begins_with_parts_of_its_parent_always_the_same(make_parent, begin):
    parent = make_parent(LARGE)
    (found, stage), (again, _) = begin({"init.run": parent, **PRUNED}), begin({"init.run": parent, **PRUNED})
    assert found == again
    channels, weights = found.kept.language.channels, stored(parent)
    assert len(channels) == 32
    assert torch.equal(stage.model.weights()["language.embedding.weight"], weights["language.embedding.weight"][:, channels])
    assert found.lineage["parents"]["init.run"]["kept"]["channels"] == channels


def test_a_parent_that_does_not_fit_is_explained(make_parent, begin, digits, tmp_path):
    parent = make_parent(LARGE)
    said = refused(begin, {"init.run": parent})
    assert "model.language.width: 48 there, 32 here" in said
    assert "model.vision.ffn: 40 there, 32 here" in said
    assert "init.prune.documents" in said
    assert "is more than" in refused(begin, {"init.run": make_parent({}, "small"), **PRUNED, "model.language.width": 64})
    assert f"init.run = {tmp_path / 'none'}" in refused(begin, {"init.run": tmp_path / "none"})
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps({**json.loads((digits / "tokenizer.json").read_text()), "version": "1.1"}))
    strange = make_parent({"data.tokenizer": other}, "strange")
    assert "another tokenizer" in refused(begin, {"init.run": strange})
    said = refused(begin, {"init.run": parent, "init.prune": {"documents": 12}, "stages.align.sequence_length": 8})
    assert "only 0 can be read and fit a pack of 8 tokens" in said


DISTILLED = {"stages.align": None, "stages.sft.objective": "distillation"}


def test_a_teacher_that_does_not_fit_is_explained(make_parent, begin, tiny_values):
    teacher = make_parent(LARGE)
    with pytest.raises(UserError, match="go together: set both, or neither"):
        parse_config(tiny_values(DISTILLED), "test")
    with pytest.raises(UserError, match="nothing would be learned"):
        parse_config(tiny_values({**DISTILLED, "stages.sft.teacher": teacher, "stages.sft.distillation": {"kl": 0.0}}), "test")
    common = {**DISTILLED, "stages.sft.teacher": teacher}
    with pytest.raises(UserError, match=r"stages.sft.objective = 'distillation'"):
        parse_config(tiny_values({**common, "parallel.runtime": "deepspeed"}), "test")
    assert "vocabulary: 320 of the teacher, 340 here" in refused(begin, {**common, "model.language.vocabulary": 340})
    said = refused(begin, {**common, "stages.sft.distillation": {"hidden": 1.0}})
    assert "was not pruned from" in said
    assert "init.prune.documents" in said


def test_hidden_rows_are_compared_over_the_channels_that_were_kept(make_parent, begin):
    teacher = make_parent(LARGE)
    losses = {**DISTILLED, "stages.sft.teacher": teacher, "stages.sft.distillation": {"kl": 0.0, "hidden": 1.0}}
    found, stage = begin({**losses, "init.run": teacher, **PRUNED})
    assert stage.model.distillation.channels.tolist() == found.kept.language.channels
    # The pruned run is a run of its own, and this one begins with it.
    pruned = make_parent({}, "pruned", found.lineage["parents"])
    later, stage = begin({**losses, "init.run": pruned})
    assert stage.model.distillation.channels.tolist() == found.kept.language.channels
    assert channels_kept(later.lineage, latest_checkpoint(pruned / "checkpoints")) is None
    # Wherever the teacher's folder is now; another run at its place is another teacher.
    moved = teacher.rename(teacher.with_name("moved"))
    assert channels_kept(later.lineage, latest_checkpoint(moved / "checkpoints")) == found.kept.language.channels
    ancestor = latest_checkpoint(moved / "checkpoints")
    other = replace(ancestor, state={**ancestor.state, "lineage": {**ancestor.state["lineage"], "config": "other"}})
    assert channels_kept(later.lineage, other) is None


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(make_parent, begin):
    """Its own weights are perfect: the loss is zero. Pruned ones come nearer."""
    teacher = make_parent({"model.init_std": 0.1})
    _, stage = begin({**DISTILLED, "stages.sft.teacher": teacher, "init.run": teacher})
    batches = stage.batches()
    assert abs(stage.train_step(next(batches)).loss) < 1e-6
    large = make_parent({**LARGE, "model.init_std": 0.1}, "large")
    _, stage = begin(
        {
            **DISTILLED,
            "stages.sft.teacher": large,
            "init.run": large,
            **PRUNED,
            "stages.sft.steps": 12,
            "stages.sft.learning_rate": 5e-3,
        }
    )
    losses = [stage.train_step(batch).loss for batch in stage.batches()]
    assert losses[-1] < 0.8 * losses[0]
    assert len(losses) == 12


CHAIN = {"dtype": "float64", "data.packs_per_step": 2, "evaluation.sources": {}, "evaluation.budget_tasks": []}


@pytest.mark.slow
def test_the_chain_is_the_same_on_any_layout_and_after_a_restart(tiny_config, tmp_path, train, figures):
    """A teacher is trained, pruned and distilled from, by the real command."""
    teacher, first = tmp_path / "teacher", tmp_path / "student"
    train([tiny_config({**CHAIN, **LARGE}), "--folder", teacher])
    small = {"model.language.num_layers": 2, "model.language.num_heads": 4, "model.language.num_kv_heads": 2}
    losses = {"kl": 0.8, "cross_entropy": 0.3, "hidden": 0.5, "temperature": 1.5}
    changes = {
        **CHAIN, **small, **DISTILLED, **PRUNED, "init.run": teacher, "stages.sft.teacher": teacher, "stages.sft.distillation": losses,
    }  # fmt: skip
    config = tiny_config(changes, "student.toml")
    train([config, "--folder", first])
    state = latest_checkpoint(first / "checkpoints").state
    for key in ("init.run", "stages.sft.teacher"):
        entry = state["lineage"]["parents"][key]
        assert entry["checkpoint"] == str(latest_checkpoint(teacher / "checkpoints").path)
        assert entry["lineage"]["sources"]["read"]["records"] == 200
    assert len(state["lineage"]["parents"]["init.run"]["kept"]["channels"]) == 32
    for nproc, options in ((2, ["--parallel.tp", "2"]), (2, ["--parallel.pp", "2"]), (2, [])):
        folder = tmp_path / "-".join(["layout", *options[:1]])
        train([config, "--folder", folder, *options], nproc)
        for ours, theirs in zip(figures(folder), figures(first), strict=True):
            for key, value in theirs.items():
                assert ours[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (options, key)
    killed = tmp_path / "killed"
    shutil.copytree(first, killed)
    shutil.rmtree(latest_checkpoint(killed / "checkpoints").path)
    # Its parent has gone on meanwhile: what the run began with counts.
    shutil.copytree(teacher / "checkpoints" / "step-00000006", teacher / "checkpoints" / "step-00000099")
    train([config, "--resume", "--folder", killed])
    assert figures(killed) == figures(first)
    assert latest_checkpoint(killed / "checkpoints").state["lineage"] == state["lineage"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_begins_with_the_same_weights(make_parent, tiny_config, tmp_path, train, figures, zero):
    pytest.importorskip("deepspeed")
    short = {"evaluation.sources": {}, "evaluation.budget_tasks": [], "stages.align": None, "stages.sft.steps": 2}
    config = tiny_config({**short, **PRUNED, "init.run": make_parent(LARGE)})
    for runtime in ("torch", "deepspeed"):
        options = ["--parallel.runtime", runtime, "--parallel.deepspeed.stage", zero]
        train([config, "--folder", tmp_path / runtime, *options], nproc=2)
    for ours, theirs in zip(figures(tmp_path / "deepspeed"), figures(tmp_path / "torch"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
