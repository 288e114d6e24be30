"""A trained run, loaded whole on one device: answers to questions, and its evaluation again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from smalt.model import MultimodalModel, build_model
from smalt.model.generate import Sampling
from smalt.model.generate import generate as generate_tokens
from smalt.parallel import alone
from smalt.profiling.tables import print_table

from .checkpoints import check_architecture, latest_checkpoint, load_tensors
from .config import RunConfig
from .data.chat import PLACEHOLDER, Mode
from .data.records import Image, Record
from .errors import UserError
from .evaluation import evaluate, scores_json, scores_table
from .plots import plot_run
from .run_folder import CHECKPOINTS, EVALUATION, PLOT, read_config, read_metrics
from .stage import PARAMETER_DTYPES
from .trainer import RunData, open_data


@dataclass(frozen=True)
class LoadedRun:
    """The model of a run's newest checkpoint, with the run's config and data."""

    config: RunConfig
    model: MultimodalModel
    data: RunData
    device: torch.device


def load_run(folder: Path) -> LoadedRun:
    """Raises UserError when the folder holds no run or no checkpoint."""
    config = read_config(folder)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS, set_aside=False)
    check_architecture(checkpoint, config.model)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    model = build_model(config.model, config.seed, device, PARAMETER_DTYPES[config.dtype])
    load_tensors(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    return LoadedRun(config, model.eval(), open_data(config), device)


def make_question(prompt: str, images: Sequence[Path]) -> Record:
    """A question; images without a placeholder come first. Raises UserError for an image that is no file, and for one too few."""
    for path in images:
        if not path.is_file():
            raise UserError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}")
    missing = len(images) - prompt.count(PLACEHOLDER)
    if missing < 0:
        raise UserError(f"the prompt has {prompt.count(PLACEHOLDER)} {PLACEHOLDER}; the images given are {len(images)}")
    return Record((("user", PLACEHOLDER * missing + prompt),), tuple(Image(None, str(path)) for path in images))


def respond(run: LoadedRun, question: Record, mode: Mode, budget: int | None, sampling: Sampling) -> tuple[str, str]:
    """Thought and answer to one question."""
    encoder = run.data.encoder
    (completion,) = generate_tokens(run.model, [encoder.prompt(question, mode)], encoder.control, sampling, budget)
    thought, answer = encoder.split(completion.tokens, thinking=mode == "think")
    return encoder.decode(thought), answer


def evaluate_run(folder: Path, questions: int | None) -> None:
    """The final evaluation again: the table, evaluation.json and the plot."""
    run = load_run(folder)
    if not run.data.questions:
        raise UserError(f"the config of {folder} has no evaluation.sources")
    console = Console(highlight=False)
    with console.status("evaluating"):
        limit = run.config.evaluation.questions if questions is None else questions
        scores = evaluate(run.model, run.data.encoder, run.data.questions, run.config.evaluation, limit, alone(run.device))
    (folder / EVALUATION).write_text(json.dumps(scores_json(scores), indent=1) + "\n")
    print_table(console, scores_table(scores))
    plot_run(read_metrics(folder), folder)
    console.print(f"written to {folder / EVALUATION} and {folder / PLOT}", soft_wrap=True, markup=False)
