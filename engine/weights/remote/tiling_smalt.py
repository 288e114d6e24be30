"""Images to the tiles that the model was trained on. Needs Pillow and numpy alone."""

from __future__ import annotations

import base64
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREY = 128  # of what an image does not cover
ORIENTATION = 0x0112
# How a camera was held: the turn that undoes it, by the value of the EXIF tag. Pillow itself turns a TIFF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ON_ITS_SIDE = (5, 6, 7, 8)


def open_image(source: Any) -> Image.Image:
    """A picture whose pixels need not be decoded yet.

    source: a picture of Pillow; an array, uint8 [height, width, 3]; the bytes of a file; a path, a ``data:`` URL or base64 text.
    Raises TypeError for anything else, and OSError for a file that is none of an image.
    """
    if isinstance(source, Image.Image):
        return _reopened(source)
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, Path) or (isinstance(source, str) and _is_file(source)):
        return Image.open(source)
    if isinstance(source, str):
        try:
            return Image.open(io.BytesIO(base64.b64decode(source.rpartition(",")[2], validate=True)))
        except ValueError as error:
            raise FileNotFoundError(f"{source[:200]!r} is neither the path of an image nor an image in base64") from error
    raise TypeError(f"an image is a picture of Pillow, an array, bytes, a path or base64 text, not {type(source).__name__}")


def tiles_of(source: Any, side: int, max_rows: int, max_columns: int, alpha: float) -> np.ndarray:
    """The tiles of an image, RGB, uint8 [N, 3, side, side]: the thumbnail, where there is more than one tile, then row by row.

    The image keeps its proportions; what it does not cover is grey. source: as :func:`open_image` takes it; the rest: the tiling of
    the model, of which :func:`choose_grid` makes use.
    """
    picture = open_image(source)
    turn = _orientation(picture)
    width, height = reversed(picture.size) if turn in _ON_ITS_SIDE else picture.size
    rows, columns = choose_grid(width, height, side, max_rows, max_columns, alpha)
    # A JPEG far larger than the tiles is decoded at a half, a quarter or an eighth of its size.
    most = 2 * max(rows, columns) * side
    picture.draft("RGB", (most, most))
    rgb = _eight_bits(picture).convert("RGB")
    rgb = rgb.transpose(_TURNS[turn]) if turn in _TURNS else rgb
    whole = _on_canvas(rgb, columns * side, rows * side)
    tiles = whole.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
    return tiles if len(tiles) == 1 else np.concatenate([_on_canvas(rgb, side, side).transpose(2, 0, 1)[None], tiles])


def choose_grid(width: int, height: int, side: int, max_rows: int, max_columns: int, alpha: float) -> tuple[int, int]:
    """Rows and columns of tiles of an image of that size in pixels: the relaxed aspect-ratio matching of BlueLM-V-3B
    (arXiv 2411.10640). The pixels that a grid keeps count first, the area that it leaves empty second; a loss of less than alpha
    counts as none. Grids are tried from the largest area to the smallest, of one area those with more rows first."""
    area = width * height
    grids = [(rows, columns) for rows in range(1, max_rows + 1) for columns in range(1, max_columns + 1)]
    kept_most, wasted_least, chosen = 0.0, 0.0, (1, 1)
    for rows, columns in sorted(grids, key=lambda grid: (-grid[0] * grid[1], -grid[0])):
        scale = min(columns * side / width, rows * side / height)
        kept = min(area * scale * scale, float(area))
        wasted = rows * columns * side * side - kept
        more = kept - kept_most > alpha * kept_most
        as_much = kept_most - kept < alpha * kept_most
        if more or (as_much and wasted < wasted_least):
            kept_most, wasted_least, chosen = kept, wasted, (rows, columns)
    return chosen


def fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int, int, int]:
    """Where an image lies on a canvas that it fills in one direction: (left, top, width, height) in pixels, at least one each way."""
    scale = min(canvas_width / width, canvas_height / height)
    new_width, new_height = (min(max(round(size * scale), 1), most) for size, most in ((width, canvas_width), (height, canvas_height)))
    return (canvas_width - new_width) // 2, (canvas_height - new_height) // 2, new_width, new_height


def _on_canvas(rgb: Image.Image, width: int, height: int) -> np.ndarray:
    """The picture on a grey canvas of that size, uint8 [height, width, 3]."""
    left, top, new_width, new_height = fit(*rgb.size, width, height)
    if rgb.size != (new_width, new_height):
        rgb = rgb.resize((new_width, new_height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(rgb)
    return canvas


def _reopened(picture: Image.Image) -> Image.Image:
    """A JPEG of which nothing was decoded yet is opened once more: drafting it would change the caller's picture."""
    file = getattr(picture, "fp", None)
    if picture.format != "JPEG" or file is None or not getattr(picture, "tile", None):
        return picture
    file.seek(0)
    return Image.open(io.BytesIO(file.read()))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null byte: base64
        return False


def _orientation(picture: Image.Image) -> int:
    """Of a picture that is to be turned; 1 for one that is not, or does not say so in a form that can be read."""
    if picture.format == "TIFF" or "exif" not in picture.info:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on broken metadata
            return int(picture.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, EOFError, struct.error):
        return 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow would clip deeper pixels at 255 instead of scaling them."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("an image with pixels of 32 bits, whose range is unknown, cannot be read; convert it to 8 bits")
    return picture
