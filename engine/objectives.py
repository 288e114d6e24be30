"""What a stage minimises: sums over tokens, which the caller divides by a denominator that every rank knows beforehand."""

from __future__ import annotations

from torch import Tensor

from smalt.parallel import PackShard


def pack_loss(nll: Tensor, shard: PackShard) -> Tensor:
    """Weighted sum of the negative log-likelihood, in nats, over this rank's rows of a pack."""
    return (nll * shard.loss_weight).sum()
