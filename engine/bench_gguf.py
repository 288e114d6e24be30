"""What a run loses with its decoder as each type of GGUF file stores it: written, read back, and put behind the run's own tower."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from smalt.parallel import alone

from .data.validation import ValidationSet
from .errors import UserError
from .evaluation import Score, conditions_of, evaluate, with_questions
from .export_gguf import export_gguf
from .inference import LoadedRun, load_run
from .weights.gguf_file import GgufType, read_gguf


@dataclass(frozen=True)
class OfType:
    """kind: of the file, None for the checkpoint as it is; size: bytes of the file; scores: by task and mode; losses: nats a token of
    the held-out documents, by source."""

    kind: GgufType | None
    size: int | None
    scores: list[Score]
    losses: dict[str, float]


def bench_gguf(folder: Path, questions: int | None = None, progress: Callable[[str], None] = lambda said: None) -> list[OfType]:
    """Evaluate the newest checkpoint of a run as it is, and through a file of each type.

    questions: a task, as many as the run's config says when None. Raises UserError for a run without questions, and as
    :func:`smalt.engine.export_gguf.export_gguf` does.
    """
    run = load_run(folder)
    if not run.data.questions:
        raise UserError(f"the config of {folder} has no evaluation.tasks or evaluation.sources; there is nothing to ask")
    found = [OfType(None, None, _scores(run, questions), _losses(run))]
    for kind in get_args(GgufType):
        progress(f"{kind}: written, read and asked")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{kind}.gguf"
            done = export_gguf(folder, path, run.step, kind)
            weights = dict(run.model.named_parameters())
            with torch.no_grad():
                for own, value in read_gguf(path, done.layout):
                    weights[own].copy_(value)
        found.append(OfType(kind, done.size, _scores(run, questions), _losses(run)))
    return found


def _scores(run: LoadedRun, questions: int | None) -> list[Score]:
    asked = run.config.evaluation
    conditions = [c for c in conditions_of(run.data.questions) if c.budget is None and not c.shuffled]
    tasks = with_questions(run.data.questions, questions)
    return evaluate(run.model, run.data.encoder, tasks, conditions, asked, None, alone(run.device)).scores


@torch.no_grad()
def _losses(run: LoadedRun) -> dict[str, float]:
    length, config = list(run.config.stages.values())[-1].sequence_length, run.model.config
    documents = run.config.data.validation_documents
    held_out = ValidationSet(run.data.validation, run.data.encoder, documents, length, config, alone(run.device))
    return held_out.losses(lambda packs: torch.stack([run.model(one.to(run.device)).double().sum() for one in packs]).sum())


def gguf_table(found: list[OfType]) -> Table:
    """A row a type: bytes, the accuracy in percent of each task and mode, and the loss of each held-out source."""
    title = "Accuracy on held-out questions by type of the language part, %, and loss of held-out documents, nats a token"
    table = Table(title=title, caption="± one standard error")
    asked = [f"{s.task}, {s.mode}" for s in found[0].scores]
    for column in ("type", "bytes", *asked, *(f"{name}, loss" for name in found[0].losses)):
        table.add_column(column, justify="left" if column == "type" else "right")
    for one in found:
        cells = (f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}" for s in one.scores)
        table.add_row(
            one.kind or "the checkpoint",
            "" if one.size is None else f"{one.size:,}",
            *cells,
            *(f"{loss:.5f}" for loss in one.losses.values()),
        )
    return table


def gguf_json(found: list[OfType]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]
