"""Answers and what they add up to: scores by task, mode and budget, as a table, as JSON, and the answers themselves."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..data.chat import Mode
from ..data.reading import SkippedSample
from ..tensor_files import write_file

LONGEST_TEXT = 4000  # characters of a prompt, thought or answer that are kept


@dataclass(frozen=True)
class Answer:
    """One answer to one question. question: its number in the task's file; sample: which of several answers; truth: any of these is
    right; found: what the scorer took for the answer, None where it found none; thought_tokens: length of the thought."""

    task: str
    mode: Mode
    budget: int | None
    shuffled: bool
    question: int
    sample: int
    prompt: str
    truth: tuple[str, ...]
    thought: str
    answer: str
    found: str | None
    score: float
    thought_tokens: int
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Accuracy of one task under one condition. budget: tokens, None for unlimited; shuffled: images of other questions.

    questions: those that were asked; of: all that the task has; commonest: accuracy of always giving the commonest right answer;
    thought_tokens: mean length of the thoughts; standard_error: of the accuracy, over questions; unparsed: share of the answers in
    which the scorer found none; samples: answers to each question; pass_at: share of the questions of which k answers hold a right
    one, by k; groups: (questions, accuracy) by kind of question.
    """

    task: str
    mode: Mode
    budget: int | None
    shuffled: bool
    questions: int
    of: int
    accuracy: float
    commonest: float
    thought_tokens: float
    standard_error: float
    unparsed: float
    samples: int = 1
    pass_at: dict[int, float] = field(default_factory=dict)
    groups: dict[str, tuple[int, float]] = field(default_factory=dict)


def score_answers(answers: Sequence[Answer], available: int) -> Score:
    """The score of all answers under one condition. available: questions that the task has."""
    first, by_question = answers[0], defaultdict[int, list[Answer]](list)
    for answer in answers:
        by_question[answer.question].append(answer)
    means = {number: float(np.mean([a.score for a in own])) for number, own in by_question.items()}
    truths = Counter(own[0].truth[0] for own in by_question.values())
    return Score(
        first.task, first.mode, first.budget, first.shuffled, len(means), available, float(np.mean([*means.values()])),
        truths.most_common(1)[0][1] / len(means), float(np.mean([a.thought_tokens for a in answers])),
        _standard_error([*means.values()]), sum(a.found is None for a in answers) / len(answers),
        len(answers) // len(means), _pass_at([[a.score for a in own] for own in by_question.values()]), _by_group(by_question, means),
    )  # fmt: skip


def _standard_error(means: list[float]) -> float:
    """Of the mean over questions, whose several answers are not independent; of right and wrong alone, sqrt(p (1 - p) / n)."""
    return float(np.std(means)) / math.sqrt(len(means))


def _pass_at(scores: list[list[float]]) -> dict[int, float]:
    """For k = 1, 2, 4, ... and all: without bias from n >= k answers, of which c are right, 1 - C(n - c, k) / C(n, k)
    (Chen et al. 2021, arXiv 2107.03374)."""
    n = len(scores[0])
    if n == 1:
        return {}
    ks = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
    right = [sum(score == 1 for score in own) for own in scores]
    return {k: float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])) for k in ks}


def _by_group(by_question: dict[int, list[Answer]], means: dict[int, float]) -> dict[str, tuple[int, float]]:
    members = defaultdict[str, list[float]](list)
    for number, own in by_question.items():
        for group in own[0].groups:
            members[group].append(means[number])
    return {group: (len(own), float(np.mean(own))) for group, own in sorted(members.items())}


def scores_table(scores: list[Score], skipped: Sequence[SkippedSample] = ()) -> Table:
    """skipped: questions that could not be asked, which the caption counts by task and cause."""
    table = Table(title="Accuracy on held-out questions, %")
    for column in ("task", "mode", "accuracy", "commonest", "unparsed", "thought", "questions"):
        table.add_column(column, justify="left" if column in ("task", "mode") else "right")
    for s in scores:
        budget = "" if s.budget is None else f", budget {s.budget}"
        passed = f", pass@{s.samples} {100 * s.pass_at[s.samples]:.1f}" if s.pass_at else ""
        table.add_row(
            s.task, s.mode + budget + (", images shuffled" if s.shuffled else ""),
            f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}{passed}", f"{100 * s.commonest:.1f}", f"{100 * s.unparsed:.1f}",
            f"{s.thought_tokens:.1f}" if s.mode == "think" else "",
            f"{s.questions:,}" if s.questions == s.of else f"{s.questions:,} of {s.of:,}",
        )  # fmt: skip
    table.caption = "± one standard error; commonest: always the commonest answer; unparsed: no answer found; thought: mean tokens"
    if skipped:
        counts = Counter(f"{s.source}: {s.cause}" for s in skipped)
        table.caption += "\nleft out, of " + "; of ".join(f"{what}, {count}" for what, count in counts.items())
    return table


def scores_json(scores: list[Score]) -> list[dict[str, Any]]:
    return [asdict(s) for s in scores]


def headline(scores: list[Score]) -> dict[str, float]:
    """Flat names for the metrics: ``accuracy/sum/think``, ``accuracy/sum/think/budget_4``, ``accuracy/sum/think/shuffled``."""
    flat = {}
    for s in scores:
        suffix = f"/budget_{s.budget}" if s.budget is not None else "/shuffled" if s.shuffled else ""
        flat[f"accuracy/{s.task}/{s.mode}{suffix}"] = s.accuracy
    return flat


def write_answers(path: Path, step: int, answers: Sequence[Answer]) -> None:
    """Write JSON lines, one an answer, in place of what the file held; ``step``: of the run, after which they were given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, **_shortened(answer)}, ensure_ascii=False) + "\n" for answer in answers]
    write_file(path, ["".join(lines).encode(errors="replace")])


def _shortened(answer: Answer) -> dict[str, Any]:
    values = asdict(answer)
    for key in ("prompt", "thought", "answer", "found"):
        if values[key] is not None and (more := len(values[key]) - LONGEST_TEXT) > 0:
            values[key] = f"{values[key][:LONGEST_TEXT]} ... ({more} more characters)"
    return values
