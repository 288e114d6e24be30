"""Images to tiles, with limits: nothing large is decoded, and nothing that is not an image is trusted."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PIL_Image
from PIL import UnidentifiedImageError

from ..errors import BadRecord
from .records import Image
from .retry import with_retries

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


@dataclass(frozen=True)
class ImageLimits:
    """Largest file in bytes and largest decoded size in pixels that are accepted."""

    max_bytes: int = 32 << 20
    max_pixels: int = 64 << 20


def decode_tile(image: Image, side: int, limits: ImageLimits) -> np.ndarray:
    """One image as one square tile: float32 [3, side, side], RGB in [-1, 1] (SigLIP's normalisation).

    Raises BadRecord for a missing, huge, corrupt or non-image file; size is read from the header, before any pixel is decoded.
    """
    data = _read(image, limits)
    try:
        # A decompression bomb is refused by our own limit below, with our own words.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL_Image.DecompressionBombWarning)
            picture = PIL_Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > limits.max_pixels:
            raise BadRecord("huge image", f"{image} has {width} x {height} pixels; the limit is {limits.max_pixels}")
        rgb = _eight_bits(picture, image).convert("RGB")
        if rgb.size != (side, side):
            rgb = rgb.resize((side, side), PIL_Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:
        raise BadRecord("not an image", f"{image} is none of {', '.join(FORMATS)}") from error
    except PIL_Image.DecompressionBombError as error:
        raise BadRecord("huge image", f"{image}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken files
        raise BadRecord("corrupt image", f"{image}: {error}") from error
    return np.asarray(rgb, np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def _eight_bits(picture: PIL_Image.Image, image: Image) -> PIL_Image.Image:
    """Pillow would clip deeper pixels at 255 instead of scaling them."""
    if picture.mode.startswith("I;16"):
        return PIL_Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise BadRecord("unsupported image", f"{image} has pixels of 32 bits, whose range is unknown")
    return picture


def _read(image: Image, limits: ImageLimits) -> bytes:
    if image.data is not None:
        size, data = len(image.data), image.data
    else:
        assert image.path is not None
        path = Path(image.path)
        try:
            if path.exists() and not path.is_file():
                raise BadRecord("missing image", f"{image} is not a file")
            size = with_retries(path.stat).st_size
            data = with_retries(path.read_bytes) if size <= limits.max_bytes else b""
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise BadRecord("missing image", f"{str(image)!r:.200}: {error}") from error
    if size > limits.max_bytes:
        raise BadRecord("huge image", f"{image} has {size} bytes; the limit is {limits.max_bytes}")
    return data
