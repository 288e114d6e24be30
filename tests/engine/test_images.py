"""Images: exact pixels, whole tiles; what is huge is refused unread, and nothing that a file holds raises anything but BadRecord."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL_Image
from PIL import ImageFile, ImageOps

from smalt.engine.data import retry
from smalt.engine.data.images import GREY, ImageLimits, decode_tiles, image_size
from smalt.engine.data.records import Image
from smalt.engine.errors import BadRecord
from smalt.model import TilingConfig
from smalt.model.tiling import Grid, ImageShape

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=10_000)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def _file(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = PIL_Image.fromarray(PIXELS)
PNG = _file(RGB)


def _decode(data, side=8, limits=LIMITS):
    """The one tile of an image, [H, W, 3]."""
    image = data if isinstance(data, Image) else Image(data, None)
    (tile,) = decode_tiles(image, Grid(1, 1), side, limits)
    return tile.transpose(1, 2, 0)


def _cause(image, limits=LIMITS):
    with pytest.raises(BadRecord) as caught:
        _decode(image, 8, limits)
    return caught.value.cause


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, depth, colour, rows=b"", extra=b""):
    """A PNG by hand: any header, whatever follows."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(rows)) + extra + _chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_pixels_are_exact_in_every_lossless_format(kind):
    tile = _decode(_file(RGB, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert tile.dtype == np.uint8
    np.testing.assert_array_equal(tile, PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_a_uniform_image_survives_the_lossy_formats(kind):
    data = _file(PIL_Image.new("RGB", (16, 16), (200, 100, 50)), kind)
    assert np.abs(_decode(data).astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(
    ("picture", "want"),
    [
        (RGB.convert("L"), np.asarray(RGB.convert("L"))[..., None].repeat(3, -1)),
        (RGB.convert("RGBA"), PIXELS),
        (RGB.convert("LA"), np.asarray(RGB.convert("L"))[..., None].repeat(3, -1)),
        (RGB.convert("P", palette=PIL_Image.Palette.ADAPTIVE), PIXELS),
        (RGB.convert("1"), np.asarray(RGB.convert("1"))[..., None].repeat(3, -1) * 255),
    ],
    ids=["grey", "RGBA", "grey with alpha", "palette", "bilevel"],
)
def test_other_modes_become_rgb(picture, want):
    np.testing.assert_array_equal(_decode(_file(picture)), want)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind):
    deep = np.array([[0, 300, 32768, 65535]] * 4, np.uint16)
    tile = _decode(_file(PIL_Image.fromarray(deep), kind), side=4)
    np.testing.assert_array_equal(tile[0], np.array([[0], [1], [128], [255]]).repeat(3, -1))


def test_sixteen_bits_of_colour_are_scaled():
    data = _png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0, 32768, 65535))
    assert _decode(data, side=1).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(dtype):
    assert _cause(_file(PIL_Image.fromarray(np.full((8, 8), 700, dtype)), "TIFF")) == "unsupported image"


@settings(max_examples=60)
@given(width=st.integers(1, 60), height=st.integers(1, 60), side=st.integers(1, 9))
def test_an_image_keeps_its_proportions_and_the_rest_is_grey(width, height, side):
    grid = ImageShape(side, 1, TilingConfig(max_rows=3, max_columns=3)).grid(width, height)
    picture = Image(_file(PIL_Image.new("RGB", (width, height), (10, 20, 30))), None)
    assert image_size(picture, LIMITS) == (width, height)
    tiles = decode_tiles(picture, grid, side, LIMITS)
    assert (tiles.dtype, tiles.shape) == (np.uint8, (grid.num_tiles, 3, side, side))
    covered = (tiles == np.array([10, 20, 30])[:, None, None]).all(1)
    assert (tiles.transpose(0, 2, 3, 1)[~covered] == GREY).all()
    # The tiles after the thumbnail are a canvas that the image fills in one direction, in its proportions to the pixel.
    cells = covered[grid.num_tiles > 1 :].reshape(grid.rows, grid.columns, side, side)
    canvas = cells.transpose(0, 2, 1, 3).reshape(grid.rows * side, -1)
    used = canvas.any(0).sum(), canvas.any(1).sum()
    assert canvas.sum() == used[0] * used[1]
    scale = min(canvas.shape[1] / width, canvas.shape[0] / height)
    assert abs(used[0] - max(width * scale, 1)) <= 0.5
    assert abs(used[1] - max(height * scale, 1)) <= 0.5


def test_tiles_come_row_by_row_after_the_thumbnail():
    corners = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    picture = PIL_Image.fromarray(corners.repeat(4, 0).repeat(4, 1))
    tiles = decode_tiles(Image(_file(picture), None), Grid(2, 3), 4, LIMITS)
    assert [sorted(set(tile.ravel().tolist())) for tile in tiles[1:]] == [[40 * i] for i in range(6)]
    assert len(set(tiles[0].ravel().tolist())) > 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_seen_as_the_camera_was_held(orientation):
    exif = PIL_Image.Exif()
    exif[0x0112] = orientation
    image = Image(_file(RGB.resize((8, 4)), "PNG", exif=exif), None)
    upright = ImageOps.exif_transpose(PIL_Image.open(image.open()))
    assert image_size(image, LIMITS) == upright.size
    tile = decode_tiles(image, Grid(1, 1), 8, LIMITS)[0].transpose(1, 2, 0)
    left, top = (8 - upright.width) // 2, (8 - upright.height) // 2
    np.testing.assert_array_equal(tile[top : 8 - top, left : 8 - left], np.asarray(upright))


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    rng = np.random.default_rng(0)
    smooth = PIL_Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((1200, 800), PIL_Image.Resampling.BICUBIC)
    limits = ImageLimits()
    as_jpeg, as_png = (Image(_file(smooth, kind), None) for kind in ("JPEG", "PNG"))
    pair = [decode_tiles(image, Grid(2, 3), 30, limits).astype(int) for image in (as_jpeg, as_png)]
    assert np.abs(pair[0] - pair[1]).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_file_is_corrupt(kind):
    data = _file(RGB.resize((32, 32)), kind)
    assert _cause(data[: len(data) // 2]) in ("corrupt image", "not an image")
    if kind == "PNG":
        assert _cause(data[: len(data) // 2]) == "corrupt image"


@pytest.mark.parametrize(
    "extra",
    [_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (2 << 20))), _chunk(b"iCCP", b"k\0\x05abc"), _chunk(b"pHYs", b"a")],
    ids=["text bomb", "unknown compression", "truncated chunk"],
)
def test_nonsense_after_the_pixels_is_corrupt(extra):
    assert _cause(_png(1, 1, 8, 2, b"\0abc", extra)) == "corrupt image"


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello, this is text", b"%PDF-1.4", PNG[1:], b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_bytes_that_are_no_image_are_named_so(data):
    assert _cause(data) == "not an image"


def test_formats_that_run_other_programs_are_not_even_tried():
    """Pillow would hand PostScript to Ghostscript."""
    assert _cause(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n") == "not an image"


def test_a_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(PNG)
    np.testing.assert_array_equal(_decode(Image(None, str(path))), PIXELS)


def test_a_text_named_png_is_no_image(tmp_path):
    path = tmp_path / "photo.png"
    path.write_text("404 not found")
    assert _cause(Image(None, str(path))) == "not an image"


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    path, tries = tmp_path / "photo.png", []
    path.write_bytes(PNG)

    def open_later(file, mode, whole=Path.open):
        tries.append(file)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return whole(file, mode)

    monkeypatch.setattr(Path, "open", open_later)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.01, 0.02))
    assert (_decode(Image(None, str(path))) == PIXELS).all()
    assert len(tries) == 3


@pytest.mark.parametrize("name", ["gone.png", ".", "a\0b.png", "x" * 5000, "pipe"])
def test_a_path_that_is_no_file_is_missing(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    assert _cause(Image(None, str(tmp_path / name))) == "missing image"


@pytest.fixture
def undecoded(monkeypatch):
    """From here on, decoding any pixel fails the test."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("side", [101, 9_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    bomb = _png(side, side, 8, 2)
    assert len(bomb) < 100
    assert _cause(bomb) == "huge image"


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_too_many_pixels_are_refused_in_every_format(kind):
    assert _cause(_file(PIL_Image.new("L", (201, 50)), kind)) == "huge image"


def test_a_size_at_the_limit_is_accepted():
    assert _decode(_file(PIL_Image.new("L", (200, 50)))).shape == (8, 8, 3)
    assert _decode(PNG, limits=ImageLimits(max_bytes=len(PNG))).shape == (8, 8, 3)


def test_too_many_bytes_are_refused(tmp_path):
    limits = ImageLimits(max_bytes=len(PNG) - 1)
    path = tmp_path / "large.png"
    path.write_bytes(PNG)
    assert _cause(PNG, limits) == "huge image"
    assert _cause(Image(None, str(path)), limits) == "huge image"


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert _cause(Image(None, str(path)), ImageLimits()) == "huge image"


SEEDS = [PNG, _file(RGB.convert("P")), *(_file(RGB, kind) for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF"))]
SEEDS += [_file(RGB, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")]


def _decodes_or_is_bad(data):
    try:
        tile = _decode(data)
    except BadRecord:
        return
    assert tile.shape == (8, 8, 3)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_bad_record(data):
    _decodes_or_is_bad(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(len(SEEDS)))
@settings(max_examples=60)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=6),
    end=st.floats(0.1, 1),
)
def test_damaged_files_raise_nothing_but_bad_record(seed, edits, end):
    data = bytearray(SEEDS[seed])
    for place, new, removed in edits:
        at = int(place * len(data))
        data[at : at + removed] = new
    _decodes_or_is_bad(bytes(data[: int(end * len(data))] if end < 0.8 else data))
