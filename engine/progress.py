"""The progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from smalt.profiling.tables import print_table

SECONDS_BETWEEN_LINES = 15.0


class RunProgress:
    """Shows stage, step, loss, tokens a second and time left. Silent where ``shown`` is false (ranks other than the first)."""

    def __init__(self, total: int, done: int, shown: bool):
        self.console = Console(quiet=not shown, highlight=False)
        self.total, self.first, self.started, self.last_line = total, done, time.monotonic(), 0.0
        self.bar: Progress | None = None
        self.speed: float | None = None
        if shown and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=total, completed=done, figures="")
            self.bar.start()

    def step(self, stage: str, step: int, loss: float, tokens_per_second: float) -> None:
        # Single steps are uneven; what is shown is a running mean over about twenty.
        self.speed = tokens_per_second if self.speed is None else 0.95 * self.speed + 0.05 * tokens_per_second
        figures = f"loss {loss:.4f}  {self.speed:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=stage, figures=figures)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or step == self.total:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / max(1, step - self.first) * (self.total - step)
            self.console.print(f"{stage}  step {step}/{self.total}  {figures}  {left:.0f} s left", soft_wrap=True)

    def evaluation(self, done: int, total: int) -> None:
        """Say that an evaluation is under way: conditions measured so far, and all."""
        if self.bar is not None:
            self.bar.update(self.task, description=f"evaluating {done}/{total}")

    def say(self, what: str | Table) -> None:
        """Print a message (a path in it stays on one line) or a table."""
        if isinstance(what, Table):
            print_table(self.console, what)
        else:
            self.console.print(what, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
