"""Final accuracies of runs side by side: one row a name, and runs of the same name, such as those of several seeds, as their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table

from .errors import UserError
from .run_folder import EVALUATION, read_config


def compare_runs(folders: Sequence[Path]) -> Table:
    """Accuracy in percent by task and mode, without a budget. ±: the standard error of the mean over runs, where there are several.

    Raises UserError for a folder without a final evaluation, and where the runs were asked different questions.
    """
    if not folders:
        raise UserError("name the folders of the runs to compare")
    groups: dict[str, list[dict[str, float]]] = {}
    for folder in folders:
        groups.setdefault(read_config(folder).name, []).append(_accuracies(folder))
    columns = list(next(iter(groups.values()))[0])
    table = Table(title="Final accuracy, %", caption="±: standard error of the mean over runs")
    table.add_column("run")
    table.add_column("runs", justify="right")
    for column in [*columns, "mean"]:
        table.add_column(column, justify="right")
    for name, runs in groups.items():
        if any(list(run) != columns for run in runs):
            raise UserError(f"the runs {name!r} were evaluated on other tasks than the first one; compare those of one evaluation")
        cells = [[run[column] for run in runs] for column in columns] + [[fmean(run.values()) for run in runs]]
        table.add_row(name, str(len(runs)), *map(_cell, cells))
    return table


def _accuracies(folder: Path) -> dict[str, float]:
    path = folder / EVALUATION
    try:
        scores = json.loads(path.read_text())
        return {f"{s['task']} {s['mode']}": s["accuracy"] for s in scores if s["budget"] is None and not s["shuffled"]}
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no final evaluation: {path.name} is missing; finish the run, or `smalt eval --run {folder}`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); `smalt eval --run {folder}` writes it anew") from error


def _cell(values: list[float]) -> str:
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{error}"
