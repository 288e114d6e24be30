"""The part of the model that a pipeline stage holds, over a rank's share of a pack; without a pipeline, the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smalt.kernels import attention_plan, linear_cross_entropy
from smalt.model import ModelConfig, MultimodalModel
from smalt.model.batch import see_as
from smalt.model.language import Rows
from smalt.model.multimodal import residual_stream

from .batch import PackShard
from .compat import all_to_all
from .context import GatheredRows, ScatteredRows
from .mesh import World
from .tensor import embed_tokens, head_loss


class ModelPart(MultimodalModel):
    """Some decoder blocks of the model; the first part has the vision tower and the embedding too, the last the norm and the head.

    Its parameters have the names that they have in the whole model. A tied embedding is in the first part and in the last.
    ``shards`` are what it works on, one a microbatch, and ``readout`` what the last part gives for its rows; set before a step.
    """

    def __init__(self, config: ModelConfig, blocks: range, world: World, autocast: bool):
        super().__init__(config)
        self.is_first, self.is_last = blocks.start == 0, blocks.stop == config.language.num_layers
        self.world, self.autocast = world, autocast
        self.shards, self.turn = list[PackShard](), 0
        self.readout: Readout = likelihood
        language = self.language
        language.blocks = nn.ModuleDict({str(i): language.blocks[str(i)] for i in blocks})
        if not self.is_first:
            del self.vision, self.projector
            if not (self.is_last and config.language.tie_embeddings):
                del language.embedding
        if not self.is_last:
            language.norm = None  # type: ignore[assignment]
            if not config.language.tie_embeddings:
                del language.head

    def forward(self, x: Tensor | None = None, *, microbatch: Tensor) -> Tensor:  # type: ignore[override]
        """Hidden rows [T / (cp tp), C] for the next part; of the last part what ``readout`` gives, the likelihood if it was not set.

        x: the hidden rows of the part before. microbatch: int64 [1], one after the other from 0.
        """
        number = self._next(microbatch)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.autocast):
            return self._forward(x, number)

    def _forward(self, x: Tensor | None, number: int) -> Tensor:
        shard = self.shards[number]
        if x is None:
            x = self._embed(shard)
        rows = self._rows(shard, x.dtype)
        for block in self.language.blocks.values():
            x = block(x, rows)
        if not self.is_last:
            return x
        return self.readout(self, self.language.norm(x), number)

    @property
    def meshes(self):
        assert self.world.meshes is not None
        return self.world.meshes

    def _next(self, microbatch: Tensor) -> int:
        """The number of the microbatch. Counted, for to read it from a GPU would make the host wait; every schedule goes in order."""
        turn, self.turn = self.turn, self.turn + 1
        if microbatch.device.type == "cpu" and int(microbatch) != turn:
            raise RuntimeError(f"the schedule runs microbatch {int(microbatch)} where {turn} is expected")
        return turn

    def _embed(self, shard: PackShard) -> Tensor:
        """Hidden rows, the embeddings of tiles in their places. Every rank runs the tower and the exchange, whatever it has."""
        embedding, exchange = self.language.embedding, shard.exchange
        if self.world.parallel.tp == 1:
            x = residual_stream(embedding(shard.tokens))
        else:
            x = residual_stream(embed_tokens(embedding.weight, shard.tokens, self.meshes.tp))
        seen = self.see(see_as(shard.tiles, x.dtype))
        if exchange.order is not None:
            seen = seen.index_select(0, exchange.order)
        if exchange.send:
            seen = all_to_all(seen, exchange.receive, exchange.send, self.meshes.tiles.get_group())
        return x.index_copy(0, exchange.rows, seen.to(x.dtype))

    def _rows(self, shard: PackShard, dtype: torch.dtype) -> Rows:
        table = self.language.rotary(shard.positions, dtype)
        if self.world.parallel.cp == 1:
            return Rows(shard.kv_start, shard.kv_end, attention_plan(shard.kv_start, shard.kv_end), *table)
        group = self.meshes.cp.get_group()
        if self.world.parallel.context == "gather":
            return GatheredRows(shard.kv_start, shard.kv_end, None, *table, shard.rounds, group)
        plan = attention_plan(shard.kv_start, shard.kv_end)
        return ScatteredRows(shard.kv_start, shard.kv_end, plan, *table, group)


Readout = Callable[[ModelPart, Tensor, int], Tensor]
"""What becomes of the normed hidden rows [T / (cp tp), C] of the last part, of the microbatch of that number."""


def likelihood(part: ModelPart, hidden: Tensor, number: int) -> Tensor:
    """Negative log-likelihood in nats, [T / cp]."""
    weight, labels = part.language.head_weight, part.shards[number].labels
    if part.world.parallel.tp == 1:
        return linear_cross_entropy(hidden, weight, labels)
    return head_loss(hidden, weight, labels, part.meshes.tp)
