"""The picture of a run: loss, accuracy by task and mode, accuracy against the thinking budget."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from .run_folder import EVALUATION, PLOT


def plot_run(metrics: list[dict[str, Any]], folder: Path) -> Path:
    """Draw ``evaluation.png`` from the metrics and the final evaluation of a run's folder; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path = folder / EVALUATION
    scores = json.loads(path.read_text()) if path.exists() else []
    figure, (losses, tasks, budgets) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    _plot_losses(losses, metrics)
    _plot_tasks(tasks, [s for s in scores if s["budget"] is None and not s["shuffled"]])
    _plot_budgets(budgets, [s for s in scores if s["mode"] == "think" and not s["shuffled"]], scores)
    figure.savefig(folder / PLOT, dpi=110)
    plt.close(figure)
    return folder / PLOT


def _plot_losses(axes: Any, metrics: list[dict[str, Any]]) -> None:
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="0.8", linewidth=0.8, label="training")
    for key in sorted({k for m in metrics for k in m if k.startswith("validation_loss/")}):
        points = [(m["step"], m[key]) for m in metrics if key in m]
        axes.plot(*zip(*points, strict=True), label=f"held out: {key.split('/')[1]}")
    for before, after in pairwise(metrics):
        if before["stage"] != after["stage"]:
            axes.axvline(before["step"], color="0.6", linestyle=":", linewidth=1)
    axes.set(title="Loss", xlabel="step", ylabel="nats a token", yscale="log")
    axes.legend(fontsize=8)


def _plot_tasks(axes: Any, scores: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(s["task"] for s in scores))
    for offset, mode in ((-0.2, "answer"), (0.2, "think")):
        chosen = [s for s in scores if s["mode"] == mode]
        places = [names.index(s["task"]) + offset for s in chosen]
        heights, errors = [100 * s["accuracy"] for s in chosen], [100 * s["standard_error"] for s in chosen]
        bars = axes.bar(places, heights, 0.38, yerr=errors, capsize=3, label=f"{mode} mode")
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set(title="Accuracy by task and mode", ylabel="%", ylim=(0, 109), xticks=range(len(names)), xticklabels=names)
    axes.legend(fontsize=8, loc="lower right")


def _plot_budgets(axes: Any, scores: list[dict[str, Any]], all_scores: list[dict[str, Any]]) -> None:
    for task in dict.fromkeys(s["task"] for s in scores if s["budget"] is not None):
        curve = sorted((s for s in scores if s["task"] == task), key=lambda s: (s["budget"] is None, s["budget"]))
        labels = ["unlimited" if s["budget"] is None else str(s["budget"]) for s in curve]
        heights, errors = [100 * s["accuracy"] for s in curve], [100 * s["standard_error"] for s in curve]
        line = axes.errorbar(labels, heights, errors, marker="o", capsize=3, label=f"{task}, think mode")
        for s in all_scores:
            if s["task"] == task and s["mode"] == "answer":
                axes.axhline(100 * s["accuracy"], color=line[0].get_color(), linestyle="--", linewidth=1, label=f"{task}, answer mode")
            if s["task"] == task and s["shuffled"]:
                axes.axhline(100 * s["accuracy"], color="0.5", linestyle=":", linewidth=1, label=f"{task}, images shuffled")
    axes.set(title="Accuracy against the thinking budget", xlabel="budget, tokens", ylabel="%", ylim=(0, 105))
    if axes.has_data():
        axes.legend(fontsize=8, loc="upper left")
