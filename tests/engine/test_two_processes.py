"""Two processes compute what one computes."""

import json
import shutil
import subprocess
import sys

import pytest

from smalt.engine.checkpoints import latest_checkpoint
from smalt.profiling.traces import read_traces

FIELDS = ("loss", "grad_norm", "validation_loss/read", "loss_tokens", "documents/read", "documents/sum")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_losses_of_one_process(tiny_config, tmp_path, train):
    # Frozen parts in the first stage, all parts in the second; documents without an image, so that a rank can have no tile.
    config = tiny_config({"dtype": "float64", "logging.validate_every": 1, "data.packs_per_step": 4})
    train([config, "--folder", tmp_path / "one"])
    train([config, "--folder", tmp_path / "two"], nproc=2)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(one) == len(two) == 7
    for ours, theirs in zip(two, one, strict=True):
        for field in FIELDS:
            if field in theirs:
                assert ours[field] == pytest.approx(theirs[field], rel=1e-10), (theirs["step"], field)
    scores = [json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "two")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_resume_on_the_other_number_of_processes(tiny_config, tmp_path, train):
    config = tiny_config({"dtype": "float64", "checkpoint.every": 5, "checkpoint.keep": 3})
    train([config, "--folder", tmp_path / "one"])
    train([config, "--folder", tmp_path / "two"], nproc=2)
    whole = lines(tmp_path / "one")
    for folder, nproc in (("one", 2), ("two", 1)):
        # As if killed after step 5: its checkpoint is then the newest.
        (tmp_path / folder / "checkpoints" / "step-00000007").rename(tmp_path / folder / "gone")
        assert latest_checkpoint(tmp_path / folder / "checkpoints").step == 5
        train([config, "--folder", tmp_path / folder, "--resume"], nproc=nproc)
        for ours, theirs in zip(lines(tmp_path / folder), whole, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-10), theirs["step"]
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-10), theirs["step"]


@pytest.mark.slow
def test_packs_that_do_not_divide(tiny_config, tmp_path, train):
    done = train([tiny_config({"data.packs_per_step": 3}), "--folder", tmp_path / "run"], nproc=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: data.packs_per_step = 3 is not a multiple of dp 1 x fsdp 2 = 2") == 1
    assert "error on rank" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({0: "a", 1: "a"}, ["error: a"]),
        ({0: "a", 1: "b"}, ["error on rank 1: b", "error: a"]),
        ({1: "b"}, ["error on rank 1: b"]),
    ],
)
def test_an_error_is_printed_once_and_never_lost(errors, said, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys, time\n"
        "from smalt.engine.errors import UserError, tell\n"
        "from smalt.parallel import meet\n"
        "world = meet()\n"
        f"errors = {errors}\n"
        "if world.rank in errors:\n"
        "    time.sleep(0 if world.rank else 1)\n"  # the others are first at the end
        "    tell(UserError(errors[world.rank]), world)\n"
        "    sys.exit(1)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert sorted(line for line in done.stderr.splitlines() if line.startswith("error")) == said


@pytest.mark.slow
def test_the_whole_model_is_gathered_without_a_word_of_torch(tiny_config, tmp_path, train):
    changes = {
        "parallel.tp": 2,
        "model.language.num_kv_heads": 2,
        "stages.sft": None,
        "stages.align.steps": 1,
        "evaluation.questions": 1,
    }
    done = train([tiny_config(changes), "--folder", tmp_path / "run"], nproc=2)
    assert "suboptimal" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_leaves_the_traces_of_its_first_life_alone(tiny_config, tmp_path, train):
    changes = {"logging.trace_first": 3, "logging.trace_steps": 3, "checkpoint.every": 2, "checkpoint.keep": 9, "evaluation": {}}
    config, folder = tiny_config(changes), tmp_path / "run"
    train([config, "--folder", folder], nproc=2)
    before = {path: path.read_bytes() for path in (folder / "traces").glob("*/*")}
    # As if killed after step 5, and once more after step 3: what goes on takes steps 5 to 7, and then 3 to 7.
    for killed_after, nproc in ((5, 1), (3, 2)):
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > killed_after:
                shutil.rmtree(checkpoint)
        train([config, "--folder", folder, "--resume"], nproc=nproc)
    assert {path: path.read_bytes() for path in before} == before
    found = {path.name: read_traces(path) for path in (folder / "traces").iterdir()}
    steps = {name: [[number for number, _, _ in trace.steps] for trace in traces] for name, traces in found.items()}
    # Step 3 is the last of its stage, and a recording is of one stage.
    assert steps == {
        "step-00000003": [[3]] * 2, "step-00000004": [[4, 5]] * 2, "step-00000005": [[5]],
        "step-00000003-2": [[3]] * 2, "step-00000004-2": [[4, 5]] * 2,
    }  # fmt: skip


@pytest.mark.slow
def test_traces_of_a_run_name_the_axis_of_every_exchange(tiny_config, tmp_path, train):
    changes = {"parallel.pp": 2, "model.language.num_layers": 2, "logging.trace_first": 2, "logging.trace_steps": 1, "evaluation": {}}
    train([tiny_config(changes), "--folder", tmp_path / "run"], nproc=2)
    axes = {(c.kind, c.axis) for trace in read_traces(tmp_path / "run" / "traces") for c in trace.collectives}
    # Pairs have no group of their own in a trace: the run has to say whose they are.
    assert {axis for kind, axis in axes if kind in ("send", "recv")} == {"pp"}
    assert "unknown" not in {axis for _, axis in axes}
