"""The sections of a run's config, each a part of it that stands for itself; :mod:`.config` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from smalt.model import PARTS, YarnConfig

Weight = Annotated[float, Field(ge=0)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
Budget = Annotated[int, Field(ge=0)]
Epochs = Annotated[float, Field(gt=0)]
SourcePath = Annotated[str, Field(min_length=1)]
# A weight, or the two between which it moves. pydantic puts the tags into the locations of errors; config.py takes them out.
NUMBER, PAIR = "<number>", "<pair>"
MovingWeight = Annotated[
    Annotated[Weight, Tag(NUMBER)] | Annotated[tuple[Weight, Weight], Tag(PAIR)],
    Discriminator(lambda given: PAIR if isinstance(given, list | tuple) else NUMBER),
]
SCHEDULE_VALUES = ("learning_rate", "warmup_steps", "decay_share", "decay_shape", "final_share")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class ColumnsConfig(Section):
    messages: str | None = None
    """Column of the chat messages."""
    conversations: str | None = None
    """Column of the conversations in the form of ShareGPT."""
    text: str | None = None
    """Column of a text, all of which is learned."""
    caption: str | None = None
    """Column of the text of an image, all of which is learned."""
    images: str | None = None
    """Column of the image, or of the list of images."""


class DataConfig(Section):
    tokenizer: Path
    """tokenizer.json with the special tokens of the chat template."""
    sources: dict[str, SourcePath]
    """Training data by name: files or a folder of them, here or behind a URL; docs/data.md."""
    validation: dict[str, SourcePath] = {}
    """Held-out data whose loss is reported by source."""
    columns: dict[str, ColumnsConfig] = {}
    """Of sources whose columns have other names than the usual ones: those that they have."""
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
    workers: int = Field(4, ge=0)
    """Processes of each rank that read and decode; 0: a thread of the rank does."""
    max_image_bytes: int = Field(32 << 20, ge=1)
    """Larger image files are skipped."""
    max_image_pixels: int = Field(64 << 20, ge=1)
    """Images of more pixels are skipped, before they are decoded."""


class PruneConfig(Section):
    documents: int = Field(0, ge=0)
    """Calibration documents by which it is chosen what the model keeps of that of init.run, a larger one; 0: nothing is pruned."""
    mixture: dict[str, Weight] = {}
    """Weight of each source of these documents; the mixture of the first stage when not given."""


class InitConfig(Section):
    language: Path | None = None
    """Hugging Face folder (Llama, Qwen2, Qwen3) whose weights the decoder begins with; docs/weights.md."""
    vision: Path | None = None
    """Hugging Face folder (SigLIP, SigLIP2) whose weights the vision tower begins with."""
    run: Path | None = None
    """Begin with the weights of another run: its folder, whose newest checkpoint it is, or that of one of its checkpoints."""
    prune: PruneConfig = PruneConfig()
    """Make this run's model out of that one, if it is larger."""

    @model_validator(mode="after")
    def _check(self) -> InitConfig:
        if self.run is not None and (self.language is not None or self.vision is not None):
            raise ValueError("run gives the whole model its weights: it goes with neither language nor vision")
        if self.prune.documents and self.run is None:
            raise ValueError("prune.documents is set and run is not: name the run whose model is to be pruned")
        if self.prune.mixture and not any(self.prune.mixture.values()):
            raise ValueError("prune.mixture names no source with a weight above 0")
        return self


class DistillationConfig(Section):
    kl: float = Field(1.0, ge=0)
    """Weight of the divergence KL(teacher || student), times the square of the temperature."""
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy with the tokens themselves."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both in the divergence."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the distance between the last hidden rows of both, over the channels that pruning kept of this teacher."""
    hidden_distance: Literal["cosine", "mse"] = "cosine"
    """That distance: 1 - cosine, or the mean square of the difference."""

    @model_validator(mode="after")
    def _check(self) -> DistillationConfig:
        if not (self.kl or self.cross_entropy or self.hidden):
            raise ValueError("kl, cross_entropy and hidden are all 0: nothing would be learned")
        return self


class ResamplingConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between new weights, which are made of the held-out loss of each source; 0: never."""
    lag: int = Field(8, ge=2)
    """Steps from a measurement to the first step that its weights count for; more than data.prefetch."""
    measurements: int = Field(4, ge=2)
    """Newest held-out losses of a source whose fall is its progress."""
    floor: float = Field(0.1, gt=0, le=1)
    """Share of its own weight that a source without progress keeps."""
    visits: int = Field(0, ge=0, le=127)
    """Times in a row that a record was solved, or was not, after which it is shown less often; 0: all are shown alike. Solved: each
    target token had a probability above one half."""
    kept: float = Field(0.25, ge=0.01, le=1)
    """Share of the epochs in which such a record is still shown."""


class StageConfig(Section):
    steps: int = Field(ge=1)
    """Optimiser steps."""
    sequence_length: int = Field(ge=8)
    """Tokens of a pack."""
    packs_per_step: int | None = Field(None, ge=1)
    """Instead of data.packs_per_step in this stage."""
    yarn: YarnConfig | None = None
    """Instead of model.language.yarn from this stage on; no weight changes. A factor of 1 ends it."""
    mixture: dict[str, MovingWeight] = {}
    """Weight of each source, or [FIRST, LAST] for one that moves in a straight line from the first step to the last. When not given,
    the weight of a source is its records times its epochs."""
    epochs: dict[str, Epochs] = {}
    """Times at most that a source goes through its records; then the others share what it had. A source without it has no end."""
    resampling: ResamplingConfig = ResamplingConfig()
    """Weights of sources and records that follow from what was measured."""
    trainable: dict[str, Weight]
    """Parts that learn (vision, projector, language), each with the multiplier of its learning rate; the others are frozen."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; a stage has one unless it is continued."""
    vision_layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block of the vision tower to the one before it; the last block has it once, the patch
    embedding and positions once more than the first block, the final norm not at all."""
    schedule: Literal["constant", "cosine", "wsd", "continued"] = "cosine"
    """Learning rate after the warm-up: constant, half a cosine, or stable and then a decay (wsd). continued: the schedule of the stage
    before is one over the tokens of both, and the state of its optimiser goes on; otherwise a stage has a new one."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises linearly, with schedule = continued to that of the stage before; 0 when not given."""
    decay_share: float | None = Field(None, gt=0, le=1)
    """Share of what follows the warm-up over which wsd decays; 0.2 when not given."""
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = None
    """How wsd decays: linear, half a cosine, or as 1 - sqrt(x) (Haegele et al. 2024, arXiv 2405.18392); linear when not given."""
    final_share: float | None = Field(None, ge=0, le=1)
    """Learning rate of the last step as a share of the peak, which a constant one does not leave; 0.1 when not given."""
    objective: Literal["cross_entropy", "distillation"] = "cross_entropy"
    """What is minimised over the assistant's tokens: cross-entropy, or what the section distillation says, with a teacher."""
    teacher: Path | None = None
    """Folder of the teacher's run, whose newest checkpoint it is, or of one of its checkpoints; for objective distillation."""
    distillation: DistillationConfig = DistillationConfig()
    """Weights of the losses of objective distillation."""
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
        self._check_mixture()
        self._check_schedule()
        if (self.teacher is not None) != (self.objective == "distillation"):
            raise ValueError("objective = 'distillation' and teacher, the folder of a run, go together: set both, or neither")
        if self.resampling.visits and self.objective == "distillation":
            raise ValueError("resampling.visits with objective = 'distillation', which does not say what is solved: set it to 0")
        if self.resampling.visits and not self.resampling.every:
            raise ValueError("resampling.visits without resampling.every, the steps between new weights: set both, or neither")
        return self

    def _check_mixture(self) -> None:
        weights = dict(zip(("first", "last"), zip(*map(weights_of, self.mixture.values()), strict=True), strict=False))
        nothing = [step for step, given in weights.items() if not any(given)]
        if nothing or not (self.mixture or self.epochs):
            at = f" at the {nothing[0]} step" if len(nothing) == 1 else ""
            raise ValueError(f"mixture names no source with a weight above 0{at}")
        if unread := set(self.epochs) - set(self.sources):
            raise ValueError(
                f"epochs names {', '.join(sorted(unread))}, without a weight in mixture: give it one, or leave mixture out"
            )

    @property
    def sources(self) -> list[str]:
        """Those that the stage reads."""
        return [name for name, weight in self.mixture.items() if any(weights_of(weight))] if self.mixture else list(self.epochs)

    def _check_schedule(self) -> None:
        given = {key for key in SCHEDULE_VALUES if getattr(self, key) is not None}
        if self.schedule == "continued":
            if given := given - {"warmup_steps"}:
                raise ValueError(
                    f"{', '.join(sorted(given))} with schedule = 'continued', which goes on with those of the stage before; remove "
                    f"{'it' if len(given) == 1 else 'them'}, or give the stage a schedule of its own"
                )
            return
        if "learning_rate" not in given:
            raise ValueError("learning_rate is missing")
        if self.schedule != "wsd" and (decay := given & {"decay_share", "decay_shape"}):
            raise ValueError(f"{', '.join(sorted(decay))} with schedule = {self.schedule!r}; only wsd has a decay of its own")


def weights_of(weight: float | tuple[float, float]) -> tuple[float, float]:
    """At the first step and at the last."""
    return weight if isinstance(weight, tuple) else (weight, weight)


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


class TaskConfig(Section):
    path: SourcePath
    """Questions with answers: a file, or a folder of files; of the format records anything that a source can be."""
    format: Literal["auto", "records", "table", "gsm8k", "math"] = "auto"
    """records: chat messages, the last one the answer. table: rows of question, options and answer (VLMEvalKit's TSV, MMLU's CSV).
    gsm8k: question, and answer with #### before the number. math: problem, and solution with a box. auto: by suffix and columns."""
    scorer: Literal["auto", "exact", "text", "contains", "choice", "number", "math", "anls", "relaxed"] = "auto"
    """What makes an answer right, docs/evaluation.md; auto: by format, and choice for a question with options."""
    tolerance: float | None = Field(None, ge=0)
    """Relative error that the scorers number and relaxed allow; 0 and 0.05 when not given."""
    template: str | None = None
    """Prompt, with {question} where hint, question and options stand; when not given, the question and what the scorer asks for."""
    modes: list[Literal["answer", "think"]] = Field(["answer", "think"], min_length=1)
    """How the questions are asked; thoughts are unlimited."""
    budgets: list[Budget] = []
    """Thinking budgets in tokens at which they are asked too."""
    shuffle_images: bool = False
    """Ask them also with the images of other questions."""
    questions: int | None = Field(None, ge=1)
    """So many, spread evenly over the file, instead of evaluation.questions; during training evaluation.questions_during at most."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest completion, instead of evaluation.max_tokens."""
    samples: int = Field(1, ge=1)
    """Answers to each question; of several, pass@k is reported too."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token, 1 samples from the model."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples} at temperature 0 are all alike; set temperature above 0")
        if self.budgets and "think" not in self.modes:
            raise ValueError("budgets are those of think mode, which modes does not name")
        if self.template is not None and "{question}" not in self.template:
            raise ValueError("template has no {question}, the place where the question goes")
        return self


class EvaluationConfig(Section):
    sources: dict[str, SourcePath] = {}
    """Held-out questions by task, where everything else about the task is as it is by default."""
    tasks: dict[str, TaskConfig] = {}
    """Tasks by name, with format, scorer and conditions; docs/evaluation.md."""
    budget_tasks: list[str] = []
    """Names of sources whose accuracy is also measured against the thinking budget and with images shuffled between questions."""
    budgets: list[Budget] = [0, 4, 8, 16]
    """Thinking budgets in tokens of those; unlimited is always measured."""
    every: int = Field(0, ge=0)
    """Steps between evaluations during training; 0: only at the end."""
    questions_during: int = Field(100, ge=1)
    """Questions a task during training, spread evenly over its file."""
    questions: int = Field(500, ge=1)
    """Questions a task at the end, spread evenly over its file; a task may have a number of its own."""
    max_tokens: int = Field(64, ge=1)
    """Longest completion."""
    batch: int = Field(256, ge=1)
    """Answers generated at a time."""
    keep_answers: int = Field(100, ge=0)
    """Answers of each condition of an evaluation that are kept in the run's folder answers."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if both := set(self.sources) & set(self.tasks):
            raise ValueError(f"sources and tasks both name {', '.join(sorted(both))}")
        return self

    def all_tasks(self) -> dict[str, TaskConfig]:
        """Every task by its name, those of sources first."""
        short = {}
        for name, path in self.sources.items():
            measured = name in self.budget_tasks
            short[name] = TaskConfig(path=path, budgets=self.budgets if measured else [], shuffle_images=measured)
        return short | self.tasks


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
