"""Runs side by side."""

import json

import pytest
from rich.console import Console

from smalt.engine.compare import compare_runs
from smalt.engine.config import parse_config
from smalt.engine.errors import UserError


@pytest.fixture
def finished(tmp_path, tiny_values):
    """finished(folder, name, sum=accuracy): a run with a final evaluation."""

    def make(folder, name, **accuracies):
        config = parse_config(tiny_values({"name": name}), "test")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config.model_dump_json())
        scores = [
            {"task": task, "mode": "think", "budget": budget, "shuffled": False, "accuracy": value if budget is None else 0.0}
            for task, value in accuracies.items()
            for budget in (0, None)
        ]
        (tmp_path / folder / "evaluation.json").write_text(json.dumps(scores))
        return tmp_path / folder

    return make


def shown(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_seeds_are_one_row(finished):
    runs = [
        finished("a", "small", sum=0.5, read=0.9),
        finished("b", "small", sum=0.7, read=0.9),
        finished("c", "large", sum=0.8, read=1.0),
    ]
    text = shown(compare_runs(runs))
    small, large = (next(line for line in text.splitlines() if name in line) for name in ("small", "large"))
    assert [cell.strip() for cell in small.strip("│").split("│")] == ["small", "2", "60.0 ± 10.0", "90.0 ± 0.0", "75.0 ± 5.0"]
    assert [cell.strip() for cell in large.strip("│").split("│")] == ["large", "1", "80.0", "100.0", "90.0"]


def test_what_cannot_be_compared_is_named(finished, tmp_path):
    first, other = finished("a", "small", sum=0.5), finished("b", "small", read=0.5)
    with pytest.raises(UserError, match="other tasks"):
        compare_runs([first, other])
    (other / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"no final evaluation.*`smalt eval --run "):
        compare_runs([first, other])
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare_runs([tmp_path / "none"])
