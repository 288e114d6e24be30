"""Faults that engines have had, planted one at a time, to see that the matrix finds each."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from smalt.kernels import rms_norm
from smalt.model.language import RMSNorm
from smalt.parallel import batch, compat, gradients, pipeline, tensor
from smalt.parallel.part import ModelPart


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _scale_gradients(schedule):
    return lambda *args, scale_grads, **kwargs: schedule(*args, scale_grads=True, **kwargs)


def _count_twice(of_pack):
    def sharded(pack, tokens_per_tile, world):
        shard = of_pack(pack, tokens_per_tile, world)
        if world.coordinates["cp"] == 1:
            first = (shard.labels >= 0).nonzero()[:1, 0]
            shard.loss_weight[first] *= 2
        return shard

    return sharded


def _norm_without_gradient(self, x, residual=None):
    weight = self.weight.detach() if self.weight.shape[0] == 16 else self.weight
    return rms_norm(x, weight, self.eps, residual)


def _blank_tile_apart(see_nothing):
    return lambda self, tiles: see_nothing(self, tiles).detach()


def _nothing_is_seen(self, tiles):
    return tiles.new_zeros(0, self.config.language.width)


def _exchange_where(needed):
    def exchange(x, receive, send, group):
        return compat.all_to_all(x, receive, send, group) if needed(receive, send) else x.new_zeros(sum(receive), x.shape[1])

    return exchange


def _exchange_of_tiles_only(of_pack):
    def sharded(pack, tokens_per_tile, world):
        shard = of_pack(pack, tokens_per_tile, world)
        return shard if len(pack.tiles) else replace(shard, exchange=replace(shard.exchange, send=[], receive=[]))

    return sharded


def _crash(self, x=None, microbatch=None):
    os.kill(os.getpid(), signal.SIGSEGV)


@contextmanager
def planted(name):
    """name: one of FAULTS, or None."""
    if name is None:
        yield
        return
    with FAULTS[name]():
        yield


FAULTS = {
    "gradients divided by the number of microbatches": lambda: patch.dict(
        pipeline.SCHEDULES, {k: _scale_gradients(s) for k, s in pipeline.SCHEDULES.items()}
    ),
    "gradients averaged over shards": lambda: patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None),
    "a token counted twice at a shard border": lambda: patch("smalt.parallel.model.shard_pack", _count_twice(batch.shard_pack)),
    "a replicated parameter not reduced": lambda: patch.object(tensor, "Partial", Replicate),
    "a tied gradient not summed": lambda: patch.object(gradients, "sum_tied", lambda gradient, group: None),
    "a blank tile not connected to the loss": lambda: patch.object(ModelPart, "see_nothing", _blank_tile_apart(ModelPart.see_nothing)),
    "a parameter without a gradient": lambda: patch.object(RMSNorm, "forward", _norm_without_gradient),
    "a crash in native code": lambda: patch.object(ModelPart, "forward", _crash),
    "a rank without a tile skips the tower": lambda: patch.object(ModelPart, "see_nothing", _nothing_is_seen),
    "a rank that sends no tile skips the exchange": lambda: patch(
        "smalt.parallel.part.all_to_all", _exchange_where(lambda receive, send: sum(send) > 0)
    ),
    "a pack without a tile skips the exchange": lambda: patch(
        "smalt.parallel.model.shard_pack", _exchange_of_tiles_only(batch.shard_pack)
    ),
}
