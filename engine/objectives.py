"""What a stage minimises: sums over tokens, which the caller divides by a denominator that every rank knows beforehand."""

from __future__ import annotations

from torch import Tensor

from smalt.model import MultimodalModel, PackedBatch


def pack_loss(model: MultimodalModel, pack: PackedBatch) -> Tensor:
    """Weighted sum of the negative log-likelihood, in nats, over the labels of a pack."""
    return (model(pack) * pack.loss_weight).sum()
