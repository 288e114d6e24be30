"""Accuracy by length of document before and after a long-context stage with YaRN, and after the same stage without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from smalt.parallel import World, alone

from .config import RunConfig
from .evaluation import conditions_of, evaluate
from .stage import RunData, Stage
from .trainer import open_data, whole_model


@dataclass(frozen=True)
class Accuracy:
    """What one model of one seed answers rightly in think mode, by evaluation source. trained: the long stage was."""

    seed: int
    yarn: bool
    trained: bool
    by_source: dict[str, float]


def bench_yarn(config: RunConfig, seeds: int, progress: Callable[[str], None] = lambda said: None) -> list[Accuracy]:
    """Train all stages but the last once a seed, then the last with its YaRN and without, in one process.

    Raises UserError where the data is missing.
    """
    world, data = alone(torch.device("cpu")), open_data(config)
    found = []
    for seed in range(seeds):
        seeded = config.model_copy(update={"seed": seed})
        for accuracy in _of_seed(seeded, world, data):
            progress(f"seed {seed}: {_name(accuracy)}: " + ", ".join(f"{k} {100 * v:.1f}%" for k, v in accuracy.by_source.items()))
            found.append(accuracy)
    return found


def _of_seed(config: RunConfig, world: World, data: RunData) -> Iterator[Accuracy]:
    *first, last = config.stages
    short: Stage | None = None
    for name in first:
        short = Stage(config, name, world, data, short, None)
        _train(short)
    stages = {**config.stages, last: config.stages[last].model_copy(update={"yarn": None})}
    for yarn, chosen in ((False, config.model_copy(update={"stages": stages})), (True, config)):
        before = copy.copy(short)
        if before is not None:
            before.kept = copy.deepcopy(before.kept)  # a stage takes over the optimiser's state itself, and there are two
        stage = Stage(chosen, last, world, data, before, None)
        yield Accuracy(config.seed, yarn, False, _accuracy(config, stage, data))
        _train(stage)
        yield Accuracy(config.seed, yarn, True, _accuracy(config, stage, data))


def _train(stage: Stage) -> None:
    for batch in stage.batches():
        stage.train_step(batch)
    stage.end()
    stage.close()


def _accuracy(config: RunConfig, stage: Stage, data: RunData) -> dict[str, float]:
    model, asked = whole_model(stage.model), config.evaluation
    conditions = [c for c in conditions_of(data.questions) if c.mode == "think" and c.budget is None and not c.shuffled]
    found = evaluate(model, data.encoder, data.questions, conditions, asked, None, stage.world)
    return {s.task: s.accuracy for s in found.scores}


def _name(accuracy: Accuracy) -> str:
    return f"{'after' if accuracy.trained else 'before'} the long stage, {'YaRN' if accuracy.yarn else 'plain rotary positions'}"


def yarn_table(found: list[Accuracy]) -> Table:
    """Each seed's accuracies in percent, by source."""
    sources = list(found[0].by_source)
    table = Table(title="Accuracy in think mode, %, by length of the held-out documents")
    for column in ("seed", "", *sources):
        table.add_column(column, justify="left" if column == "" else "right")
    for a in found:
        table.add_row(str(a.seed), _name(a), *(f"{100 * a.by_source[source]:.1f}" for source in sources))
    return table


def yarn_json(found: list[Accuracy]) -> list[dict[str, Any]]:
    return [asdict(accuracy) for accuracy in found]
