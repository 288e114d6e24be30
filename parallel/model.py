"""A model on a mesh: cut into pipeline stages, then, on each part, tp, cp, activation checkpointing, compile, fsdp; and its step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from smalt.model import ModelConfig, MultimodalModel, PackedBatch, pack
from smalt.model.cost import Workload, model_cost, split_blocks
from smalt.model.init import initial_rows

from . import gradients
from .batch import PackShard, shard_pack
from .layout import Bounds, local_bounds, local_part
from .mesh import World
from .part import ModelPart, Readout, likelihood
from .recompute import compile_blocks, recompute_blocks
from .sharding import round_weights, shard_part
from .tensor import tensor_parallel

if TYPE_CHECKING:
    from .distillation import Distillation
    from .pipeline import Pipeline

TIED = "language.embedding.weight"
T = TypeVar("T")


class ParallelModel:
    """The parts of a model that this rank holds, with initial weights that are the same on every layout.

    trainable: the names of the parts (vision, projector, language) that learn; sequence_length: T of every pack; work: of a typical
    pack, by which the pipeline is cut; autocast: weights and products in bfloat16, sums, gradients and what blocks add to in float32.
    Raises ValueError where the model does not fit the layout.
    """

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        seed: int,
        dtype: torch.dtype,
        trainable: Collection[str],
        sequence_length: int,
        work: Workload | None = None,
        autocast: bool = False,
    ):
        parallel = world.parallel
        parallel.check_model(config, sequence_length)
        self.config, self.world, self.dtype, self.sequence_length = config, world, dtype, sequence_length
        self.autocast = autocast
        work = work or Workload(sequence_length, sequence_length * sequence_length / 2, 0)
        self.blocks = split_blocks(model_cost(config), work, parallel.num_stages)
        mine = self.blocks[world.coordinates["pp"] :: parallel.pp]
        self.parts = [self._build(blocks, trainable, seed) for blocks in mine]
        self.pipeline: Pipeline | None = None
        self.tied_group = self._group_of_tied()
        self.distillation: Distillation | None = None
        self.checked = False

    def _build(self, blocks: range, trainable: Collection[str], seed: int) -> ModelPart:
        world = self.world
        with torch.device("meta"):
            part = ModelPart(self.config, blocks, world, self.autocast)
        part.to(self.dtype)
        freeze(part, trainable)
        if world.meshes is not None and world.parallel.tp > 1:
            tensor_parallel(part.language, world.meshes.tp)
        recompute_blocks(part, world.parallel)
        compile_blocks(part, world)
        compute = torch.bfloat16 if self.autocast else None
        if world.meshes is not None:
            shard_part(part, world, compute)
        part.to_empty(device=world.device)
        if world.meshes is None and compute:
            round_weights(part, compute)
        if world.device.type != "meta":
            initialize_part(part, seed)
        return part

    def _group_of_tied(self) -> dist.ProcessGroup | None:
        """The two ranks that hold copies of a tied embedding, one group for each place on the other axes."""
        world, pp = self.world, self.world.parallel.pp
        if pp == 1 or not self.config.language.tie_embeddings:
            return None
        per_stage = world.size // pp
        pairs = [[rank, world.size - per_stage + rank] for rank in range(per_stage)]
        return dist.new_subgroups_by_enumeration(pairs, timeout=world.timeout)[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of this rank's parts by their names in the whole model."""
        for part in self.parts:
            yield from part.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this rank's parts."""
        return (p for _, p in self.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """What this rank holds of every parameter, by its name: the weights themselves, or copies that :meth:`restore` takes."""
        return {name: p.data for name, p in self.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of :meth:`weights`, where there are any."""
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    def counted(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Of tensors by name, those of which this pipeline stage holds the first copy: sums over all ranks meet each element once."""
        copied = self.world.parallel.pp > 1 and not self.parts[0].is_first
        return {name: tensor for name, tensor in tensors.items() if not (copied and name == TIED)}

    def accumulate(self, packs: list[PackedBatch], loss: Callable[[Tensor, PackShard], Tensor]) -> Tensor:
        """Add the gradients of all packs of this replica, reduced over ranks once, at the last, or as ``reduce_every_pack`` says.

        loss(nll, shard) is a sum over rows, divided by what all ranks know. Returns this rank's share of the loss, whose sum over the
        world is the whole, float64 without dims. Where there is a ``distillation``, its loss of a row stands in for the nll.
        """
        self._begin(packs)
        if self.distillation is not None:
            self.distillation.begin(self.parts)
        if self.world.parallel.pp > 1:
            total = self._pipelined(len(packs), loss, backward=True)
        else:
            (part,), total, numbers = self.parts, self._zero(), self._numbers(len(packs))
            for i, shard in enumerate(part.shards):
                if self.distillation is not None:
                    self.distillation.look(i)
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(i == len(packs) - 1 or self.world.parallel.reduce_every_pack)
                value = loss(part(microbatch=numbers[i]), shard)
                value.backward()
                total += value.detach()
        if self.distillation is not None:
            self.distillation.end()
        if not self.checked:
            gradients.check_gradients(dict(self.named_parameters()))
            self.checked = True
        if self.tied_group is not None:
            tied = dict(self.named_parameters()).get(TIED)
            if tied is not None and tied.grad is not None:
                gradients.sum_tied(tied.grad, self.tied_group)
        return total / self.world.parallel.tp

    @torch.no_grad()
    def evaluate(self, packs: list[PackedBatch], loss: Callable[[Tensor, PackShard], Tensor], num_microbatches: int) -> Tensor:
        """This rank's share of the loss of packs, as in :meth:`accumulate`. Every rank of the world passes as many packs.

        num_microbatches: of a training step, for a pipeline always runs as many; what is missing is empty.
        """
        total = self._zero()
        if self.world.parallel.pp > 1:
            side, attention = self.config.vision.tile, self.config.image_attention
            packs = packs + [pack([], self.sequence_length, attention, side)] * (-len(packs) % num_microbatches)
            for low in range(0, len(packs), num_microbatches):
                self._begin(packs[low : low + num_microbatches])
                total += self._pipelined(num_microbatches, loss, backward=False)
        else:
            self._begin(packs)
            (part,), numbers = self.parts, self._numbers(len(packs))
            for i, shard in enumerate(part.shards):
                total += loss(part(microbatch=numbers[i]), shard)
        self.reshard()
        return total / self.world.parallel.tp

    @torch.no_grad()
    def hidden(self, shards: list[PackShard]) -> list[Tensor]:
        """Normed hidden rows [T / (cp tp), C] of each pack on the ranks that have the last part, nothing elsewhere; for a model that
        is asked for nothing else. Weights that FSDP has gathered stay so until :meth:`reshard`."""
        self._set(shards, lambda part, hidden, number: hidden)
        if self.world.parallel.pp > 1:
            return self._pipeline_of(len(shards), gives_hidden=True).run(lambda output, number: output, backward=False)
        (part,) = self.parts
        return [part(microbatch=number) for number in self._numbers(len(shards))]

    def reshard(self) -> None:
        """Give up the weights that FSDP has gathered and keeps for a backward pass: those of the root, and of blocks that do not give
        them up. The next forward pass would find them as they were, whatever became of the weights."""
        for module in (module for part in self.parts for module in part.modules()):
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient, the same on every rank."""
        return gradients.global_norm(self.counted(self.gradients()).values(), self.world)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients so that their norm is at most ``max_norm``; returns the norm before."""
        norm = self.gradient_norm()
        gradients.clip(list(self.gradients().values()), norm, max_norm)
        return norm

    @torch.no_grad()
    def copy_weights(self, other: ParallelModel) -> None:
        """Take the weights of a model on the same layout, whose pipeline may be cut elsewhere. Every rank of the world calls it."""
        theirs, mine = dict(other.named_parameters()), dict(self.named_parameters())
        for name in mine.keys() & theirs.keys():
            local_part(mine[name]).copy_(local_part(theirs[name]))
        self.take_moved(other, theirs, mine)

    @torch.no_grad()
    def take_moved(self, other: ParallelModel, theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> None:
        """Of tensors that go with parameters, write those of blocks that another pipeline stage has now into ``mine``; the others are
        left to the caller. Every rank of the world calls it.

        theirs, mine: what this rank holds for ``other`` and for this model, named alike, with the name of the parameter in each.
        """
        # One block after the other, in one order on all ranks. What is a rank's share of a block depends on the other axes alone, so
        # that it goes to the same place of the other stage.
        for block in (f"language.blocks.{i}." for i in range(self.config.language.num_layers)):
            sender, receiver = other._holder(block), self._holder(block)
            if sender != receiver:
                self._hand_over(block, theirs, sender, mine, receiver)

    def _hand_over(self, block: str, theirs: Mapping[str, Tensor], sender: int, mine: Mapping[str, Tensor], receiver: int) -> None:
        assert self.world.meshes is not None
        group, place, device = self.world.meshes.pp.get_group(), self.world.coordinates["pp"], self.world.device
        if place == sender:
            for name in sorted(name for name in theirs if block in name):
                dist.send(local_part(theirs[name]).to(device).contiguous(), group=group, group_dst=receiver)
        elif place == receiver:
            for name in sorted(name for name in mine if block in name):
                part = local_part(mine[name])
                arrived = torch.empty_like(part, device=device, memory_format=torch.contiguous_format)
                dist.recv(arrived, group=group, group_src=sender)
                part.copy_(arrived)

    @torch.no_grad()
    def fill(self, values: Mapping[str, Callable[[Bounds], Tensor]]) -> None:
        """Take weights from elsewhere, before the first step; every rank of the world calls it.

        values: by the name of a parameter, what gives the part of it within bounds; parameters without a name there stay as they are.
        """
        for name, p in self.named_parameters():
            if name in values:
                local_part(p).copy_(values[name](local_bounds(p)))

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a checkpoint that were loaded: here they are weights and state themselves, and nothing is left to do.

        Named ``model.NAME`` and ``optimizer.STATE.NAME``. Raises ValueError where the model cannot go on from them.
        """

    def close(self) -> None:
        """Let go of what only training needs and nothing else would free. The weights stay, to be gathered."""

    def full_state(self) -> dict[str, Tensor]:
        """Every parameter of the model, whole, on each rank. Every rank of the world calls it."""
        mine = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in self.named_parameters()}
        if self.world.parallel.pp == 1:
            return mine
        assert self.world.meshes is not None
        group, state = self.world.meshes.pp.get_group(), {}
        with torch.device("meta"):
            whole = MultimodalModel(self.config)
        for name, p in whole.named_parameters():
            holder = self._holder(name)
            # Only the holder's own: of a tied weight the last stage has a copy, which is not to be written into.
            own = self.world.coordinates["pp"] == holder
            tensor = mine[name].contiguous() if own else torch.empty(p.shape, dtype=self.dtype, device=self.world.device)
            dist.broadcast(tensor, group=group, group_src=holder)
            state[name] = tensor
        return state

    def _holder(self, name: str) -> int:
        """The first rank on the pipeline axis that holds a parameter."""
        words = name.split(".")
        stage = 0
        if words[:2] == ["language", "blocks"]:
            stage = next(i for i, blocks in enumerate(self.blocks) if int(words[2]) in blocks)
        elif words[:2] in (["language", "norm"], ["language", "head"]):
            stage = len(self.blocks) - 1
        return stage % self.world.parallel.pp

    def _begin(self, packs: list[PackedBatch]) -> None:
        self._set([shard_pack(one, self.config.vision.tokens_per_tile, self.world) for one in packs], likelihood)

    def _set(self, shards: list[PackShard], readout: Readout) -> None:
        for part in self.parts:
            part.shards, part.turn, part.readout = shards, 0, readout

    def _pipelined(self, count: int, loss: Callable[[Tensor, PackShard], Tensor], backward: bool) -> Tensor:
        shards = self.parts[0].shards
        found = self._pipeline_of(count).run(lambda output, number: loss(output, shards[number]), backward)
        return sum((value.double() for value in found), start=self._zero())

    def _pipeline_of(self, count: int, gives_hidden: bool = False) -> Pipeline:
        if self.pipeline is None:
            from .pipeline import Pipeline  # torch's takes a while to import, and only a pipeline needs it

            rows = self.sequence_length // (self.world.parallel.cp * self.world.parallel.tp)
            self.pipeline = Pipeline(self.parts, self.world, rows, count, self.dtype, gives_hidden)
        if count != self.pipeline.num_microbatches:
            raise ValueError(f"{count} packs for a pipeline that was made for {self.pipeline.num_microbatches}")
        return self.pipeline

    def _numbers(self, count: int) -> tuple[Tensor, ...]:
        """Of microbatches, where the model is: FSDP would copy them there, and make the host wait."""
        return torch.arange(count, device=self.world.device).split(1)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.world.device)


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Have only the parts of these names learn."""
    for name, child in model.named_children():
        child.requires_grad_(name in trainable)


def initialize_part(part: ModelPart, seed: int) -> None:
    """Fill this rank's share of every parameter with its initial numbers, and make no others."""
    with torch.no_grad():
        for name, p in part.named_parameters():
            (first, last), *others = local_bounds(p)
            values = initial_rows(part.config, name, p.shape, seed, first, last)
            for dim, (start, stop) in enumerate(others, start=1):
                values = values.narrow(dim, start, stop - start)
            local_part(p).copy_(values)
