"""The whole model: vision tower, projector and decoder over one packed batch. Knows nothing of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalt.kernels import linear_cross_entropy

from .batch import PackedBatch, see_as
from .config import ModelConfig
from .language import LanguageModel
from .vision import Projector, VisionTower

PARTS = ("vision", "projector", "language")


class MultimodalModel(nn.Module):
    """``forward`` gives the negative log-likelihood of every token of a pack; ``hidden`` stops before the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config)
        self.language = LanguageModel(config.language)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Negative log-likelihood [T] in nats; 0 where the label is IGNORE."""
        return linear_cross_entropy(self.hidden(batch), self.language.head_weight, batch.labels)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Final hidden states [T, C]."""
        x = self.embed(batch.tokens, batch.image_index, batch.tiles)
        return self.language(x, self.language.rows(batch.positions, batch.kv_start, batch.kv_end, x.dtype))

    def embed(self, tokens: Tensor, image_index: Tensor, tiles: Tensor) -> Tensor:
        """Token embeddings [T, C] with the rows of ``image_index`` replaced by the projected tiles.

        Raises ValueError when the number of rows is not that of the tiles' tokens.
        """
        expected = tiles.shape[0] * self.config.vision.tokens_per_tile
        if image_index.shape[0] != expected:
            raise ValueError(f"{image_index.shape[0]} image rows for {tiles.shape[0]} tiles; the tiles make {expected} tokens")
        x = residual_stream(self.language.embedding(tokens))
        return x.index_copy(0, image_index, self.see(see_as(tiles, x.dtype)).to(x.dtype))

    def see(self, tiles: Tensor) -> Tensor:
        """Tiles [N, 3, S, S] as rows of the language model, [V, C]."""
        return self.projector(self.vision(tiles)) if len(tiles) else self.see_nothing(tiles)

    def see_nothing(self, tiles: Tensor) -> Tensor:
        """What is seen of no tile, [0, C]. The tower runs all the same, on a blank one: every weight has a gradient, if of zeros, and
        on a mesh the collectives of a step are the same on every rank, whatever its data."""
        side = self.config.vision.tile
        return self.projector(self.vision(tiles.new_zeros(1, 3, side, side)))[:0]


def residual_stream(x: Tensor) -> Tensor:
    """Embeddings as what blocks add to: in at least fp32 where autocast makes their products narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if torch.is_autocast_enabled(x.device.type) else x


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each part and in total; a tied head counts once."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return {**counts, "total": sum(counts.values())}
