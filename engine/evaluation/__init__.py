"""Accuracy on held-out questions, of tasks in the formats that benchmarks come in: docs/evaluation.md."""

from .measure import Condition, Evaluation, conditions_of, evaluate
from .scores import Answer, Score, headline, scores_json, scores_table, write_answers
from .tasks import Question, Questions, Task, open_benchmark, open_tasks, with_questions

__all__ = [
    "Answer",
    "Condition",
    "Evaluation",
    "Question",
    "Questions",
    "Score",
    "Task",
    "conditions_of",
    "evaluate",
    "headline",
    "open_benchmark",
    "open_tasks",
    "scores_json",
    "scores_table",
    "with_questions",
    "write_answers",
]
