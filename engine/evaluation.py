"""Accuracy on held-out questions: by task and mode, against the thinking budget, and with the images shuffled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from smalt.model import Document, MultimodalModel
from smalt.model.generate import Sampling, generate
from smalt.parallel import World

from .config import EvaluationConfig
from .data.agreement import Account, Entry, read_alike
from .data.chat import ChatEncoder, Mode, split_thought
from .data.records import ParquetRecords, Record
from .data.stream import SkippedSample
from .errors import BadRecord, UserError


@dataclass(frozen=True)
class Score:
    """Accuracy of one task under one condition. budget: tokens, None for unlimited; shuffled: images of other questions.

    commonest: accuracy of always giving the commonest right answer; thought_tokens: mean length of the thoughts.
    """

    task: str
    mode: Mode
    budget: int | None
    shuffled: bool
    questions: int
    accuracy: float
    commonest: float
    thought_tokens: float

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


@dataclass(frozen=True)
class _Question:
    prompt: Document
    truth: str
    budget: int | None


def evaluate(
    model: MultimodalModel,
    encoder: ChatEncoder,
    records: Mapping[str, ParquetRecords],
    config: EvaluationConfig,
    questions: int,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Greedy accuracy of the whole model (not a sharded one); the questions are dealt over the ranks, every rank gets all scores."""
    was_training = model.training
    model.eval()
    conditions = list(_conditions(config))
    scores = []
    for number, (task, mode, budget, shuffled) in enumerate(conditions):
        progress(number, len(conditions))
        asked, _ = read_alike(
            world,
            f"evaluation source {task!r}",
            lambda: _questions(records[task], encoder, questions, mode, budget, shuffled),  # noqa: B023 - called at once
            lambda found: found[1],
        )
        if not asked:
            continue  # no two questions can exchange their images
        outcomes = _answer(model, encoder, asked[world.rank :: world.size], config)
        counts = torch.tensor(outcomes, dtype=torch.float64).reshape(-1, 2).sum(0)
        right, thought = world.sum(counts.to(world.device)).tolist()
        commonest = Counter(q.truth for q in asked).most_common(1)[0][1] / len(asked)
        scores.append(Score(task, mode, budget, shuffled, len(asked), right / len(asked), commonest, thought / len(asked)))
    progress(len(conditions), len(conditions))
    model.train(was_training)
    return scores


def _conditions(config: EvaluationConfig):
    for task in config.sources:
        yield task, "answer", None, False
        yield task, "think", None, False
    for task in config.budget_tasks:
        for budget in config.budgets:
            yield task, "think", budget, False
        yield task, "think", None, True


def _questions(
    records: ParquetRecords, encoder: ChatEncoder, limit: int, mode: Mode, budget: int | None, shuffled: bool
) -> tuple[list[_Question], Account]:
    """The first questions; a bad record is left out of every condition alike, and so of the number of questions that is reported."""
    asked, usable, read = [], [], []
    for i in range(min(limit, len(records))):
        try:
            record = records[i]
            question = _question(record, encoder, mode, budget)
        except BadRecord as error:
            read.append(Entry.of(SkippedSample(records.name, i, error.cause, error.detail)))
            continue
        asked.append(question)
        usable.append(record)
        read.append(Entry.of(question.prompt, question.truth.encode()))
    if not asked:
        raise UserError(f"evaluation source {records.name!r}: none of the first {limit} records is a usable question with an answer")
    if shuffled:
        asked = [_question(record, encoder, mode, budget) for record in _with_images_of_others(usable)]
    return asked, Account.of(read)


def _question(record: Record, encoder: ChatEncoder, mode: Mode, budget: int | None) -> _Question:
    role, content = record.messages[-1]
    if role != "assistant":
        raise BadRecord("no answer", "the last message is not the assistant's")
    return _Question(encoder.prompt(record, mode), split_thought(content)[1].strip(), budget)


def _with_images_of_others(records: list[Record]) -> list[Record]:
    """Each question with the images of another that has as many; a fixed shift inside each group, so none keeps its own.

    Questions without images, or alone with their number of them, are left out.
    """
    groups: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(len(record.images), []).append(i)
    result = {}
    for count, members in groups.items():
        if count == 0 or len(members) == 1:
            continue
        for i, other in zip(members, np.roll(members, 1), strict=True):
            result[i] = replace(records[i], images=records[other].images)
    return [result[i] for i in sorted(result)]


def _answer(model: MultimodalModel, encoder: ChatEncoder, asked: list[_Question], config: EvaluationConfig) -> list[list[float]]:
    """For each question, whether it was answered rightly and how many tokens were thought."""
    outcomes = []
    for low in range(0, len(asked), config.batch):
        part = asked[low : low + config.batch]
        completions = generate(model, [q.prompt for q in part], encoder.control, Sampling(config.max_tokens), [q.budget for q in part])
        for question, completion in zip(part, completions, strict=True):
            thought, answer = encoder.split(completion.tokens, thinking=int(question.prompt.tokens[-1]) == encoder.control.think_start)
            outcomes.append([float(answer == question.truth), float(len(thought))])
    return outcomes


def scores_table(scores: list[Score]) -> Table:
    table = Table(title="Accuracy on held-out questions, %")
    for column in ("task", "mode", "accuracy", "commonest", "thought", "questions"):
        table.add_column(column, justify="left" if column in ("task", "mode") else "right")
    for s in scores:
        budget = "" if s.budget is None else f", budget {s.budget}"
        table.add_row(
            s.task, s.mode + budget + (", images shuffled" if s.shuffled else ""),
            f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}", f"{100 * s.commonest:.1f}",
            f"{s.thought_tokens:.1f}" if s.mode == "think" else "", str(s.questions),
        )  # fmt: skip
    table.caption = "± one standard error; commonest: always the commonest answer; thought: mean tokens"
    return table


def scores_json(scores: list[Score]) -> list[dict[str, Any]]:
    return [{**asdict(s), "standard_error": s.standard_error} for s in scores]


def headline(scores: list[Score]) -> dict[str, float]:
    """Flat names for the metrics: ``accuracy/sum/think``, ``accuracy/sum/think/budget_4``, ``accuracy/sum/think/shuffled``."""
    flat = {}
    for s in scores:
        suffix = f"/budget_{s.budget}" if s.budget is not None else "/shuffled" if s.shuffled else ""
        flat[f"accuracy/{s.task}/{s.mode}{suffix}"] = s.accuracy
    return flat
