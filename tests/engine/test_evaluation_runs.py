"""Evaluations of whole runs: during training, on two processes, after a resume, and by the command."""

import json
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tiny_config, tmp_path):
    """The tiny run in float64 with a task from a file of its own, evaluated every second step."""
    rows = [{"question": f"{a}+1=", "answer": f"#### {a + 1}"} for a in range(5)]
    (tmp_path / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"path": tmp_path / "gsm.jsonl", "modes": ["think"], "budgets": [2]}
    during = {"evaluation.every": 2, "evaluation.questions_during": 3, "checkpoint.keep": 9}
    return tiny_config({"dtype": "float64", "evaluation.tasks": {"gsm": task}, **during})


def answers(folder):
    """The lines of every file of answers, by its step."""
    files = sorted((folder / "answers").iterdir())
    return {int(f.stem.removeprefix("step-")): [json.loads(line) for line in f.read_text().splitlines()] for f in files}


def smalt_eval(*options):
    command = [sys.executable, "-m", "smalt.engine.cli", "eval", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_are_kept_alike_on_one_process_and_two_and_follow_a_resume(config, tmp_path, train):
    one, two = tmp_path / "one", tmp_path / "two"
    train([config, "--folder", one])
    train([config, "--folder", two], nproc=2)
    kept = answers(one)
    assert kept == answers(two)
    assert list(kept) == [2, 4, 6, 7]
    conditions = {(a["task"], a["mode"], a["budget"], a["shuffled"]) for a in kept[2]}
    assert {c for c in conditions if c[0] == "gsm"} == {("gsm", "think", None, False), ("gsm", "think", 2, False)}
    assert [a["question"] for a in kept[4] if (a["task"], a["budget"]) == ("gsm", 2)] == [0, 1, 3]
    assert {a["step"] for a in kept[7]} == {7}
    assert [a["truth"] for a in kept[7] if (a["task"], a["budget"]) == ("gsm", 2)] == [[str(n + 1)] for n in range(4)]
    # As if killed after step 4: what came later is asked again.
    shutil.rmtree(one / "checkpoints" / "step-00000006")
    shutil.rmtree(one / "checkpoints" / "step-00000007")
    (one / "answers" / "step-00000099.jsonl").write_text("")
    train([config, "--folder", one, "--resume"])
    assert answers(one) == kept


def test_the_command_repeats_the_final_evaluation_and_asks_other_questions(config, tmp_path, train):
    run = tmp_path / "run"
    train([config, "--folder", run])
    scores, kept = (run / "evaluation.json").read_text(), answers(run)
    (run / "evaluation.json").unlink()
    shutil.rmtree(run / "answers")
    assert "gsm" in smalt_eval("--run", run)
    assert (run / "evaluation.json").read_text() == scores
    assert answers(run) == {7: kept[7]}
    (tmp_path / "m.csv").write_text("1+1?,2,3,4,5,A\n2+2?,2,3,4,5,C\n3+3?,2,3,4,5,F\n")
    out, said = tmp_path / "out.json", tmp_path / "said.jsonl"
    options = ("--task", f"mmlu={tmp_path / 'm.csv'}", "--budget", 3, "--json", out, "--answers", said)
    table = smalt_eval("--run", run, *options)
    assert "mmlu" in table
    assert "budget 3" in table
    assert "left out: record 2 of mmlu: no answer: the answer 'F' is none of the options A, B, C, D" in table
    (score,) = json.loads(out.read_text())
    assert (score["task"], score["mode"], score["budget"], score["questions"]) == ("mmlu", "think", 3, 2)
    assert [json.loads(line)["truth"] for line in said.read_text().splitlines()] == [["A"], ["C"]]
    assert (run / "evaluation.json").read_text() == scores
