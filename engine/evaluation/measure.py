"""Asks a model the questions of tasks under conditions; the questions are dealt over the ranks by what they cost."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from smalt.model import Document, MultimodalModel
from smalt.model.batch import intervals
from smalt.model.cost import Workload, deal_chunks, model_cost
from smalt.model.generate import Sampling, generate
from smalt.parallel import World

from ..data.agreement import Account, Entry, read_alike
from ..data.chat import ChatEncoder, Mode
from ..data.images import ImageLimits, image_bytes
from ..data.reading import SkippedSample
from ..data.records import Image
from ..errors import BadRecord, UserError
from ..sections import EvaluationConfig
from .scores import Answer, Score, score_answers
from .tasks import Question, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Condition:
    """How a task is asked. budget: tokens of the thought, None for unlimited; shuffled: with images of other questions."""

    task: str
    mode: Mode
    budget: int | None = None
    shuffled: bool = False


@dataclass(frozen=True)
class Evaluation:
    """scores: one a condition; answers: the first of each condition, as many as are to be kept; skipped: what could not be asked."""

    scores: list[Score]
    answers: list[Answer]
    skipped: list[SkippedSample]


@dataclass(frozen=True)
class _Usable:
    """A question that can be asked. number: in its task; images: digest of their files; cost: FLOPs, of which only ratios count;
    images_of: the question whose images it is asked with."""

    number: int
    num_images: int
    images: bytes
    cost: float
    images_of: int


def conditions_of(tasks: Mapping[str, Task]) -> Iterator[Condition]:
    """What the config of each task asks for: modes of all tasks first, then budgets and shuffled images."""
    for name, task in tasks.items():
        for mode in task.config.modes:
            yield Condition(name, mode)
    for name, task in tasks.items():
        for budget in task.config.budgets:
            yield Condition(name, "think", budget)
        if task.config.shuffle_images:
            yield Condition(name, "think" if "think" in task.config.modes else "answer", shuffled=True)


def evaluate(
    model: MultimodalModel,
    encoder: ChatEncoder,
    tasks: Mapping[str, Task],
    conditions: Iterable[Condition],
    config: EvaluationConfig,
    limit: int | None,
    world: World,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answers and scores of the whole model (not a sharded one); every rank gets all of them.

    limit: at most so many questions a task; None: as many as the task's own number, else the config's, says. Up to rounding, what a
    question is answered with depends on neither the ranks nor its neighbours.
    Raises UserError, on all ranks, for a task of which no question can be used, and where ranks read different files.
    """
    was_training = model.training
    model.eval()
    conditions, usable = list(conditions), dict[str, list[_Usable]]()
    evaluation = Evaluation([], [], [])
    for done, condition in enumerate(conditions):
        progress(done, len(conditions))
        task = tasks[condition.task]
        if task.name not in usable:
            usable[task.name], skipped = _usable(model, encoder, task, _most(task, config, limit), world, config)
            evaluation.skipped.extend(skipped)
        asked = _with_images_of_others(usable[task.name]) if condition.shuffled else usable[task.name]
        if not asked:
            continue  # no two questions can exchange their images
        own = [asked[i] for i in deal([u.cost for u in asked], world.size)[world.rank]]
        found = _on_every_rank(world, task.name, lambda: _answers(model, encoder, task, condition, own, config))  # noqa: B023 - called at once
        answers = sorted((a for part in found for a in part), key=lambda a: (a.question, a.sample))
        evaluation.scores.append(score_answers(answers, len(task)))
        evaluation.answers.extend(answers[: config.keep_answers])
    progress(len(conditions), len(conditions))
    model.train(was_training)
    return evaluation


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Which questions each rank answers, dearest first: as many for each, less one for some, and sums of cost that are near."""
    padded = np.zeros(-(-len(costs) // num_ranks) * num_ranks)
    padded[: len(costs)] = costs
    dealt = deal_chunks(padded, num_ranks)
    return [sorted((int(i) for i in row if i < len(costs)), key=lambda i: -costs[i]) for row in dealt]


def _usable(
    model: MultimodalModel, encoder: ChatEncoder, task: Task, limit: int, world: World, config: EvaluationConfig
) -> tuple[list[_Usable], list[SkippedSample]]:
    """As many questions, spread evenly over the task, measured; a bad one is left out of every condition alike, and so of the number
    that is reported."""
    count = min(limit, len(task))

    def read() -> tuple[list[_Usable], list[SkippedSample], Account]:
        usable, skipped, entries = [], [], []
        for number in (i * len(task) // count for i in range(count)):
            try:
                question = task[number]
                prompt = encoder.prompt(question.record, task.config.modes[0])
                images = _digest(question.record.images, encoder.limits)
            except BadRecord as error:
                skipped.append(SkippedSample(task.name, number, error.cause, error.detail))
                entries.append(Entry.of(skipped[-1]))
                continue
            cost = _cost(model, prompt, _max_tokens(task, config))
            usable.append(_Usable(number, len(question.record.images), images, cost, number))
            entries.append(Entry.of(prompt, repr(question.truth).encode() + images))
        if not usable:
            first = f"; the first is {entries[0]}" if entries else ""
            raise UserError(
                f"evaluation source {task.name!r}: none of the {count} records that were read is a usable question with an answer"
                f"{first}"
            )
        return usable, skipped, Account.of(entries)

    usable, skipped, _ = read_alike(world, f"evaluation source {task.name!r}", read, lambda made: made[2])
    return usable, skipped


def _digest(images: Sequence[Image], limits: ImageLimits) -> bytes:
    files = (hashlib.blake2b(image_bytes(image, limits), digest_size=16).digest() for image in images)
    return hashlib.blake2b(b"".join(files), digest_size=16).digest()


def _most(task: Task, config: EvaluationConfig, limit: int | None) -> int:
    own = task.config.questions or (config.questions if limit is None else limit)
    return own if limit is None else min(limit, own)


def _cost(model: MultimodalModel, prompt: Document, max_tokens: int) -> float:
    length = len(prompt)
    start, end = intervals(length, prompt.spans, model.config.image_attention)
    pairs = int((end - start).sum()) + max_tokens * length
    return model_cost(model.config)(Workload(length + max_tokens, pairs, len(prompt.tiles)))


def _max_tokens(task: Task, config: EvaluationConfig) -> int:
    return task.config.max_tokens or config.max_tokens


def _with_images_of_others(usable: Sequence[_Usable]) -> list[_Usable]:
    """Each question with the images of another that has as many, and others: several questions may be about one image.

    In the order of the digests, a shift by the number of questions about the commonest images leads out of every run of equal ones.
    Questions without images, or of whose number of them there are no others, are left out.
    """
    groups: dict[int, list[_Usable]] = {}
    for question in usable:
        groups.setdefault(question.num_images, []).append(question)
    shifted = []
    for count, members in groups.items():
        most = max(Counter(q.images for q in members).values())
        if not count or most == len(members):
            continue
        ordered = sorted(members, key=lambda q: (q.images, q.number))
        for place, question in enumerate(ordered, most):
            # Where one image has more than half of the questions, the shift may lead back to it.
            others = (ordered[(place + further) % len(ordered)] for further in range(len(ordered)))
            shifted.append(replace(question, images_of=next(q.number for q in others if q.images != question.images)))
    return sorted(shifted, key=lambda q: q.number)


def _on_every_rank(world: World, name: str, work: Callable[[], T]) -> list[T]:
    """What the work of each rank comes to, on all; where one fails, all raise: they would wait for it in vain."""
    done, failure = None, ""
    try:
        done = work()
    except (BadRecord, UserError) as error:
        failure = str(error)
    reports = world.gather((done, failure))
    if failed := [(rank, text) for rank, (_, text) in enumerate(reports) if text]:
        rank, text = failed[0]
        raise UserError(f"evaluation source {name!r}: a question that was read before cannot be read any more on rank {rank}: {text}")
    return [made for made, _ in reports if made is not None]


def _answers(
    model: MultimodalModel, encoder: ChatEncoder, task: Task, condition: Condition, asked: Sequence[_Usable], config: EvaluationConfig
) -> list[Answer]:
    """Every sampled answer to the questions, which are read a batch at a time."""
    samples = task.config.samples
    repeated = [(usable, sample) for usable in asked for sample in range(samples)]
    sampling = Sampling(_max_tokens(task, config), task.config.temperature, task.config.top_k, task.config.top_p)
    answers = []
    for low in range(0, len(repeated), config.batch):
        part = repeated[low : low + config.batch]
        questions = {usable.number: _read(task, usable) for usable, _ in part}
        prompts = {number: encoder.prompt(question.record, condition.mode) for number, question in questions.items()}
        completions = generate(
            model, [prompts[usable.number] for usable, _ in part], encoder.control, sampling, condition.budget,
            numbers=[usable.number * samples + sample for usable, sample in part],
        )  # fmt: skip
        for (usable, sample), completion in zip(part, completions, strict=True):
            answers.append(_answer(encoder, condition, questions[usable.number], usable.number, sample, completion.tokens))
    return answers


def _read(task: Task, usable: _Usable) -> Question:
    question = task[usable.number]
    if usable.images_of == usable.number:
        return question
    return replace(question, record=replace(question.record, images=task[usable.images_of].record.images))


def _answer(encoder: ChatEncoder, condition: Condition, question: Question, number: int, sample: int, tokens: list[int]) -> Answer:
    thought, answer = encoder.split(tokens, thinking=condition.mode == "think")
    outcome = question.score(answer)
    return Answer(
        condition.task, condition.mode, condition.budget, condition.shuffled, number, sample, question.record.messages[-1][1],
        question.truth.answers, encoder.decode(thought), answer, outcome.found, outcome.score, len(thought), question.groups,
    )  # fmt: skip
