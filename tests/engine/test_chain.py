"""Chains: each run begins with the one before it, and a chain that was killed in any of them ends as if it had not been."""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from smalt.engine.chain import agree_on_chain, check_links, read_links, split_options
from smalt.engine.checkpoints import latest_checkpoint
from smalt.engine.config import load_chain, load_config
from smalt.engine.errors import UserError
from smalt.engine.launch import parse_launch, read_command
from smalt.engine.train import main
from smalt.parallel import alone

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "evaluation.budget_tasks": [], "evaluation.questions": 2, "evaluation.max_tokens": 3, "data.validation": {}, "stages.align": None,
    "checkpoint.every": 2,
}  # fmt: skip
FIRST = {**QUIET, "name": "first", "model.language.num_layers": 2, "model.language.ffn": 80}
SECOND = {
    **QUIET, "name": "second", "init.run": "runs/first", "init.prune": {"documents": 4}, "stages.sft.steps": 6,
    "stages.sft.objective": "distillation", "stages.sft.teacher": "runs/first", "stages.sft.distillation": {"cross_entropy": 0.5},
}  # fmt: skip
THIRD = {**QUIET, "name": "third", "init.run": "runs/second"}


@pytest.fixture
def chain(tiny_config, tmp_path):
    """chain(changes={}, names=[...], **more): the chain's config. changes: of each run by its name; more: other keys of the chain."""

    def write(changes=(), names=("first", "second", "third"), **more):
        changes = dict(changes)
        for name, values in (("first", FIRST), ("second", SECOND), ("third", THIRD)):
            tiny_config({**values, **changes.get(name, {})}, f"{name}.toml")
        path = tmp_path / "all.toml"
        values = {"chain": [f"{name}.toml" for name in names], **more}
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        return path

    return write


def planned(path, *options):
    with agree_on_chain([str(path), "--folder", str(path.parent / "out"), *options], alone(torch.device("cpu"))) as found:
        return [arguments for arguments, _ in found.links_left()]


def test_each_launch_has_its_own_options_and_finds_the_runs_that_it_names(chain, tmp_path):
    folder, path = tmp_path / "out", chain()
    launches = planned(path, "--seed", "3", "--second.stages.sft.steps", "9", "--evaluation.budgets", "1", "2")
    common = ["--seed", "3"], ["--evaluation.budgets", "1", "2"]
    named = ["--init.run", str(folder / "first"), "--stages.sft.teacher", str(folder / "first")]
    assert [words[1:4] for words in launches] == [
        ["--folder", str(folder / name), "--continue"] for name in ("first", "second", "third")
    ]
    assert [words[4:] for words in launches] == [
        [*common[0], *common[1]],
        [*common[0], "--stages.sft.steps", "9", *common[1], *named],
        [*common[0], *common[1], "--init.run", str(folder / "second")],
    ]
    assert split_options(["long_context"], ["--long-context.a", "-1", "--b=2"]) == {"long_context": ["--a", "-1", "--b=2"]}


@pytest.mark.parametrize(
    ("changes", "names", "more", "said"),
    [
        ({}, ["first", "gone"], {}, "gone.toml: No such file"),
        ({}, ["first", "all"], {}, "all.toml is a chain of runs; name the config of one of them"),
        ({}, ["first", "second", "second"], {}, "two runs of the name 'second'"),
        ({}, [], {}, "chain: List should have at least 1 item"),
        ({}, ["first"], {"seed": 1}, "seed: unknown key; did you mean"),
        ({"first": {"name": "data"}}, ["first"], {}, "can have the name 'data': --data is an option of all runs"),
        ({}, ["first", "third"], {}, "link third.toml has init.run = runs/second, and the link before it is first"),
        ({"second": {"init": {}}}, ["first", "second"], {}, "init.run = None, and the link before it is first: set it to runs/first"),
        ({"first": {"init.run": "runs/third"}}, ["first", "second", "third"], {}, "runs/third, a link that does not come before it"),
        ({"third": {"model.language.ffn": 72}}, ["first", "second", "third"], {}, "model.language.ffn: 64 there, 72 here"),
        ({"second": {"model.language.ffn": 96}}, ["first", "second"], {}, "model.language.ffn: 96 is more than the 80 that there are"),
        ({"first": {"model.vision.patch": 4}}, ["first", "second"], {}, "link second,"),
        (
            {"second": {"stages.sft.yarn": {"factor": 8.0, "original_length": 16}}}, ["first", "second", "third"], {},
            "model.language.yarn: factor=8.0 original_length=16",
        ),
        ({"third": {"parallel": {"tp": 2}}}, ["first", "second", "third"], {}, "link third,"),
        (
            {n: {"parallel": {"tp": 2, "async_tp": True, "compile": True}} for n in ("first", "second")}, ["first", "second"], {},
            "parallel.async_tp in several links",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_chain_that_cannot_be_run_is_refused_before_its_first_step(chain, changes, names, more, said):
    with pytest.raises(UserError) as refusal:
        planned(chain(changes, names, **more))
    assert said in str(refusal.value)


def test_a_folder_of_the_other_kind_is_refused(chain, tmp_path):
    """Without the config of the chain the default one would begin inside its folder."""
    for name, kind in (("chain.json", "chain of runs"), ("config.json", "run")):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        command = ["--continue", "--folder", str(tmp_path / name)]
        with pytest.raises(UserError, match=f"holds a {kind}, and .* give the config that it was begun with"):
            parse_launch(command) if kind != "run" else agree_on_chain([str(chain()), *command], alone(torch.device("cpu")))


def test_a_link_that_has_begun_is_held_to_its_own_config(chain, tmp_path):
    path, begun = chain(), tmp_path / "out" / "first"
    (begun / "checkpoints").mkdir(parents=True)
    config = load_config(tmp_path / "first.toml")
    (begun / "config.json").write_text(config.model_dump_json())
    chain({"first": {"model.language.ffn": 8}})
    # Killed before its first checkpoint it would begin again, with what the file says now.
    with pytest.raises(UserError, match="ffn: 64 is more than the 8 that there are"):
        planned(path, "--continue")
    (begun / "checkpoints" / "step-00000002").mkdir()
    launches = planned(path, "--continue")
    assert [Path(words[0]).stem for words in launches] == ["first", "second", "third"]


def test_a_teacher_that_cannot_be_laid_out_is_found_before_the_first_step(chain, tmp_path):
    heads = {"num_heads": 3, "num_kv_heads": 3}
    of_teacher = {f"model.language.{key}": value for key, value in heads.items()}
    of_student = {f"model.language.{key}": 2 for key in heads}
    path = chain({"first": of_teacher, "second": {**of_student, "parallel": {"tp": 2}}}, ["first", "second"])
    command = read_command([str(path)])
    links = read_links(command, load_chain(path), tmp_path / "out")
    with pytest.raises(
        UserError, match=r"(?s)link second, .*stages\.sft\.teacher: the teacher does not fit the layout: .*num_heads = 3"
    ):
        check_links(links, 0, 2)


def test_a_chain_that_stops_says_how_it_goes_on_with_its_options(chain, tmp_path, capsys):
    options = ["--seed", "3", "--second.stages.sft.steps", "9"]
    with agree_on_chain([str(chain()), "--folder", str(tmp_path / "a folder"), *options], alone(torch.device("cpu"))) as found:
        found.stop()
    said = capsys.readouterr().out.strip().partition("go on with ")[2]
    with agree_on_chain(shlex.split(said), alone(torch.device("cpu"))) as again:
        assert again.plan == found.plan


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_chain_that_is_killed_in_its_second_link_ends_with_the_bits_of_one_that_is_not(
    chain, tmp_path, monkeypatch, train_command, assert_same_run, capsys
):
    """Torchrun starts the process again."""
    path, whole = chain(), tmp_path / "whole"
    assert main([str(path), "--folder", str(whole)]) == 0
    assert "link 2 of 3: second, in" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    command = [
        str(ROOT / word) if word == "engine/train.py" else word for word in train_command([path], options=["--max-restarts", "1"])
    ]
    with (tmp_path / "said").open("w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as the tests have, for the same bits
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        while not (begun := [f for f in Path("runs").glob("*/second") if lines(f) >= 3]) and process.poll() is None:
            time.sleep(0.01)
        killed = begun[0].parent.absolute()
        assert json.loads((killed / "chain.json").read_text()) == {"links": ["first", "second", "third"], "ended": ["first"]}
        first = os.stat(killed / "first" / "metrics.jsonl").st_mtime_ns
        os.kill(int((killed / "second" / "lock").read_text().split()[1]), signal.SIGKILL)
        assert process.wait(timeout=280) == 0, (tmp_path / "said").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "goes on from" in (tmp_path / "said").read_text()
    assert os.stat(killed / "first" / "metrics.jsonl").st_mtime_ns == first, "a link that has ended is passed over"
    for name in ("first", "second", "third"):
        assert_same_run(killed / name, whole / name)
    lineage = latest_checkpoint(killed / "third" / "checkpoints").state["lineage"]
    for name, step in (("second", 6), ("first", 4)):
        parent = lineage["parents"]["init.run"]
        assert Path(parent["checkpoint"]).absolute() == killed / name / "checkpoints" / f"step-{step:08d}"
        lineage = parent["lineage"]
    # Another launch is refused, one that goes on has nothing to do, and what has ended stays the beginning.
    assert main([str(path), "--folder", str(killed)]) == 1
    assert "holds a chain of runs already; continue it with --resume or --continue" in capsys.readouterr().err
    assert main([str(path), "--folder", str(killed), "--continue"]) == 0
    assert main([str(chain(names=["first"])), "--folder", str(killed), "--resume"]) == 1
    assert "what has ended must be its beginning" in capsys.readouterr().err
