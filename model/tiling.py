"""AnyRes: how many tiles an image becomes, from its size alone, and where it lies on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from .config import ModelConfig, TilingConfig


@dataclass(frozen=True)
class Grid:
    """rows x columns of tiles; where these are more than one, a thumbnail of the whole image comes before them."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        """With the thumbnail."""
        cells = self.rows * self.columns
        return cells + (cells > 1)


@dataclass(frozen=True)
class ImageShape:
    """How images enter a model. side: of a tile in pixels; tokens: of the language model that a tile takes."""

    side: int
    tokens: int
    tiling: TilingConfig = field(default_factory=TilingConfig)

    @staticmethod
    def of(config: ModelConfig) -> ImageShape:
        return ImageShape(config.vision.tile, config.vision.tokens_per_tile, config.tiling)

    def grid(self, width: int, height: int) -> Grid:
        """The grid of an image of that size in pixels."""
        return choose_grid(width, height, self.side, self.tiling)


@lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, side: int, config: TilingConfig) -> Grid:
    """The relaxed aspect-ratio matching of BlueLM-V-3B (arXiv 2411.10640): the pixels of the image that a grid keeps count first, the
    area that it leaves empty second, and a loss of less than alpha counts as none.

    width, height: of the image in pixels, at least 1. Grids are tried from the largest area to the smallest; of one area, the one with
    more rows comes first.
    """
    area = width * height
    grids = [(rows, columns) for rows in range(1, config.max_rows + 1) for columns in range(1, config.max_columns + 1)]
    kept_most, wasted_least, chosen = 0.0, 0.0, (1, 1)
    for rows, columns in sorted(grids, key=lambda grid: (-grid[0] * grid[1], -grid[0])):
        scale = min(columns * side / width, rows * side / height)
        kept = min(area * scale * scale, float(area))
        wasted = rows * columns * side * side - kept
        more = kept - kept_most > config.alpha * kept_most
        as_much = kept_most - kept < config.alpha * kept_most
        if more or (as_much and wasted < wasted_least):
            kept_most, wasted_least, chosen = kept, wasted, (rows, columns)
    return Grid(*chosen)


def fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int, int, int]:
    """Where an image lies on a canvas that it fills in one direction, in its own proportions and in the middle: (left, top, width,
    height) in pixels. An image that is thinner than a pixel of the canvas has one all the same."""
    scale = min(canvas_width / width, canvas_height / height)
    new_width, new_height = (min(max(round(size * scale), 1), most) for size, most in ((width, canvas_width), (height, canvas_height)))
    return (canvas_width - new_width) // 2, (canvas_height - new_height) // 2, new_width, new_height
