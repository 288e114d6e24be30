"""One stage of training: its model, optimiser and stream of batches, and the step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from smalt.model import pack
from smalt.model.cost import Workload
from smalt.parallel import PackShard, ParallelModel, World
from smalt.parallel.deepspeed import DeepSpeedModel

from .checkpoints import Checkpoint, load_tensors
from .config import RunConfig
from .data.agreement import read_alike
from .data.chat import ChatEncoder
from .data.loader import Loader, StepBatch
from .data.packing import Packer, PackerState
from .data.records import ParquetRecords
from .data.stream import Presentation, grain, sample_stream, source_shares
from .data.validation import ValidationSet
from .errors import UserError
from .memory import explain_out_of_memory
from .norms import module_norms, optimizer_norms
from .objectives import pack_loss
from .optimizers import build_optimizer, learning_rate, optimizer_tensors, parameter_groups, set_learning_rate, trainable_parts
from .spikes import OK, SpikeRule, Verdict

# With bfloat16 the weights stay float32, and are rounded before they are used.
PARAMETER_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class RunData:
    """What a run reads: the encoder, the training sources and the held-out ones, by name."""

    encoder: ChatEncoder
    sources: Mapping[str, ParquetRecords]
    validation: Mapping[str, ParquetRecords]
    questions: Mapping[str, ParquetRecords]


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

    def __init__(
        self,
        config: RunConfig,
        name: str,
        world: World,
        data: RunData,
        before: ParallelModel | None,
        checkpoint: Checkpoint | None,
        step: int = 0,
    ):
        """before: the model of the stage before, whose weights this one begins with; step: of the run, as far as it is done."""
        self.run_config, self.config, self.name = config, config.stages[name], name
        self.world = world = replace(world, parallel=config.parallel_of(name).sized(world.size))
        torch.manual_seed(config.seed)
        self.model, self.optimizer = self._build(data, before)
        self.done, self.loader_state = 0, PackerState()
        self.order = stream_order(config, name, data)
        if checkpoint is not None:
            self.done = checkpoint.state["stage_step"]
            self.loader_state = loader_state(checkpoint.state, self.order, config.data.long_documents == "split", world)
            # The random state of a process means nothing on another layout; order and initial weights do not use it.
            self._load(checkpoint, random_state=checkpoint.state["processes"] == world.size)
        self.rule = SpikeRule(config.spikes, checkpoint.state.get("spikes") if checkpoint else None)
        self.first_step = step - self.done  # of the run, where this stage began
        self.rate = 0.0
        limit, length = config.data.validation_documents, self.config.sequence_length
        self.validation = ValidationSet(data.validation, data.encoder, limit, length, config.model, world)
        self.loader = self._loader(data)

    def _build(self, data: RunData, before: ParallelModel | None) -> tuple[ParallelModel, torch.optim.Optimizer]:
        """A fresh model for each stage: FSDP and ZeRO fix what is trainable when they wrap."""
        config, world = self.run_config, self.world
        dtype, autocast = PARAMETER_DTYPES[config.dtype], config.dtype == "bfloat16"
        common = config.model, world, config.seed, dtype, trainable_parts(self.config), self.config.sequence_length
        if world.parallel.runtime == "deepspeed":
            try:
                zero = DeepSpeedModel(*common, autocast=autocast)
            except ValueError as error:
                raise UserError(str(error)) from error
            if before is not None:
                zero.copy_weights(before)
            groups = parameter_groups(zero.skeleton, self.config, config.optimizer)
            return zero, zero.start(groups, self.config.learning_rate, config.optimizer.betas, config.optimizer.eps)
        # Of one process: ranks that cut the layers at different places would wait for each other for ever.
        work = world.agree(lambda: typical_work(config, self.name, data)) if world.parallel.pp > 1 else None
        model = ParallelModel(*common, work, autocast)
        if before is not None:
            model.copy_weights(before)
        return model, build_optimizer(model, self.config, config.optimizer)

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
        config, length = self.run_config, self.config.sequence_length
        read = stage_stream(config, self.name, data).__getitem__
        packer = Packer(read, length, config.data.packs_per_step, config.data.window, config.data.long_documents, self.loader_state)
        attention, tile = config.model.image_attention, config.model.vision.tile
        return Loader(packer, self.world.replica, self.world.num_replicas, attention, tile, config.data.prefetch)

    def batches(self) -> Iterator[StepBatch]:
        """What is left of the stage, step by step. Raises UserError, on all ranks, when they have not read the same."""
        while self.done < self.config.steps:
            step = f"step {self.first_step + self.done + 1}"
            yield read_alike(self.world, step, lambda: next(self.loader), lambda batch: batch.account)

    def train_step(self, batch: StepBatch, asked_to_stop: bool = False) -> StepResult:
        """Forward and backward over this replica's packs, one reduction, clip, and, unless it is to be skipped, the update.

        asked_to_stop: of this rank; all hear of it with the loss. A step without a loss token leaves it to the next one.
        """
        self.rate = learning_rate(self.config, self.done)
        set_learning_rate(self.optimizer, self.rate)
        self.done, self.loader_state = self.done + 1, batch.state
        if batch.loss_tokens == 0:
            return StepResult(0.0, 0.0, "no loss token")
        with self._explain_out_of_memory():
            share = self.model.accumulate(batch.packs, _share(batch.loss_tokens))
            loss, askers = self.world.sum(torch.stack([share, share.new_full((), float(asked_to_stop))])).tolist()
            norm = self.model.clip_gradients(self.run_config.optimizer.clip)
            finite = math.isfinite(loss) and math.isfinite(norm)
            norms = self._norms()
            verdict = self.rule.see(self.first_step + self.done, loss, norm)
            skipped = None if verdict.action == "ok" else "spike" if finite else "non-finite"
            if skipped is None:
                self.optimizer.step()
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
            count = self.run_config.data.packs_per_step // self.world.num_replicas
            losses = self.validation.losses(lambda packs: self.model.evaluate(packs, pack_loss, count))
        return {f"validation_loss/{name}": value for name, value in losses.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.weights().items()}
        state = optimizer_tensors(self.optimizer, {p: name for name, p in self.model.named_parameters()})
        return {**weights, **state, self._random_state: torch.get_rng_state()}

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
            "processes": self.world.size,
            "spikes": self.rule.state(),
        }

    def close(self) -> None:
        """End the loader's thread; the model keeps its weights."""
        self.loader.close()
        self.model.close()


def stream_order(config: RunConfig, name: str, data: RunData) -> dict[str, Any]:
    """What the order of a stage's samples follows from: seed, number of the stage, and [name, records, share] of each source."""
    shares = source_shares(config.stages[name].mixture)
    sources = [[source, len(data.sources[source]), share] for source, share in shares.items()]
    return {"seed": config.seed, "stage": list(config.stages).index(name), "sources": sources}


def loader_state(saved: Mapping[str, Any], order: dict[str, Any], splits: bool, world: World) -> PackerState:
    """Where the loader goes on. saved: of a checkpoint. What cannot be exact is said once: where the order has changed, what the
    cursor counts and what was carried are of another one."""
    state, before = PackerState(**saved["loader"]), saved.get("order", order)  # version 0.2 did not save it
    stage, said = f"stage {saved['stage']!r}", ""
    if before != order:
        changed = ", ".join(f"{key}: {before[key]}, now {value}" for key, value in order.items() if before[key] != value)
        said = (
            f"{stage} goes on at sample {state.cursor} of another order than that of its checkpoint ({changed}): some records come "
            f"again and others never; {len(state.carried)} documents that waited for a pack are given up"
        )
        state = PackerState(state.cursor)
    elif splits and any(len(entry) == 2 for entry in state.carried):
        said = (
            f"the checkpoint of {stage} counts pieces of split documents, as version 0.2 did: they are the right ones if its "
            "sequence_length is as it was"
        )
    if said and world.is_main:
        print(f"warning: {said}", file=sys.stderr, flush=True)
    return state


def stage_stream(config: RunConfig, name: str, data: RunData) -> grain.MapDataset:
    """The stage's samples. The seed is made of the run's and the stage's number, so that stages see different orders."""
    stage = config.stages[name]
    seed = config.seed * 1000 + list(config.stages).index(name) * 100
    return sample_stream(data.sources, stage.mixture, data.encoder, Presentation(stage.think, stage.truncate), seed)


def typical_work(config: RunConfig, name: str, data: RunData) -> Workload:
    """The mean work of a pack over the stage's first step, by which a pipeline is cut."""
    length = config.stages[name].sequence_length
    read = stage_stream(config, name, data).__getitem__
    packer = Packer(read, length, config.data.packs_per_step, config.data.window, config.data.long_documents)
    packs = [pack(documents, length, config.model.image_attention, config.model.vision.tile) for documents in packer.next().packs]
    pairs = sum(int((p.kv_end.long() - p.kv_start).sum()) for p in packs)
    return Workload(length, pairs / len(packs), sum(len(p.tiles) for p in packs) / len(packs))


def _share(loss_tokens: float) -> Callable[[Tensor, PackShard], Tensor]:
    return lambda nll, shard: pack_loss(nll, shard) / loss_tokens
