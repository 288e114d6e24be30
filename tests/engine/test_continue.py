"""--continue: the same command line begins a run, or goes on where it stopped; workers that torchrun restarts do so by themselves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from smalt.engine.config import load_config
from smalt.engine.errors import UserError
from smalt.engine.launch import parse_launch
from smalt.engine.run_folder import lock_folder, read_config
from smalt.engine.train import main

ROOT = Path(__file__).resolve().parents[2]
OLDER, NEWER = "tiny-20261128-101500", "tiny-20261128-101501"
SHORT = {"stages.align": None, "stages.sft.steps": 4, "evaluation": {}, "data.validation": {}, "checkpoint.every": 2}


@pytest.fixture
def torchrun(monkeypatch, tmp_path):
    """torchrun(run_id): as if it had started this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def started(run_id, port=1):
        for name, value in {"TORCHELASTIC_RUN_ID": run_id, "MASTER_ADDR": "node0", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)

    return started


def begun(folder, run_id, checkpoint=None):
    """A run of that torchrun, killed before or after its first checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "torchrun_id").write_text(run_id)
    if checkpoint:
        (folder / "checkpoints" / checkpoint).mkdir()
    return folder


@pytest.mark.slow
def test_continue_begins_and_goes_on_to_the_end_of_the_run(tiny_config, tmp_path, capsys):
    arguments = [str(tiny_config(SHORT)), "--folder", str(tmp_path / "run"), "--continue"]
    assert main(arguments) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3, 4]
    # Once more: there is nothing left to do.
    assert main(arguments) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    # The newest checkpoint lost with its machine: from the one before.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert main(arguments) == 0
    again = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in again.splitlines()] == [json.loads(line)["loss"] for line in lines.splitlines()]
    assert again.splitlines()[:2] == lines.splitlines()[:2]


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_begins_anew_in_its_folder(tiny_config, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000002.partial").mkdir(parents=True)
    (folder / "config.json").write_text('{"half of a con')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (folder / "skipped.jsonl").write_text('{"step": 1}\n')
    assert main([str(tiny_config(SHORT)), "--folder", str(folder), "--continue"]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] != 1.0
    assert (folder / "skipped.jsonl").read_text() == ""
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert json.loads((folder / "config.json").read_text())["name"] == "tiny"


@pytest.mark.slow
def test_a_run_with_nothing_but_damaged_checkpoints_is_not_begun_anew(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000002.damaged").mkdir(parents=True)
    arguments = [str(tiny_config(SHORT)), "--folder", str(folder)]
    assert main([*arguments, "--continue"]) == 1  # without config.json
    shutil.rmtree(folder)
    assert main(arguments) == 0
    for path in (folder / "checkpoints").iterdir():
        path.rename(path.with_name(f"{path.name}.damaged"))
    capsys.readouterr()
    assert main([*arguments, "--continue"]) == 1
    assert "holds no whole checkpoint, only step-00000002.damaged, step-00000004.damaged" in capsys.readouterr().err


def test_resume_and_continue_are_not_given_together(tiny_config, capsys):
    with pytest.raises(SystemExit):
        parse_launch([str(tiny_config()), "--resume", "--continue"])
    assert "not allowed with" in capsys.readouterr().err


def test_restarted_workers_find_the_folder_of_their_own_run(tiny_config, torchrun, tmp_path):
    config = str(tiny_config())
    ours, theirs = begun(tmp_path / "runs" / OLDER, "a"), begun(tmp_path / "runs" / NEWER, "b")
    torchrun("a")
    launch = parse_launch([config], restarted=True)
    assert (launch.folder.resolve(), launch.resume, launch.may_begin) == (ours, True, True)
    torchrun("b")
    assert parse_launch([config], restarted=True).folder.resolve() == theirs
    # The first ones died before they had a folder.
    torchrun("c")
    launch = parse_launch([config], restarted=True)
    assert launch.folder.name not in (OLDER, NEWER)
    assert not launch.resume
    # These were not restarted: a new run.
    torchrun("a")
    assert not parse_launch([config]).resume
    assert parse_launch([config, "--continue"]).folder.resolve() == ours


def test_runs_of_torchruns_without_an_id_of_their_own_are_told_apart_by_the_address(tiny_config, torchrun, tmp_path):
    config = str(tiny_config())
    ours = begun(tmp_path / "runs" / OLDER, "none node0:7")
    begun(tmp_path / "runs" / NEWER, "none node0:8")
    torchrun("none", port=7)
    assert parse_launch([config], restarted=True).folder.resolve() == ours
    # The address may be used again for another run.
    assert not parse_launch([config, "--continue"]).resume


def test_restarted_workers_leave_the_run_of_someone_else_alone(tiny_config, torchrun, tmp_path):
    folder = begun(tmp_path / "run", "another", "step-00000002")
    (folder / "config.json").write_text("{}")
    torchrun("ours")
    with pytest.raises(UserError, match="holds a run already"):
        parse_launch([str(tiny_config()), "--folder", str(folder)], restarted=True)


def test_the_newest_run_is_that_of_the_name_and_of_the_latest_date(tiny_config, torchrun, tmp_path):
    config = str(tiny_config())
    for name in (NEWER, OLDER, "tiny-long-20270101-000000"):
        begun(tmp_path / "runs" / name, "a")
        (tmp_path / "runs" / name / "config.json").write_text(load_config(Path(config)).model_dump_json())
    torchrun("b")
    assert parse_launch([config, "--resume"]).folder.name == NEWER
    torchrun("a")
    assert parse_launch([config, "--continue"]).folder.name == NEWER


@pytest.mark.slow
def test_a_config_that_has_changed_is_said_and_options_of_a_relaunch_stay(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([str(tiny_config(SHORT)), "--folder", str(folder), "--logging.every", "7"]) == 0
    changed = str(tiny_config({**SHORT, "stages.sft.steps": 9}))
    assert main([changed, "--folder", str(folder), "--resume", "--stages.sft.steps", "6"]) == 0
    said = capsys.readouterr().err
    assert f"warning: {changed} differs from the config of the run" in said
    assert "which is used: logging.every: 7 (10 in the file); give an option" in said
    config = read_config(folder)
    assert (config.stages["sft"].steps, config.logging.every) == (6, 7)
    # The end is saved, wherever it is now.
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step-00000006"
    assert main([changed, "--folder", str(folder), "--resume", "--stages.sft.steps", "7"]) == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step-00000007"


@pytest.mark.slow
def test_the_end_is_saved_where_the_steps_of_an_earlier_stage_have_changed(tiny_config, tmp_path):
    changes = {"evaluation": {}, "data.validation": {}, "checkpoint.every": 5, "checkpoint.keep": 9}
    arguments, checkpoints = ["--folder", str(tmp_path / "run")], tmp_path / "run" / "checkpoints"
    assert main([str(tiny_config(changes)), *arguments]) == 0
    shutil.rmtree(checkpoints / "step-00000007")
    assert main([*arguments, "--resume", "--stages.align.steps", "20"]) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000007"]


HOLD = """
import sys, time
from pathlib import Path
from smalt.engine.run_folder import lock_folder, read_config
held = lock_folder(Path(sys.argv[1]), 0)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_one_process_at_a_time_has_a_folder(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is in use by another run \(host and process \S+ {holder.pid}\)"):
            lock_folder(tmp_path, 0.5)
        assert "is in use by another process; waiting" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    lock_folder(tmp_path, 0).close()


@pytest.mark.slow
def test_a_relaunch_on_fewer_ranks_has_the_same_losses(tiny_config, tmp_path, train, figures):
    changes = {
        "dtype": "float64", "data.packs_per_step": 4, "stages.sft.steps": 6, "checkpoint.every": 4, "checkpoint.keep": 9,
        "evaluation.sources": {}, "evaluation.budget_tasks": [],
    }  # fmt: skip
    config, folder = tiny_config(changes), tmp_path / "run"
    train([config, "--folder", folder, "--continue"], nproc=4)
    whole = figures(folder)
    # As if killed in step 6, after its line was written.
    for step in (8, 9):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    train([config, "--folder", folder, "--continue"], nproc=2)
    assert len(whole) == 9
    for ours, theirs in zip(figures(folder), whole, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "grad_norm", "validation_loss/read"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-10), (theirs["step"], key)


def truncate(shard):
    os.truncate(shard, shard.stat().st_size - 8)


def flip(shard):
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "said"), [(truncate, "bytes, "), (flip, "its checksum differs")])
def test_a_damaged_newest_checkpoint(spoil, said, tiny_config, tmp_path, train, assert_same_run):
    config, whole, run = tiny_config(), tmp_path / "whole", tmp_path / "run"
    train([config, "--folder", whole], nproc=2)
    shutil.copytree(whole, run)
    spoil(run / "checkpoints" / "step-00000007" / "shard-00001.safetensors")
    done = train([config, "--folder", run, "--continue"], nproc=2)
    checkpoints = run / "checkpoints"
    assert f"warning: checkpoint {checkpoints / 'step-00000007'} is damaged: shard-00001.safetensors" in done.stderr
    assert said in done.stderr
    assert f"warning: step 6 is used instead: {checkpoints / 'step-00000006'}" in done.stderr
    shutil.rmtree(checkpoints / "step-00000007.damaged")
    assert_same_run(run, whole)
