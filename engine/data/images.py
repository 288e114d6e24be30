"""Images to tiles, with limits: nothing large is decoded, and nothing that is not an image is trusted."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image as PIL_Image
from PIL import UnidentifiedImageError

from smalt.model.tiling import Grid, fit

from ..errors import BadRecord
from .records import Image
from .retry import with_retries

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Of what an image does not cover: the middle of the range.
GREY = 128
# How a camera was held: the turn that undoes it, by the value of the EXIF tag. Pillow itself turns a TIFF.
ORIENTATION = 0x0112
_TURNS = {
    2: PIL_Image.Transpose.FLIP_LEFT_RIGHT, 3: PIL_Image.Transpose.ROTATE_180, 4: PIL_Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL_Image.Transpose.TRANSPOSE, 6: PIL_Image.Transpose.ROTATE_270, 7: PIL_Image.Transpose.TRANSVERSE,
    8: PIL_Image.Transpose.ROTATE_90,
}  # fmt: skip
_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageLimits:
    """Largest file in bytes and largest decoded size in pixels that are accepted."""

    max_bytes: int = 32 << 20
    max_pixels: int = 64 << 20


def image_size(image: Image, limits: ImageLimits) -> tuple[int, int]:
    """Width and height in pixels as it is to be seen, from the header: no pixel is decoded.

    Raises BadRecord for a missing, huge or non-image file.
    """
    with _bad_if_broken(image):
        return with_retries(lambda: _size(image, limits))


def _size(image: Image, limits: ImageLimits) -> tuple[int, int]:
    _check_bytes(image, limits)
    with image.open() as file:
        picture = _header(file, image, limits)
        width, height = picture.size
        return (height, width) if _orientation(picture) in _ON_ITS_SIDE else (width, height)


def image_bytes(image: Image, limits: ImageLimits) -> bytes:
    """The file of an image. Raises BadRecord for one that is missing or too large."""
    with _bad_if_broken(image):
        return with_retries(lambda: _all_bytes(image, limits))


def decode_grey(image: Image, limits: ImageLimits) -> PIL_Image.Image:
    """The whole image as it is to be seen, 8 bits a pixel, without colours. Raises BadRecord as ``decode_tiles`` does."""
    with _bad_if_broken(image):
        picture = _header(io.BytesIO(with_retries(lambda: _all_bytes(image, limits))), image, limits)
        turn = _TURNS.get(_orientation(picture))
        grey = _eight_bits(picture, image).convert("L")
        return grey if turn is None else grey.transpose(turn)


def decode_tiles(image: Image, grid: Grid, side: int, limits: ImageLimits) -> np.ndarray:
    """The tiles of an image, RGB, uint8 [N, 3, side, side]: the thumbnail, where the grid has more than one tile, then row by row.

    The image keeps its proportions; what it does not cover is grey. Raises BadRecord for a missing, huge, corrupt or non-image file.
    """
    width, height = grid.columns * side, grid.rows * side
    with _bad_if_broken(image):
        picture = _header(io.BytesIO(with_retries(lambda: _all_bytes(image, limits))), image, limits)
        turn = _TURNS.get(_orientation(picture))
        # A JPEG far larger than the tiles is decoded at a half, a quarter or an eighth of its size.
        most = 2 * max(width, height)
        picture.draft("RGB", (most, most))
        rgb = _eight_bits(picture, image).convert("RGB")
        rgb = rgb if turn is None else rgb.transpose(turn)
        whole = _on_canvas(rgb, width, height)
        tiles = whole.reshape(grid.rows, side, grid.columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
        if grid.num_tiles == 1:
            return np.ascontiguousarray(tiles)
        return np.concatenate([_on_canvas(rgb, side, side).transpose(2, 0, 1)[None], tiles])


def _on_canvas(rgb: PIL_Image.Image, width: int, height: int) -> np.ndarray:
    """The picture on a grey canvas of that size, uint8 [height, width, 3]."""
    left, top, new_width, new_height = fit(*rgb.size, width, height)
    if rgb.size != (new_width, new_height):
        rgb = rgb.resize((new_width, new_height), PIL_Image.Resampling.BICUBIC, reducing_gap=3.0)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    canvas[top : top + new_height, left : left + new_width] = np.asarray(rgb)
    return canvas


def _header(file: BinaryIO, image: Image, limits: ImageLimits) -> PIL_Image.Image:
    """The picture, of which no pixel is decoded yet."""
    # A decompression bomb is refused by our own limit, with our own words.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL_Image.DecompressionBombWarning)
        picture = PIL_Image.open(file, formats=FORMATS)
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise BadRecord("huge image", f"{image} has {width} x {height} pixels; the limit is {limits.max_pixels}")
    return picture


def _orientation(picture: PIL_Image.Image) -> int:
    """Of a picture that is to be turned; 1 for one that is not, or does not say so in a form that can be read."""
    if picture.format == "TIFF" or "exif" not in picture.info:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on broken metadata
            return int(picture.getexif().get(ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, EOFError, struct.error):
        return 1


def _eight_bits(picture: PIL_Image.Image, image: Image) -> PIL_Image.Image:
    """Pillow would clip deeper pixels at 255 instead of scaling them."""
    if picture.mode.startswith("I;16"):
        return PIL_Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadRecord("unsupported image", f"{image} has pixels of 32 bits, whose range is unknown")
    return picture


def _all_bytes(image: Image, limits: ImageLimits) -> bytes:
    _check_bytes(image, limits)
    with image.open() as file:
        return file.read()


def _check_bytes(image: Image, limits: ImageLimits) -> None:
    if (size := image.size()) > limits.max_bytes:
        raise BadRecord("huge image", f"{image} has {size} bytes; the limit is {limits.max_bytes}")


@contextmanager
def _bad_if_broken(image: Image) -> Iterator[None]:
    """Whatever goes wrong with an image costs its record. A disk gives its errors a number, Pillow does not."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadRecord("not an image", f"{image} is none of {', '.join(FORMATS)}") from error
    except PIL_Image.DecompressionBombError as error:
        raise BadRecord("huge image", f"{image}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        missing = (isinstance(error, OSError) and error.errno is not None) or "null byte" in str(error)
        raise BadRecord("missing image" if missing else "corrupt image", f"{str(image)!r:.200}: {error}") from error
