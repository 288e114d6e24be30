"""One stage of training: its model, optimiser and stream of batches, and the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smalt.model.cost import Workload, model_cost
from smalt.parallel import PackShard, ParallelModel, World
from smalt.parallel.channel import Channel
from smalt.parallel.deepspeed import DeepSpeedModel

from .checkpoints import Checkpoint, load_tensors
from .config import RunConfig
from .data.chat import ChatEncoder
from .data.loader import Loader, Packing, Place, StepBatch
from .data.mixture import Mixture, mixture_of
from .data.packing import PackerState
from .data.reading import Reader
from .data.records import Records
from .data.stream import Presentation, SampleStream, seed_of
from .data.validation import ValidationSet
from .errors import UserError, warn
from .evaluation import Task
from .initial import Beginnings, make_distillation, take_initial
from .memory import explain_out_of_memory
from .norms import module_norms, optimizer_norms
from .objectives import pack_loss
from .optimizers import (
    build_optimizer,
    continue_optimizer,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
    tensors_of,
    trainable_parts,
)
from .resampler import Resampler, UnsolvedTokens
from .schedules import learning_rate
from .spikes import OK, SpikeRule, Verdict

# With bfloat16 the weights stay float32, and are rounded before they are used.
PARAMETER_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class RunData:
    """What a run reads: the encoder, the training sources, the held-out ones and the tasks of the evaluation, by name."""

    encoder: ChatEncoder
    sources: Mapping[str, Records]
    validation: Mapping[str, Records]
    questions: Mapping[str, Task]

    @property
    def reader(self) -> Reader:
        """Of the training sources."""
        return Reader(self.sources, self.encoder)


@dataclass(frozen=True)
class StepResult:
    """loss: nats a token over all ranks; grad_norm: before clipping; skipped: why no step was taken, or None; norms: L2 norms by
    module where they are due, of weights before the step, of clipped gradients and of the optimiser's state; verdict: of the rule
    for loss spikes; stop: a rank was asked to end the run, the same on all of them."""

    loss: float
    grad_norm: float
    skipped: str | None = None
    norms: dict[str, float] = field(default_factory=dict)
    verdict: Verdict = OK
    stop: bool = False


class Stage:
    """Stage ``name`` of a run, ready for its next step: from given weights, or where a checkpoint of it stopped."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: RunConfig,
        name: str,
        world: World,
        data: RunData,
        before: Stage | None,
        checkpoint: Checkpoint | None,
        step: int = 0,
        beginnings: Beginnings | None = None,
    ):
        """before: the stage before, which is closed and with whose weights this one begins; step: of the run, as far as it is done;
        beginnings: initial weights for a stage without either, and the teacher of one that has one."""
        self.run_config, self.config, self.name = config, config.stages[name], name
        self.world = world = replace(world, parallel=config.parallel_of(name).sized(world.size))
        torch.manual_seed(config.seed)
        begins = before is None and checkpoint is None
        self.model, self.optimizer = self._build(data, before.model if before else None, beginnings if begins else None)
        self.kept: dict[str, dict[str, Tensor]] | None = None
        if before is not None and before.kept is not None:
            self._continue_optimizer(before, before.kept)
        if self.config.teacher is not None:
            assert beginnings is not None
            self.model.distillation = make_distillation(config, name, self.model, beginnings)
        self.done, self.loader_state = 0, PackerState()
        self.order = stream_order(config, name, data)
        if checkpoint is not None:
            self.done = checkpoint.state["stage_step"]
            self.loader_state = loader_state(checkpoint.state, self.order, world)
            # The random state of a process means nothing on another layout; order and initial weights do not use it.
            self._load(checkpoint, random_state=checkpoint.state["processes"] == world.size)
        mixture, sizes = stage_mixture(config, name, data), stage_sizes(config, name, data)
        saved = checkpoint.state.get("resampling") if checkpoint is not None else None
        self.resampler = Resampler(self.config.resampling, mixture, sizes, self.done, saved)
        self.rule = SpikeRule(config.spikes, checkpoint.state.get("spikes") if checkpoint else None)
        self.first_step = step - self.done  # of the run, where this stage began
        self.rate = 0.0
        self.waited = 0.0  # seconds, for the data of the step
        limit, length = config.data.validation_documents, self.config.sequence_length
        self.validation = ValidationSet(data.validation, data.encoder, limit, length, self.model.config, world)
        self.loader = self._loader(data)

    def _build(
        self, data: RunData, before: ParallelModel | None, beginnings: Beginnings | None
    ) -> tuple[ParallelModel, torch.optim.Optimizer]:
        """A new model for each stage: FSDP and ZeRO fix what is trainable when they wrap."""
        config, world = self.run_config, self.world
        dtype, autocast = PARAMETER_DTYPES[config.dtype], config.dtype == "bfloat16"
        common = config.model_of(self.name), world, config.seed, dtype, trainable_parts(self.config), self.config.sequence_length
        if world.parallel.runtime == "deepspeed":
            try:
                zero = DeepSpeedModel(*common, autocast=autocast)
            except ValueError as error:
                raise UserError(str(error)) from error
            if before is not None:
                zero.copy_weights(before)
            if beginnings is not None:
                take_initial(zero, config, beginnings)
            groups = parameter_groups(zero.skeleton, self.config, config.optimizer)
            return zero, zero.start(groups, self.config.learning_rate or 0.0, config.optimizer.betas, config.optimizer.eps)
        # Of one process: ranks that cut the layers at different places would wait for each other for ever.
        work = world.agree(lambda: typical_work(config, self.name, data)) if world.parallel.pp > 1 else None
        model = ParallelModel(*common, work, autocast)
        if before is not None:
            model.copy_weights(before)
        if beginnings is not None:
            take_initial(model, config, beginnings)
        return model, build_optimizer(model, self.config, config.optimizer)

    def _continue_optimizer(self, before: Stage, kept: dict[str, dict[str, Tensor]]) -> None:
        parts = set(trainable_parts(self.config)) & set(trainable_parts(before.config))
        try:
            continue_optimizer(self.optimizer, self.model, before.model, kept, parts)
        except ValueError as error:
            raise UserError(f"stages.{self.name}: {error}") from error

    def roll_back(self, checkpoint: Checkpoint) -> None:
        """Take weights and optimiser state of a checkpoint of this stage; the data goes on where it is."""
        self._load(checkpoint, random_state=False)
        self.rule.rolled_back(checkpoint.state.get("spikes", {}))  # version 0.2 had none

    def _load(self, checkpoint: Checkpoint, random_state: bool) -> None:
        tensors = self.tensors()
        if not random_state:
            del tensors[self._random_state]
        load_tensors(checkpoint, tensors)
        try:
            self.model.restore(tensors)
        except ValueError as error:
            raise UserError(f"checkpoint {checkpoint.path}: {error}") from error
        if random_state:
            torch.set_rng_state(tensors[self._random_state])

    def _loader(self, data: RunData) -> Loader:
        config, world = self.run_config, self.world
        place = Place(world.rank, world.size, world.replica, world.num_replicas)
        return Loader(
            stage_stream(config, self.name, data, self.loader_state), data.reader, stage_packing(config, self.name), place,
            Channel(world), self.loader_state, weights=self.resampler.weights, num_workers=config.data.workers,
            prefetch=config.data.prefetch, first_step=self.first_step + self.done + 1, done=self.done,
        )  # fmt: skip

    def batches(self) -> Iterator[StepBatch]:
        """What is left of the stage, step by step. Raises UserError, on all ranks, when they have not read the same."""
        while self.done < self.config.steps:
            started = time.perf_counter()
            batch = next(self.loader)
            self.waited = time.perf_counter() - started
            yield batch

    def train_step(self, batch: StepBatch, asked_to_stop: bool = False) -> StepResult:
        """Forward and backward over this replica's packs, one reduction, clip, and, unless it is to be skipped, the update.

        asked_to_stop: of this rank; all hear of it with the loss. A step without a loss token leaves it to the next one.
        """
        self.rate = learning_rate(self.run_config, self.name, self.done)
        set_learning_rate(self.optimizer, self.rate)
        self.done, self.loader_state = self.done + 1, batch.state
        if batch.loss_tokens == 0:
            return StepResult(0.0, 0.0, "no loss token")
        with self._explain_out_of_memory():
            unsolved = self.resampler.unsolved(batch, self.world.device)
            share = self.model.accumulate(batch.packs, _share(batch.loss_tokens, unsolved))
            told = [share, share.new_full((), float(asked_to_stop)), *(unsolved.counts if unsolved else [])]
            loss, askers, *missed = self.world.sum(torch.stack(told)).tolist()
            norm = self.model.clip_gradients(self.run_config.optimizer.clip)
            finite = math.isfinite(loss) and math.isfinite(norm)
            norms = self._norms()
            verdict = self.rule.see(self.first_step + self.done, loss, norm)
            skipped = None if verdict.action == "ok" else "spike" if finite else "non-finite"
            if skipped is None:
                self.optimizer.step()
                if unsolved:
                    self.resampler.see(batch, missed)
        self.optimizer.zero_grad()
        return StepResult(loss, norm, skipped, norms, verdict, stop=askers > 0)

    def _norms(self) -> dict[str, float]:
        every = self.run_config.logging.norms_every
        if not every or self.done % every:
            return {}
        model, world = self.model, self.world
        names = {p: name for name, p in model.counted(dict(model.named_parameters())).items()}
        found = {
            "weights": module_norms(model.counted(model.weights()), world),
            "gradients": module_norms(model.counted(model.gradients()), world),
            "state": optimizer_norms(self.optimizer, names, world),
        }
        return {f"norms/{kind}/{key}": value for kind, norms in found.items() for key, value in norms.items()}

    def _explain_out_of_memory(self) -> AbstractContextManager[None]:
        length = f"stages.{self.name}.sequence_length (now {self.config.sequence_length})"
        advice = f"a smaller {length}; dtype = 'bfloat16'"
        return explain_out_of_memory(self.model.parameters(), self.optimizer, f"stage {self.name}", advice)

    def validate(self) -> dict[str, float]:
        """Held-out loss by source, named as metrics."""
        with self._explain_out_of_memory():
            count = self.run_config.packs_of(self.name) // self.world.num_replicas
            losses = self.validation.losses(lambda packs: self.model.evaluate(packs, pack_loss, count))
        return {f"validation_loss/{name}": value for name, value in losses.items()}

    def resample(self, measured: Mapping[str, Any]) -> dict[str, float]:
        """Post new weights to the loader. measured: what :meth:`validate` found after this step. Returns them, named as metrics."""
        losses = {name: measured[key] for name in self.resampler.lows if (key := f"validation_loss/{name}") in measured}
        if lacking := self.resampler.lows.keys() - losses:
            raise UserError(
                f"stages.{self.name}.resampling: no record of data.validation.{min(lacking)} fits in a pack of "
                f"{self.config.sequence_length} tokens, so that its loss is unknown; raise sequence_length or leave resampling out"
            )
        return self.resampler.resample(self.done, losses)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.weights().items()}
        return {**weights, **tensors_of(self._optimizer_state()), self._random_state: torch.get_rng_state()}

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        return optimizer_state(self.optimizer, {p: name for name, p in self.model.named_parameters()})

    @property
    def _random_state(self) -> str:
        return f"random_state.{self.world.rank}"

    def state(self) -> dict[str, object]:
        """Everything of a checkpoint that is not. The learning rate is a function of ``stage_step``."""
        return {
            "stage": self.name,
            "stage_step": self.done,
            "loader": asdict(self.loader_state),
            "order": self.order,
            "resampling": self.resampler.state(),
            "processes": self.world.size,
            "spikes": self.rule.state(),
        }

    def end(self) -> None:
        """Keep the optimiser's state where the next stage goes on with it. Every rank calls it at the end, before :meth:`close`."""
        if self.run_config.is_continued(self.name):
            self.kept = self._optimizer_state()

    def close(self) -> None:
        """End the loader's thread; the model keeps its weights."""
        self.loader.close()
        self.model.distillation = None
        self.model.close()


def stream_order(config: RunConfig, name: str, data: RunData) -> dict[str, Any]:
    """What the order of each source of a stage follows from: seed, name of the stage, and [name, records] of every source. Weights
    may change at any sample: the log of changes has them."""
    sources = [list(item) for item in stage_sizes(config, name, data).items()]
    return {"seed": config.seed, "stage": name, "sources": sources}


def loader_state(saved: Mapping[str, Any], order: dict[str, Any], world: World) -> PackerState:
    """Where the loader goes on. saved: of a checkpoint. What cannot be exact is said once: where the order has changed, what the
    cursor counts and what was carried are of another one."""
    state, before = PackerState(**saved["loader"]), saved.get("order", {})  # version 0.2 did not save it
    if before == order:
        return state
    if world.is_main:
        differences = [f"{key}: {before.get(key)}, now {value}" for key, value in order.items() if before.get(key) != value]
        warn(
            f"stage {saved['stage']!r} goes on at sample {state.cursor} of another order than that of its checkpoint "
            f"({', '.join(differences)}): some records come again and others never; {len(state.carried)} documents that waited for a "
            "pack are given up"
        )
    return PackerState(state.cursor)


def stage_sizes(config: RunConfig, name: str, data: RunData) -> dict[str, int]:
    """Records of each source that the stage reads."""
    return {source: len(data.sources[source]) for source in config.stages[name].sources}


def stage_mixture(config: RunConfig, name: str, data: RunData) -> Mixture:
    return mixture_of(config.stages[name], stage_sizes(config, name, data))


def stage_stream(config: RunConfig, name: str, data: RunData, state: PackerState | None = None) -> SampleStream:
    """The stage's samples, in an order of its own: one of its name in another run has the same. state: from where it is read on."""
    stage, log = config.stages[name], state.log if state else []
    stream = SampleStream(stage_sizes(config, name, data), Presentation(stage.think, stage.truncate), seed_of(config.seed, name), log)
    if not log:
        stream.change(0, stage_mixture(config, name, data).mix(1))
    return stream


def stage_packing(config: RunConfig, name: str) -> Packing:
    model, data = config.model, config.data
    return Packing(
        config.stages[name].sequence_length, config.packs_of(name), data.window, data.long_documents, model.image_attention,
        model.vision.tile, model_cost(model),
    )  # fmt: skip


def typical_work(config: RunConfig, name: str, data: RunData) -> Workload:
    """The mean work of a pack over the stage's first step, by which a pipeline is cut."""
    stream, packing = stage_stream(config, name, data), stage_packing(config, name)
    plan = packing.packer(lambda samples: data.reader.measure([stream[sample] for sample in stream.available(samples)])).next()
    packs = plan.packs if plan is not None else [[]]  # the loader will say what is wrong
    works = [piece.work for one in packs for piece in one]
    return Workload(packing.length, sum(work.pairs for work in works) / len(packs), sum(work.tiles for work in works) / len(packs))


def _share(loss_tokens: float, unsolved: UnsolvedTokens | None) -> Callable[[Tensor, PackShard], Tensor]:
    def loss(nll: Tensor, shard: PackShard) -> Tensor:
        if unsolved:
            unsolved.see(nll, shard)
        return pack_loss(nll, shard) / loss_tokens

    return loss
