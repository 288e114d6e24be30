"""Tasks: questions from files, each with its prompt, its images and what makes an answer right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..data.chat import split_thought
from ..data.forms import FORMS
from ..data.records import Record, Records
from ..data.sources import open_source
from ..errors import BadRecord, UserError
from ..sections import TaskConfig
from .formats import FORMATS, Source, images_by_index
from .rows import first_row, read_rows
from .scorers import SCORERS, Outcome, Truth, is_readable, load_math_verify

# What is asked for in a prompt without a template, so that the answer can be told from the text around it.
INSTRUCTIONS = {
    "choice": "Answer with the letter of the right option.",
    "math": r"Put the final answer into \boxed{}.",
}


@dataclass(frozen=True)
class Question:
    """record: what is asked, and nothing after it; scorer: by name; groups: kinds of questions that it is one of."""

    record: Record
    truth: Truth
    scorer: str
    groups: tuple[str, ...] = ()

    def score(self, answer: str) -> Outcome:
        return SCORERS[self.scorer](answer, self.truth)


class Questions(Protocol):
    """Random access to questions; name: of the task."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Question:
        """Raises BadRecord for a question that cannot be asked, or has no answer."""
        ...


@dataclass(frozen=True)
class Task:
    """Questions, and how they are asked: scorer, template, modes, budgets and sampling, which stand in ``config``."""

    questions: Questions
    config: TaskConfig

    @property
    def name(self) -> str:
        return self.questions.name

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Question:
        """Question ``index`` as it is asked. Raises BadRecord."""
        question, config = self.questions[index], self.config
        scorer = question.scorer if config.scorer == "auto" else config.scorer
        if scorer == "choice" and not question.truth.options:
            raise BadRecord("no options", "the scorer choice needs a question with options")
        asked = replace(question, truth=replace(question.truth, tolerance=config.tolerance), scorer=scorer)
        if not is_readable(scorer, asked.truth):
            raise BadRecord("no answer", f"the scorer {scorer} finds nothing in {' | '.join(question.truth.answers)!r:.200}")
        if (template := config.template) is None and scorer in INSTRUCTIONS:
            template = f"{{question}}\n{INSTRUCTIONS[scorer]}"
        return asked if template is None else replace(asked, record=_in_template(asked.record, template))


def with_questions(tasks: Mapping[str, Task], count: int | None) -> dict[str, Task]:
    """The tasks, each with that number of questions for its own; as they are when None."""
    update = {} if count is None else {"questions": count}
    return {name: replace(task, config=task.config.model_copy(update=update)) for name, task in tasks.items()}


class RecordQuestions:
    """Records of which the last assistant message is the truth, thought aside."""

    def __init__(self, records: Records):
        self.records, self.name = records, records.name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Question:
        record = self.records[index]
        role, content = record.messages[-1]
        if role != "assistant":
            raise BadRecord("no answer", "the last message is not the assistant's")
        if len(record.messages) == 1:
            raise BadRecord("no question", "the assistant's message is the only one")
        answer = split_thought(content)[1].strip()
        return Question(replace(record, messages=record.messages[:-1]), Truth((answer,)), "exact")


class RowQuestions:
    """Questions of the rows of a file, or of a folder of files. Raises UserError for files that :func:`read_rows` refuses."""

    def __init__(self, name: str, path: Path, form: str):
        self.name, self.form, self.rows = name, form, read_rows(name, path)
        self.folder = path if path.is_dir() else path.parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Question:
        row = self.rows[index]
        if isinstance(row, BadRecord):
            raise row
        asked = FORMATS[self.form](row, self.source)
        record = Record((("user", asked.text),), asked.images, self.name, index)
        return Question(record, Truth(asked.answers, asked.options), asked.scorer, asked.groups)

    @cached_property
    def source(self) -> Source:
        return Source(self.folder, images_by_index(self.rows))


def open_tasks(configs: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """Every task by its name. Raises UserError for files that are missing, empty or of no known form, and where the library of a
    scorer is not installed."""
    tasks = {name: Task(_open(name, config), config) for name, config in configs.items()}
    if any("math" in (task.config.scorer, getattr(task.questions, "form", None)) for task in tasks.values()):
        load_math_verify()
    return tasks


def _open(name: str, config: TaskConfig) -> Questions:
    form = config.format if config.format != "auto" else "records" if "://" in config.path else _form(name, Path(config.path))
    return RecordQuestions(open_source(name, config.path)) if form == "records" else RowQuestions(name, Path(config.path), form)


class _Benchmark:
    """Questions with their answers as records."""

    def __init__(self, questions: RowQuestions, path: str):
        self.questions, self.name, self.path = questions, questions.name, path

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Record:
        question = self.questions[index]
        answer = question.truth.answers[0]
        return replace(question.record, messages=(*question.record.messages, ("assistant", answer)))


def open_benchmark(name: str, path: str) -> Records | None:
    """The questions of a file of rows, each with its first right answer; None for what is read as a source is. Raises UserError."""
    row = None if "://" in path else first_row(name, Path(path))
    if row is None or set(row) & set(FORMS) or not set(row) & {"question", "problem"}:
        return None
    return _Benchmark(RowQuestions(name, Path(path), _form(name, Path(path))), path)


def _form(name: str, path: Path) -> str:
    """By the first row; what has no rows holds records, or is for the reader of records to refuse."""
    row = first_row(name, path)
    if row is None:
        return "table" if path.is_file() and path.suffix in (".tsv", ".csv", ".jsonl") else "records"
    if "messages" in row or "conversations" in row:
        return "records"
    if "problem" in row:
        return "math"
    if "question" in row:
        return "gsm8k" if "####" in str(row.get("answer")) else "table"
    known = "question and answer, problem and solution, messages"
    raise UserError(f"evaluation task {name!r}: {path} has the columns {', '.join(row)}; known are {known}")


def _in_template(record: Record, template: str) -> Record:
    """The last user message as the template has it."""
    *before, (role, content) = record.messages
    return replace(record, messages=(*before, (role, template.replace("{question}", content))))
