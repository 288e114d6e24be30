"""The configuration of a run: one TOML file, every value of which can be overridden on the command line by its dotted name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smalt.model import PARTS, PRESETS, ModelConfig
from smalt.parallel import ParallelConfig

from .errors import UserError

Weight = Annotated[float, Field(ge=0)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Budget = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    tokenizer: Path
    """tokenizer.json with the special tokens of the chat template."""
    sources: dict[str, Path]
    """Training data: a Parquet file, or a folder of them, by name."""
    validation: dict[str, Path] = {}
    """Held-out data whose loss is reported by source."""
    validation_documents: int = Field(200, ge=1)
    """Documents of each validation source that are used."""
    packs_per_step: int = Field(1, ge=1)
    """Packs in one optimiser step, over all processes; a multiple of dp x fsdp, and of pp times that."""
    window: int = Field(256, ge=1)
    """Samples that the packer reads at a time."""
    long_documents: Literal["skip", "split"] = "skip"
    """What happens to a document longer than a pack."""
    prefetch: int = Field(4, ge=1)
    """Steps that are made ahead."""
    max_image_bytes: int = Field(32 << 20, ge=1)
    """Larger image files are skipped."""
    max_image_pixels: int = Field(64 << 20, ge=1)
    """Images of more pixels are skipped, before they are decoded."""


class StageConfig(Section):
    steps: int = Field(ge=1)
    """Optimiser steps."""
    sequence_length: int = Field(ge=8)
    """Tokens of a pack."""
    mixture: dict[str, Weight]
    """Weight of each source."""
    trainable: dict[str, Weight]
    """Parts that learn (vision, projector, language), each with the multiplier of its learning rate; the others are frozen."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    vision_layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block of the vision tower to the one before it; the last block has it once, the patch
    embedding and positions once more than the first block, the final norm not at all."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: constant, half a cosine, or stable and then linear decay over the last fifth."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""
    final_share: float = Field(0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""
    objective: Literal["cross_entropy"] = "cross_entropy"
    """What is minimised: cross-entropy of the assistant's tokens."""
    think: float = Field(0.5, ge=0, le=1)
    """Share of the records with a thought that are shown in think mode; the rest are shown without their thought."""
    truncate: float = Field(0.0, ge=0, le=1)
    """Share of those thoughts that are cut at a random budget and closed by a forced token."""
    checkpointing: Literal["none", "full", "selective"] | None = None
    """Instead of parallel.checkpointing in this stage: long packs need it where short ones do not."""
    reshard_after_forward: bool | None = None
    """Instead of parallel.reshard_after_forward in this stage."""

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if unknown := set(self.trainable) - set(PARTS):
            raise ValueError(f"trainable names {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
        if not any(self.trainable.values()):
            raise ValueError("trainable names no part with a learning rate above 0")
        if not any(self.mixture.values()):
            raise ValueError("mixture names no source with a weight above 0")
        return self


class OptimizerConfig(Section):
    kind: Literal["adamw", "smalt_adamw", "apex", "muon"] = "adamw"
    """adamw: torch's fused AdamW. smalt_adamw: the Triton kernel, one launch a group. apex: FusedAdam of NVIDIA's apex. muon: Muon for
    the matrices of blocks and projector, AdamW for the rest, at AdamW's learning rates."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimiser state and arithmetic on the CPU, for adamw and smalt_adamw: less memory on the GPU, slower steps."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the moments of smalt_adamw; bfloat16 halves their memory and is rounded stochastically."""
    momentum: DecayRate = 0.95
    """Muon's decay rate of the momentum."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; vectors have none."""
    clip: float = Field(1.0, gt=0)
    """Largest global norm of the gradient."""
    max_bad_steps: int = Field(5, ge=1)
    """Steps in a row with a non-finite loss or gradient, each skipped, after which the run stops."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.offload == "cpu" and self.kind not in ("adamw", "smalt_adamw"):
            raise ValueError(f"offload = 'cpu' works with kind adamw and smalt_adamw, not with {self.kind}")
        if self.state_dtype != "float32" and self.kind != "smalt_adamw":
            raise ValueError(f"state_dtype = {self.state_dtype!r} works with kind smalt_adamw, not with {self.kind}")
        return self


class SpikesConfig(Section):
    enabled: bool = False
    """Skip the updates of loss spikes, and go back to a checkpoint when they do not end."""
    window: int = Field(128, ge=16)
    """Steps that a step is compared with; the first ones of a stage are not judged."""
    sigmas: float = Field(6.0, gt=0)
    """Robust standard deviations above the median at which the loss, or the logarithm of the gradient norm, is a spike."""
    skips: int = Field(4, ge=1)
    """Spikes in a row after which the weights go back to a checkpoint; the data goes on."""
    raised: int = Field(64, ge=2)
    """Steps in a row with a loss above half of that limit after which they go back too."""
    rollback_steps: int = Field(100, ge=0)
    """Steps by which the checkpoint must be older than the first of them."""
    max_rollbacks: int = Field(3, ge=0)
    """Times that a stage may go back; then the run stops."""


class CheckpointConfig(Section):
    every: int = Field(500, ge=1)
    """Steps between checkpoints; one is also written at the end of the run."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    on_error: Literal["stop", "continue"] = "continue"
    """What to do when one cannot be written (a full disk): the one before it stays good either way."""
    grace_seconds: float = Field(30.0, gt=1, le=1e6)
    """Seconds from SIGTERM to the SIGKILL of whoever preempts: a run that has not saved a second before says so and ends."""


class EvaluationConfig(Section):
    sources: dict[str, Path] = {}
    """Held-out questions by task; the last assistant message is the truth."""
    budget_tasks: list[str] = []
    """Tasks whose accuracy is also measured against the thinking budget and with images shuffled between questions."""
    budgets: list[Budget] = [0, 4, 8, 16]
    """Thinking budgets in tokens; unlimited is always measured."""
    every: int = Field(0, ge=0)
    """Steps between evaluations during training; 0: only at the end."""
    questions_during: int = Field(100, ge=1)
    """Questions a task during training."""
    questions: int = Field(500, ge=1)
    """Questions a task at the end."""
    max_tokens: int = Field(64, ge=1)
    """Longest completion."""
    batch: int = Field(256, ge=1)
    """Questions generated at a time."""


class LoggingConfig(Section):
    every: int = Field(10, ge=1)
    """Steps between lines of metrics in TensorBoard and Weights & Biases; the JSON lines have every step."""
    validate_every: int = Field(0, ge=0)
    """Steps between measurements of the validation loss; 0: only at the end of each stage."""
    norms_every: int = Field(0, ge=0)
    """Steps of a stage between L2 norms by module, of weights, gradients and optimiser state; 0: never."""
    trace_first: int = Field(10, ge=1)
    """First step of which torch.profiler records a trace, where trace_steps is not 0; `smalt trace` reads them."""
    trace_steps: int = Field(0, ge=0)
    """Steps that are recorded, each slower for it; 0: none."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project too (pip install 'smalt[wandb]')."""


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
            if unknown := set(stage.mixture) - set(self.data.sources):
                known = ", ".join(self.data.sources)
                raise ValueError(f"stages.{name}.mixture names {', '.join(sorted(unknown))}; data.sources has {known}")
            try:
                self.parallel_of(name)
            except ValidationError as error:
                found = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
                raise ValueError(f"stages.{name} with the section parallel: {found}") from error
        if self.spikes.enabled:
            self._check_rollback()
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

    def _check_deepspeed(self) -> None:
        if self.optimizer.kind != "adamw":
            wrong = f"optimizer.kind = {self.optimizer.kind!r}: set it to 'adamw'"
        elif self.optimizer.offload != "none":
            wrong = f"optimizer.offload = {self.optimizer.offload!r}: set parallel.deepspeed.offload_optimizer instead"
        elif self.dtype == "float64":
            wrong = "dtype = 'float64': set it to 'float32' or 'bfloat16'"
        else:
            return
        raise ValueError(f"parallel.runtime = 'deepspeed' does not work with {wrong}, or set parallel.runtime to 'torch'")

    def parallel_of(self, name: str) -> ParallelConfig:
        """The layout with what stage ``name`` sets otherwise. Raises ValidationError where the two do not go together."""
        own = self.stages[name].model_dump(include={"checkpointing", "reshard_after_forward"}, exclude_none=True)
        return ParallelConfig.model_validate({**self.parallel.model_dump(), **own})

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages.values())


def load_config(path: Path) -> RunConfig:
    """Read and check a TOML file. Raises UserError naming the file, the key and what would be right."""
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: {error}") from error
    return parse_config({"name": path.stem, **raw}, f"config {path}")


def parse_config(raw: dict[str, Any], where: str) -> RunConfig:
    """Check a nested dict. ``where`` begins the message of the UserError."""
    if (preset := raw.get("preset")) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"{where}: preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
        raw = {**raw, "model": _merged(PRESETS[preset].model_dump(), raw.get("model", {}))}
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        found = [_explain(e) for e in error.errors()]
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


def _explain(error: Any) -> str:
    """One line for one finding of pydantic: the dotted key, what is wrong, the nearest known key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return f"{key}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    given = error.get("input")
    shown = "" if isinstance(given, dict | BaseModel) else f" (given: {given!r})"
    # What spans sections has no key of its own: the message names them.
    return f"{key}{': ' if key else ''}{error['msg'].removeprefix('Value error, ')}{shown}"


def _known_keys(location: list[str]) -> list[str]:
    """The keys of the section at a dotted location; names of stages and sources are passed over."""
    section: type[BaseModel] = RunConfig
    for part in location:
        info = section.model_fields.get(part)
        candidates = [info.annotation] if info else []
        if part == "stages":
            candidates = [StageConfig]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)
