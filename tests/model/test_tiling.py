"""AnyRes: the published choices, and what holds of every size of image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.model import PRESETS, TilingConfig
from smalt.model.tiling import Grid, ImageShape, choose_grid, fit

THREE = TilingConfig(max_rows=3, max_columns=3)
SIDES = st.one_of(st.integers(1, 8000), st.sampled_from([1, 50, 377, 378, 379, 1512, 8000]))


def _kept(width, height, rows, columns, side):
    """Pixels of the image that are left on a grid, as the paper counts them."""
    return min(width * height * min(columns * side / width, rows * side / height) ** 2, width * height)


@pytest.mark.parametrize(
    ("width", "height", "want"),
    [
        (394, 390, Grid(1, 1)),  # LLaVA-NeXT takes 2 x 2, BlueLM-V-3B 1 x 1: its own example
        (380, 76, Grid(1, 1)),  # InternVL 1.5 takes 5 x 1
        (384, 384, Grid(1, 1)),
        (768, 384, Grid(1, 2)),
        (384, 1152, Grid(3, 1)),
        (1152, 1152, Grid(3, 3)),
        (10_000, 10_000, Grid(3, 3)),
    ],
)
def test_the_published_choices(width, height, want):
    assert choose_grid(width, height, 384, THREE) == want


def test_a_phone_screen_of_two_to_four_is_nine_tiles():
    # BlueLM-V-3B, section on the token downsampler: 2 : 4 is 9 tiles, 6561 patches merged to 1764 tokens.
    grid = choose_grid(768, 1536, 384, TilingConfig())
    assert (grid, grid.num_tiles) == (Grid(4, 2), 9)
    assert grid.num_tiles * 196 == 1764


def test_the_largest_image_of_the_preset_takes_3332_tokens():
    shape = ImageShape.of(PRESETS["bluelm_3b"])
    grid = shape.grid(1512, 1512)
    assert (grid, shape.tokens * grid.num_tiles) == (Grid(4, 4), 17 * 196)


@given(width=SIDES, height=SIDES, side=st.sampled_from([8, 378, 384]), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_every_size_has_a_grid_that_is_good_and_small(width, height, side, rows, columns):
    config = TilingConfig(max_rows=rows, max_columns=columns)
    grid = choose_grid(width, height, side, config)
    assert 1 <= grid.rows <= rows
    assert 1 <= grid.columns <= columns
    assert grid.num_tiles == grid.rows * grid.columns + (grid.rows * grid.columns > 1)
    kept = _kept(width, height, grid.rows, grid.columns, side)
    options = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)]
    # At each step at most alpha of the best so far is given up, and each step has a smaller area than the one before it.
    assert kept >= 0.9 ** len({r * c for r, c in options}) * max(_kept(width, height, r, c, side) for r, c in options)
    # No smaller grid keeps as many pixels.
    assert not [(r, c) for r, c in options if r * c < grid.rows * grid.columns and _kept(width, height, r, c, side) >= kept]


@given(width=SIDES, height=SIDES, canvas_width=st.integers(1, 1512), canvas_height=st.integers(1, 1512))
def test_an_image_lies_inside_its_canvas_and_fills_it_in_one_direction(width, height, canvas_width, canvas_height):
    left, top, new_width, new_height = fit(width, height, canvas_width, canvas_height)
    assert 0 <= left <= left + new_width <= canvas_width
    assert 0 <= top <= top + new_height <= canvas_height
    assert min(new_width, new_height) >= 1
    assert new_width == canvas_width or new_height == canvas_height
    assert abs(2 * left + new_width - canvas_width) <= 1
    assert abs(2 * top + new_height - canvas_height) <= 1
