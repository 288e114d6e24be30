"""The whole model: vision tower, projector and decoder over one packed batch. Knows nothing of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalt.kernels import linear_cross_entropy

from .batch import PackedBatch
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
        if tiles.shape[0]:
            return x.index_copy(0, image_index, self.see(tiles).to(x.dtype))
        # A pack without images still runs the tower: on a mesh the collectives of a step are the same on every rank whatever its data.
        return x + self.see_nothing(x).sum().to(x.dtype)

    def see(self, tiles: Tensor) -> Tensor:
        """Tiles [N, 3, S, S] as rows of the language model, [V, C]."""
        return self.projector(self.vision(tiles))

    def see_nothing(self, like: Tensor) -> Tensor:
        """The rows of one blank tile with weight 0, of a dtype and a device. Connected to the loss: every weight has a gradient."""
        side = self.config.vision.tile
        return 0.0 * self.see(like.new_zeros(1, 3, side, side))


def residual_stream(x: Tensor) -> Tensor:
    """Embeddings as what blocks add to: in at least fp32 where autocast makes their products narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if torch.is_autocast_enabled(x.device.type) else x


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each part and in total; a tied head counts once."""
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return {**counts, "total": sum(counts.values())}
