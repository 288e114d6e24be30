"""The folder of a run: whose it is, when options become part of the run, and what damage to its small files costs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from smalt.engine import launch, train
from smalt.engine.config import parse_config
from smalt.engine.run_folder import RunFolder, lock_folder, read_metrics
from smalt.engine.train import main

SHORT = {"stages.align": None, "stages.sft.steps": 4, "evaluation": {}, "data.validation": {}, "checkpoint.every": 2}


@pytest.fixture
def run(tiny_config, tmp_path, capsys):
    """run(*arguments): train in this process into tmp_path/run; gives (exit code, stdout, stderr)."""
    config = str(tiny_config(SHORT))

    def train_here(*arguments):
        code = main([config, "--folder", str(tmp_path / "run"), *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return train_here


@pytest.fixture
def folder(run, tmp_path):
    """The folder of a finished run of four steps."""
    assert run()[0] == 0
    return tmp_path / "run"


def small_files(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in ("lock", "evaluation.png")
    }


REFUSED = {
    "optimizer.kind muon": "optimizer.kind: adamw in the checkpoint, muon here; go on with --optimizer.kind adamw",
    "optimizer.kind apex": "apex",
    "model.language.ffn 96": "model.language.ffn: 64 in the checkpoint, 96 here",
    "data.tokenizer gone.json": "gone.json does not exist",
}
if importlib.util.find_spec("wandb") is None:
    REFUSED["logging.wandb-project some"] = "wandb is not installed"


@pytest.mark.slow
def test_options_with_which_a_run_cannot_go_on_are_no_part_of_it(run, folder):
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    before = small_files(folder)
    for options, said in REFUSED.items():
        code, _, error = run("--resume", *f"--{options}".split())
        assert code == 1
        assert said in error
        assert small_files(folder) == before, options
    code, out, _ = run("--resume", "--optimizer.kind", "smalt_adamw", "--optimizer.state-dtype", "bfloat16")
    assert code == 0
    assert f"goes on from {folder / 'checkpoints' / 'step-00000002'}, stage sft, 2 steps left" in out
    assert json.loads((folder / "config.json").read_text())["optimizer"]["kind"] == "smalt_adamw"


@pytest.mark.slow
def test_a_run_that_cannot_begin_leaves_its_folder_to_the_next(run, tmp_path):
    assert run("--optimizer.kind", "apex")[0] == 1
    assert run()[0] == 0
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.slow
def test_where_a_run_would_go_on_and_that_nothing_is_left(run, folder):
    before, newest = small_files(folder), folder / "checkpoints" / "step-00000004"
    code, out, _ = run("--resume", "--dry-run")
    assert code == 0
    assert f"would go on from {newest}, stage sft: nothing is left to train" in out
    code, out, _ = run("--continue", "--dry-run", "--stages.sft.steps", "7")
    assert code == 0
    assert f"would go on from {newest}, stage sft, 3 steps left" in out
    assert "first step: " in out
    assert small_files(folder) == before
    code, out, _ = run("--continue")
    assert code == 0
    assert f"goes on from {newest}, stage sft: nothing is left to train" in out


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--continue"]], ids=["new", "continue"])
def test_a_run_that_began_while_another_was_starting_is_left_alone(arguments, run, tmp_path, monkeypatch):
    lay_out = train.lay_out_run

    def slow(*rest):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "config.json").write_text("the run of someone else")
        return lay_out(*rest)

    monkeypatch.setattr(train, "lay_out_run", slow)
    code, _, error = run(*arguments)
    assert code == 1
    assert error == (
        f"error: {tmp_path / 'run'} holds a run already; continue it with --resume or --continue, or choose another folder "
        "with --folder\n"
    )
    assert small_files(tmp_path / "run") == {"config.json": b"the run of someone else"}


@pytest.mark.slow
def test_a_run_that_saved_while_another_launch_waited_for_it_goes_on_with_its_own_config(run, tmp_path, monkeypatch):
    lock, waited = launch.lock_folder, tmp_path / "waited"
    assert run("--logging.every", "3")[0] == 0
    (tmp_path / "run").rename(waited)
    (tmp_path / "run").mkdir()

    def wait(folder, seconds):
        shutil.copytree(waited, folder, dirs_exist_ok=True)
        return lock(folder, seconds)

    monkeypatch.setattr(launch, "lock_folder", wait)
    code, _, error = run("--continue")
    assert code == 0
    assert "logging.every: 3 (10 in the file)" in error
    assert json.loads((tmp_path / "run" / "config.json").read_text())["logging"]["every"] == 3


@pytest.mark.parametrize("arguments", [[], ["--continue"]], ids=["new", "continue"])
@pytest.mark.parametrize("name", ["file", "/proc/nope"])
def test_a_folder_that_cannot_be_made(arguments, name, tiny_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / name
    assert main([str(tiny_config(SHORT)), "--folder", str(folder), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} cannot be written to: ")
    assert error.endswith("; choose another folder with --folder\n")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{bad", "[1]", ""])
def test_a_damaged_config(text, run, folder):
    (folder / "config.json").write_text(text)
    for go_on in ("--resume", "--continue"):
        code, _, error = run(go_on)
        assert code == 1
        assert error.startswith(f"error: {folder / 'config.json'} is damaged: ")
        assert "put a good one in its place" in error


@pytest.mark.slow
def test_a_damaged_line_of_metrics_stops_nothing(run, folder):
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\x00\xffgarbage\n", b"7\n", *lines[1:]]))
    (folder / "spikes.jsonl").write_bytes(b"\n")
    code, _, error = run("--resume")
    assert code == 0
    for name, number in (("metrics", 2), ("metrics", 3), ("spikes", 1)):
        assert f"warning: {folder / name}.jsonl, line {number} is damaged; it is passed over" in error
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4]
    assert (folder / "metrics.jsonl").read_bytes().startswith(lines[0] + b"\x00\xffgarbage\n7\n" + lines[1])


def test_each_folder_has_a_run_of_its_own_at_weights_and_biases(tiny_values, tmp_path, monkeypatch):
    """Links of two chains have one name, and a run that goes on is the one that it was."""
    asked = []
    stub = SimpleNamespace(init=lambda **given: asked.append(given) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = parse_config(tiny_values({"logging.wandb_project": "some"}), "test")
    for chain, step in (("one", None), ("two", None), ("one", 2)):
        (tmp_path / chain / "link").mkdir(parents=True, exist_ok=True)
        (tmp_path / chain / "chain.json").touch()
        with lock_folder(tmp_path / chain / "link", 0) as lock:
            folder = RunFolder(tmp_path / chain / "link", config, True, lock)
            folder.begin(step)
            folder.close()
    first, second, again = (given["id"] for given in asked)
    assert first == again != second
    assert [given["name"] for given in asked] == ["one/link", "two/link", "one/link"]


def test_the_evaluation_of_an_earlier_end_is_not_that_of_a_run_that_goes_on(tiny_values, tmp_path):
    config = parse_config(tiny_values(), "test")
    for step, stays in ((config.total_steps, True), (config.total_steps - 1, False)):
        (tmp_path / "evaluation.json").write_text("[]")
        with lock_folder(tmp_path, 0) as lock:
            folder = RunFolder(tmp_path, config, True, lock)
            folder.begin(step)
            folder.close()
        assert (tmp_path / "evaluation.json").exists() == stays


KILLED = """
import os, signal, sys
from smalt.engine import trainer
from smalt.engine.train import main
built = trainer.Stage
def stage(*arguments):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return built(*arguments)
trainer.Stage = stage
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_workers_killed_before_their_first_step_begin_again_in_their_folder(tiny_config, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, tmp_path / "killed.py", tiny_config(SHORT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(read_metrics(folder)) == 4
