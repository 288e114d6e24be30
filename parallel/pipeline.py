"""Pipeline parallel: torch's schedules over the parts of the model, every pipeline stage looking up its own share of each pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from .compat import widen_gradients
from .mesh import World
from .part import ModelPart

SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class _Stage(PipelineStage):
    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """As in torch. FSDP widens gradients after a backward pass through inputs alone, and several of weights may come before the
        next: with bfloat16 they would be summed in that."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if not last_backward:  # the last one's are on their way to be reduced
            widen_gradients(self.submod)


class Pipeline:
    """Runs microbatches through the parts of this rank and its neighbours.

    Packs differ in tiles, and torch cannot cut them into microbatches: it is given their numbers, and each part looks its share up.
    """

    def __init__(
        self, parts: list[ModelPart], world: World, rows: int, num_microbatches: int, dtype: torch.dtype, gives_hidden: bool = False
    ):
        """rows: of the hidden states between parts, T / (cp tp); dtype: of these states; gives_hidden: the last part's output is such
        rows too, not a loss of each."""
        assert world.meshes is not None
        parallel, group = world.parallel, world.meshes.pp.get_group()
        self.num_microbatches, self.device = num_microbatches, world.device
        self.losses: Callable[[Tensor, int], Tensor] | None = None
        width = parts[0].config.language.width
        hidden = torch.empty(rows, width, dtype=dtype, device="meta", requires_grad=True)
        wide = torch.promote_types(dtype, torch.float32)
        nll = torch.empty(rows * parallel.tp, dtype=wide, device="meta", requires_grad=True)
        stages = []
        for number, part in enumerate(parts):
            index = number * parallel.pp + world.coordinates["pp"]
            inputs = torch.empty(1, dtype=torch.int64, device="meta") if part.is_first else hidden
            outputs = nll if part.is_last and not gives_hidden else hidden
            stages.append(_Stage(part, index, parallel.num_stages, world.device, input_args=inputs, output_args=outputs, group=group))
        schedule = SCHEDULES[parallel.schedule]
        # The loss is divided by its denominator already; torch would divide the gradients by the number of microbatches too.
        self.schedule = schedule(
            stages[0] if parallel.schedule == "1f1b" else stages, num_microbatches, loss_fn=self._loss, scale_grads=False
        )

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self.losses is not None
        return self.losses(output, int(target))

    def run(self, losses: Callable[[Tensor, int], Tensor], backward: bool) -> list[Tensor]:
        """Forward, and backward where asked, of every microbatch. losses(output of the last part, number) gives a microbatch's loss.

        Returns these on the rank that has the last part, nothing elsewhere.
        """
        self.losses = losses
        numbers = torch.arange(self.num_microbatches)  # read by the loss, on the host
        found: list[Tensor] = []
        run = self.schedule.step if backward else self.schedule.eval
        run(microbatch=numbers.to(self.device, non_blocking=True), target=numbers, losses=found)
        return [loss.detach() for loss in found]
