"""The configuration of a run: one TOML file, every value of which can be overridden on the command line by its dotted name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from smalt.model import PRESETS, ModelConfig
from smalt.parallel import ParallelConfig

from .errors import UserError
from .sections import (
    NUMBER,
    PAIR,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    InitConfig,
    LoggingConfig,
    OptimizerConfig,
    Section,
    SpikesConfig,
    StageConfig,
)  # fmt: skip

C = TypeVar("C", bound=BaseModel)


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[^/\x00]+$")
    """Names the run's folder; that of the config's file when not given."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Fixes initial weights and the order of data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the arithmetic; with bfloat16 (autocast) weights are rounded before use, and stay float32, as do gradients and state."""
    preset: str | None = None
    """A model by name instead of the section model."""
    model: ModelConfig = ModelConfig()
    """Sizes of the model."""
    init: InitConfig = InitConfig()
    """What the first stage begins with, instead of random weights."""
    data: DataConfig
    """Where the data is and how it is packed."""
    stages: dict[str, StageConfig]
    """The phases of training, in order."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over the processes; docs/parallel.md."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the weights are updated."""
    spikes: SpikesConfig = SpikesConfig()
    """Loss spikes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Accuracy on held-out questions."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if not self.stages:
            raise ValueError("stages is empty")
        for name, stage in self.stages.items():
            known = ", ".join(self.data.sources)
            for key, named in (("mixture", stage.mixture), ("epochs", stage.epochs)):
                if unknown := named.keys() - self.data.sources:
                    raise ValueError(f"stages.{name}.{key} names {', '.join(sorted(unknown))}; data.sources has {known}")
            self._check_resampling(name)
            if stage.schedule == "continued" and name == next(iter(self.stages)):
                raise ValueError(f"stages.{name}.schedule = 'continued': there is no stage before it; give it a schedule of its own")
            try:
                self.parallel_of(name)
            except ValidationError as error:
                found = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
                raise ValueError(f"stages.{name} with the section parallel: {found}") from error
        if unknown := set(self.init.prune.mixture) - set(self.data.sources):
            raise ValueError(f"init.prune.mixture names {', '.join(sorted(unknown))}; data.sources has {', '.join(self.data.sources)}")
        if self.spikes.enabled:
            self._check_rollback()
        sources = {*self.data.sources, *self.data.validation, *self.evaluation.sources}
        if unknown := set(self.data.columns) - sources:
            raise ValueError(f"data.columns names {', '.join(sorted(unknown))}; the sources are {', '.join(sorted(sources))}")
        if unknown := set(self.evaluation.budget_tasks) - set(self.evaluation.sources):
            raise ValueError(f"evaluation.budget_tasks names {', '.join(sorted(unknown))}, which evaluation.sources lacks")
        first, num_steps = self.logging.trace_first, self.logging.trace_steps
        if num_steps and (last := first + num_steps - 1) > self.total_steps:
            raise ValueError(
                f"logging.trace_first and trace_steps ask for steps {first} to {last}; the run ends with {self.total_steps}"
            )
        if self.parallel.runtime == "deepspeed":
            self._check_deepspeed()
        return self

    def _check_rollback(self) -> None:
        """The oldest checkpoint may be as young as (keep - 1) x every + 1 steps when a rollback is decided, and the first of the steps
        that led to it as old as raised or skips less one."""
        spikes, keep, every = self.spikes, self.checkpoint.keep, self.checkpoint.every
        longest, num_steps = max((("raised", spikes.raised), ("skips", spikes.skips)), key=lambda limit: limit[1])
        needed = spikes.rollback_steps + num_steps - 2
        if needed > (keep - 1) * every:
            raise ValueError(
                f"checkpoint.keep = {keep} with checkpoint.every = {every} is too few for spikes.rollback_steps = "
                f"{spikes.rollback_steps} before spikes.{longest} = {num_steps} steps: keep {1 - -needed // every}"
            )

    def _check_resampling(self, name: str) -> None:
        stage = self.stages[name]
        resampling, where = stage.resampling, f"stages.{name}.resampling"
        if not resampling.every:
            return
        if resampling.visits and self.data.long_documents == "split":
            raise ValueError(f"{where}.visits with data.long_documents = 'split': a part of a record is no visit; set it to 0")
        if resampling.lag <= self.data.prefetch:
            raise ValueError(f"{where}.lag = {resampling.lag} with data.prefetch = {self.data.prefetch}: make it larger than that")
        if lacking := set(stage.sources) - set(self.data.validation):
            names = ", ".join(sorted(lacking))
            raise ValueError(f"{where}.every needs held-out records of each source; data.validation lacks {names}")

    def _check_deepspeed(self) -> None:
        if self.optimizer.kind != "adamw":
            wrong = f"optimizer.kind = {self.optimizer.kind!r}: set it to 'adamw'"
        elif self.optimizer.offload != "none":
            wrong = f"optimizer.offload = {self.optimizer.offload!r}: set parallel.deepspeed.offload_optimizer instead"
        elif self.dtype == "float64":
            wrong = "dtype = 'float64': set it to 'float32' or 'bfloat16'"
        elif names := [name for name, stage in self.stages.items() if stage.objective == "distillation"]:
            wrong = f"stages.{names[0]}.objective = 'distillation': set it to 'cross_entropy'"
        elif (found := self._continued_anew()) is not None:
            # It counts the steps of all parameters as one.
            wrong = f"stages.{found}.schedule = 'continued', where the stage before does not train the same parts: give it its own"
        else:
            return
        raise ValueError(f"parallel.runtime = 'deepspeed' does not work with {wrong}, or set parallel.runtime to 'torch'")

    def _continued_anew(self) -> str | None:
        """A stage that continues another one, and trains what did not learn there."""
        learning = {name: {part for part, rate in stage.trainable.items() if rate} for name, stage in self.stages.items()}
        return next(
            (after for name, after in pairwise(self.stages) if self.is_continued(name) and learning[after] - learning[name]), None
        )

    def parallel_of(self, name: str) -> ParallelConfig:
        """The layout with what stage ``name`` sets otherwise. Raises ValidationError where the two do not go together."""
        own = self.stages[name].model_dump(include={"checkpointing", "reshard_after_forward"}, exclude_none=True)
        return ParallelConfig.model_validate({**self.parallel.model_dump(), **own})

    def model_of(self, name: str) -> ModelConfig:
        """The model with the YaRN that stage ``name``, or the last stage before it that says so, sets otherwise."""
        names = list(self.stages)
        own = [yarn for stage in names[: names.index(name) + 1] if (yarn := self.stages[stage].yarn) is not None]
        language = self.model.language.model_copy(update={"yarn": own[-1] if own else self.model.language.yarn})
        return self.model.model_copy(update={"language": language})

    def is_continued(self, name: str) -> bool:
        """Whether the stage after ``name`` goes on with its schedule and the state of its optimiser."""
        return any(self.stages[after].schedule == "continued" for before, after in pairwise(self.stages) if before == name)

    def packs_of(self, name: str) -> int:
        """Packs of a step of stage ``name``, over all processes."""
        return self.stages[name].packs_per_step or self.data.packs_per_step

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages.values())


class ChainConfig(Section):
    name: str = Field("chain", pattern=r"^[^/\x00]+$")
    """Names the chain's folder; that of the config's file when not given."""
    chain: list[Path] = Field(min_length=1)
    """Configs of its runs in order, by their paths from the folder of this file."""


def load_config(path: Path) -> RunConfig:
    """Read and check a TOML file. Raises UserError naming the file, the key and what would be right."""
    raw = read_toml(path)
    if "chain" in raw:
        raise UserError(f"config {path} is a chain of runs; name the config of one of them")
    return parse_config({"name": path.stem, **raw}, f"config {path}")


def load_chain(path: Path) -> ChainConfig | None:
    """Read and check a TOML file that names the runs of a chain; None for one that is a run's. Raises UserError as
    :func:`load_config` does."""
    raw = read_toml(path)
    return validated(ChainConfig, {"name": path.stem, **raw}, f"config {path}") if "chain" in raw else None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises UserError naming the file."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {error}") from error


def parse_config(raw: dict[str, Any], where: str) -> RunConfig:
    """Check a nested dict. ``where`` begins the message of the UserError."""
    if (preset := raw.get("preset")) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"{where}: preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
        raw = {**raw, "model": _merged(PRESETS[preset].model_dump(), raw.get("model", {}))}
    return validated(RunConfig, raw, where)


def validated(root: type[C], raw: dict[str, Any], where: str) -> C:
    """The config that is the section ``root``, from a nested dict. ``where`` begins the message of the UserError."""
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        found = [_explain(e, root) for e in error.errors()]
        raise UserError(f"{where}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{where}:", *found])) from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {prefix + key: value}
    return found


def _merged(values: dict[str, Any], changes: Any) -> Any:
    """Nested values with some of them changed."""
    if not isinstance(changes, dict):
        return changes
    return {**values, **{k: _merged(values[k], v) if isinstance(values.get(k), dict) else v for k, v in changes.items()}}


def _explain(error: Any, root: type[BaseModel]) -> str:
    """One line for one finding of pydantic: the dotted key, what is wrong, the nearest known key."""
    location = [str(part) for part in error["loc"] if part not in (NUMBER, PAIR)]
    # Between the name of a step of a curation and its key pydantic has the kind of the step.
    own = location[:2] + location[3:] if location[:1] == ["steps"] and len(location) > 2 else location
    key = ".".join(own)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], root)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*own[:-1], near[0]])}?" if near else ""
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    given = error.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
    # What spans sections has no key of its own: the message names them.
    return f"{key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(location: list[str], root: type[BaseModel]) -> list[str]:
    """The keys of the section at a dotted location; names of stages, sources and steps are passed over. Of sections that stand in one
    place, their kind, which pydantic puts into the location, says which it is."""
    sections = [root]
    for part in location:
        inside = [found for section in sections if (info := section.model_fields.get(part)) for found in _sections_in(info.annotation)]
        of_kind = [section for section in sections if (info := section.model_fields.get("kind")) and info.default == part]
        sections = inside or of_kind or sections
    return list(sections[0].model_fields)


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Every section in a type: in the values of a dict, in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]
