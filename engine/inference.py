"""A trained run, loaded whole on one device: answers to questions, and its evaluation again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path

import torch
from rich.console import Console

from smalt.model import ModelConfig, MultimodalModel, build_model
from smalt.model.generate import Sampling
from smalt.model.generate import generate as generate_tokens
from smalt.parallel import alone
from smalt.profiling.tables import print_table

from .checkpoints import check_architecture, latest_checkpoint, load_tensors
from .cli_options import write_json
from .config import RunConfig
from .data.chat import PLACEHOLDER, Mode
from .data.records import Image, Record
from .errors import UserError
from .evaluation import Condition, conditions_of, evaluate, open_tasks, scores_json, scores_table, with_questions, write_answers
from .lineage import check_tokenizer
from .plots import plot_run
from .run_folder import CHECKPOINTS, EVALUATION, PLOT, answers_file, read_config, read_metrics
from .sections import TaskConfig
from .stage import PARAMETER_DTYPES
from .trainer import RunData, open_data

MOST_NAMED = 20  # records that could not be asked


@dataclass(frozen=True)
class LoadedRun:
    """The model of a run's newest checkpoint, with the run's config and data; step: of the checkpoint."""

    config: RunConfig
    model: MultimodalModel
    data: RunData
    device: torch.device
    step: int


def load_run(folder: Path) -> LoadedRun:
    """Raises UserError when the folder holds no run or no checkpoint, or data.tokenizer is not the one of its training."""
    config = read_config(folder)
    checkpoint = latest_checkpoint(folder / CHECKPOINTS, set_aside=False)
    check_architecture(checkpoint, config.model)
    check_tokenizer(str(folder), checkpoint, config)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    # Of the newest checkpoint: a stage may have another YaRN than the config of the model.
    model = build_model(ModelConfig.model_validate(checkpoint.state["model"]), config.seed, device, PARAMETER_DTYPES[config.dtype])
    load_tensors(checkpoint, {f"model.{name}": p.data for name, p in model.named_parameters()})
    return LoadedRun(config, model.eval(), open_data(config), device, checkpoint.step)


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


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked to do otherwise than the run's config says. questions: a task; tasks: files by name, instead of its
    tasks; mode, budget: the only ones; json, answers: files for the scores and the answers, beside those in the run's folder."""

    questions: int | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    mode: Mode | None = None
    budget: int | None = None
    json: Path | None = None
    answers: Path | None = None

    @property
    def is_the_final_one(self) -> bool:
        return not self.tasks and self.mode is None and self.budget is None and self.questions is None


def evaluate_run(folder: Path, asked: Asked) -> None:
    """Print the scores. An evaluation of the run's tasks as its config has them is the final one again: its files are written anew."""
    own = open_tasks({name: TaskConfig(path=path) for name, path in asked.tasks.items()})  # before the run, which takes longer
    run = load_run(folder)
    tasks = with_questions(own or run.data.questions, asked.questions)
    if not tasks:
        raise UserError(f"the config of {folder} has no evaluation.tasks or evaluation.sources; give --task NAME=FILE")
    conditions = list(conditions_of(tasks))
    if asked.mode is not None or asked.budget is not None:
        conditions = [Condition(name, asked.mode or "think", asked.budget) for name in tasks]
    console, config = Console(highlight=False), run.config.evaluation
    with console.status("evaluating"):
        found = evaluate(run.model, run.data.encoder, tasks, conditions, config, None, alone(run.device))
    print_table(console, scores_table(found.scores, found.skipped))
    for one in found.skipped[:MOST_NAMED]:
        console.print(f"left out: record {one.record} of {one.source}: {one.cause}: {one.detail}", soft_wrap=True, markup=False)
    if len(found.skipped) > MOST_NAMED:
        console.print(f"and {len(found.skipped) - MOST_NAMED} more")
    scores = scores_json(found.scores)
    write_json(asked.json, scores)
    if asked.answers is not None:
        write_answers(asked.answers, run.step, found.answers)
    if asked.is_the_final_one:
        (folder / EVALUATION).write_text(dumps(scores, indent=1) + "\n")
        write_answers(answers_file(folder, run.step), run.step, found.answers)
        plot_run(read_metrics(folder), folder)
        console.print(f"written to {folder / EVALUATION} and {folder / PLOT}", soft_wrap=True, markup=False)
