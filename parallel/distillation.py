"""Learning from a teacher on the same mesh (Hinton et al. 2015, arXiv 1503.02531): the loss of a row from the heads of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from smalt.kernels import linear_cross_entropy, linear_distillation
from smalt.kernels.head import cast_as_autocast_does
from smalt.model import ModelConfig

from .batch import PackShard
from .compat import all_gather
from .mesh import World
from .model import ParallelModel
from .part import ModelPart
from .tensor import gather_replicated


class Distillation:
    """A teacher and the loss of a row that it gives a student:

        cross_entropy nll + kl temperature^2 KL(teacher || student) + hidden d(normed hidden rows of both)

    cross_entropy, kl, hidden: weights, of which one of 0 costs nothing; distance: d, "cosine" (1 - cosine) or "mse" (mean square of
    the difference). channels: the teacher's channels that the student's hidden rows are compared with, int64 [student's width].
    The logits of neither exist at once. On tp each rank has its rows of both and gathers both heads, for the kernel of the divergence
    has no form over a part of the vocabulary. The teacher is a whole model, sharded as the student is; it keeps no activations.
    """

    def __init__(
        self,
        teacher: ParallelModel,
        *,
        cross_entropy: float,
        kl: float,
        temperature: float = 1.0,
        hidden: float = 0.0,
        distance: Literal["cosine", "mse"] = "cosine",
        channels: Tensor | None = None,
    ):
        self.teacher, self.cross_entropy, self.kl, self.temperature = teacher, cross_entropy, kl, temperature
        self.hidden, self.distance = hidden, distance
        self.channels = None if channels is None else channels.to(teacher.world.device)
        self.shards: list[PackShard] = []
        self.rows: dict[int, Tensor] = {}

    def begin(self, parts: list[ModelPart]) -> None:
        """Before a step of the student, whose parts have their shards. Where there is a pipeline the teacher's runs first, over all
        packs, and the last pipeline stage keeps its hidden rows."""
        self.shards = parts[0].shards
        for part in parts:
            part.readout = self._losses
        if self.teacher.world.parallel.pp > 1:
            self.rows = dict(enumerate(self.teacher.hidden(self.shards)))

    def look(self, number: int) -> None:
        """Before a pack of the student, where there is no pipeline: the teacher's hidden rows of it."""
        (self.rows[number],) = self.teacher.hidden([self.shards[number]])

    def end(self) -> None:
        """After the step."""
        self.teacher.reshard()
        self.shards, self.rows = [], {}

    def _losses(self, part: ModelPart, hidden: Tensor, number: int) -> Tensor:
        """The loss of each row, [T / cp]."""
        teacher, labels, tp = self.teacher.parts[-1], self.shards[number].labels, part.world.parallel.tp
        if isinstance(teacher, FSDPModule):
            teacher.unshard()  # what blocks do not hold: the head is read after its model's forward pass
        weight, teacher_weight = part.language.head_weight, teacher.language.head_weight.detach()
        if tp > 1:
            mesh = part.meshes.tp
            weight, teacher_weight = (all_gather(cast_as_autocast_does(w), mesh.get_group()) for w in (weight, teacher_weight))
            labels = labels.chunk(tp)[mesh.get_local_rank()]
        losses = self._of_rows(hidden, weight, labels, self.rows.pop(number), teacher_weight)
        return losses if tp == 1 else gather_replicated(losses, part.meshes.tp).flatten()

    def _of_rows(self, hidden: Tensor, weight: Tensor, labels: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        terms = []
        if self.cross_entropy:
            terms.append(self.cross_entropy * linear_cross_entropy(hidden, weight, labels))
        if self.kl:
            divergence = linear_distillation(hidden, weight, teacher_hidden, teacher_weight, temperature=self.temperature)
            terms.append(self.kl * self.temperature**2 * divergence)
        if self.hidden:
            terms.append(self.hidden * self._distance(hidden, teacher_hidden))
        return torch.stack(terms).sum(0)

    def _distance(self, hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        target = teacher_hidden if self.channels is None else teacher_hidden[:, self.channels]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, target = hidden.to(wide), target.to(wide)
        if self.distance == "mse":
            return (hidden - target).square().mean(-1)
        return 1.0 - F.cosine_similarity(hidden, target, dim=-1)


def make_teacher(config: ModelConfig, world: World, dtype: torch.dtype, sequence_length: int, autocast: bool) -> ParallelModel:
    """A model on the layout of its student of which nothing learns. Raises ValueError where it does not fit the layout."""
    # Without a backward pass, gathered weights of blocks need not wait for it, whatever the student's schedule asks for.
    parallel = world.parallel.model_copy(update={"reshard_after_forward": True, "checkpointing": "none"})
    return ParallelModel(config, replace(world, parallel=parallel), 0, dtype, (), sequence_length, autocast=autocast)
