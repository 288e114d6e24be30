"""How fast records become packs, by worker processes, and how long training waits for them.

The records are made here: questions about photographs, stored as JPEG of many sizes, so that what is measured is what a run over
pictures does: reading, tokens, decoding, cutting into tiles, packing. A step of training is a pause: a GPU leaves the processor free.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image as PIL_Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from smalt.model import PRESETS
from smalt.model.cost import model_cost
from smalt.model.tiling import ImageShape
from smalt.parallel import alone
from smalt.parallel.channel import Channel
from smalt.profiling.tables import print_table

from .data.chat import ChatEncoder
from .data.loader import Loader, Packing, Place
from .data.reading import Reader
from .data.sources import open_sources
from .data.stream import Mix, Presentation, SampleStream

# Of the pictures, in pixels: a thumbnail from the web to a photograph of a phone.
SIZES = (320, 240), (640, 480), (1024, 768), (1280, 960), (768, 1536), (2000, 1500), (3000, 2000)


@dataclass(frozen=True)
class Rate:
    """What a loader makes in a second as fast as it can; wait: seconds that a step of training waits for its data, by the seconds that
    it takes."""

    workers: int
    samples: float
    tiles: float
    megapixels: float
    wait: dict[float, float]


def write_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """A Parquet file of ``count`` questions about a picture each."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        coarse = PIL_Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), PIL_Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        question, answer = (
            {"role": "user", "content": "<image>What is shown?"},
            {"role": "assistant", "content": "1 2 3 " * (1 + i % 40)},
        )
        rows.append({"messages": [question, answer], "images": [file.getvalue()]})
    path = folder / "pictures.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=16)
    return path


def bench_data(
    pictures: Path, tokenizer: Path, workers: Sequence[int], *, length: int, packs: int, steps: int, seconds: Sequence[float]
) -> list[Rate]:
    """Rates by number of workers. length: of a pack; packs: of a step; seconds: that a step of training takes."""
    return [_rate(pictures, tokenizer, count, length, packs, steps, seconds) for count in workers]


def _rate(pictures: Path, tokenizer: Path, workers: int, length: int, packs: int, steps: int, seconds: Sequence[float]) -> Rate:
    model = PRESETS["bluelm_3b"]
    encoder = ChatEncoder(Tokenizer.from_file(str(tokenizer)), ImageShape.of(model))
    sources = open_sources({"pictures": pictures})
    stream = SampleStream({"pictures": len(sources["pictures"])}, Presentation(0.0, 0.0), seed=0)
    stream.change(0, Mix({"pictures": 1}))
    packing = Packing(length, packs, 64, "skip", model.image_attention, model.vision.tile, model_cost(model))

    @contextmanager
    def loader() -> Iterator[Loader]:
        exchange = Channel(alone(torch.device("cpu")))
        made = Loader(stream, Reader(sources, encoder), packing, Place(0, 1, 0, 1), exchange, num_workers=workers, prefetch=4)
        try:
            for _ in range(4):  # what is made ahead, and the start of the workers
                next(made)
            yield made
        finally:
            made.close()

    with loader() as fast:
        start, batches = time.perf_counter(), [next(fast) for _ in range(steps)]
        taken = time.perf_counter() - start
    waits = {}
    for pause in seconds:
        waited = 0.0
        with loader() as slow:
            for _ in range(steps):
                time.sleep(pause)
                start = time.perf_counter()
                next(slow)
                waited += time.perf_counter() - start
        waits[pause] = waited / steps
    tiles = sum(len(one.tiles) for batch in batches for one in batch.packs)
    samples = sum(len(batch.samples) for batch in batches)
    return Rate(workers, samples / taken, tiles / taken, tiles * model.vision.tile**2 / 1e6 / taken, waits)


def print_rates(rates: Sequence[Rate], length: int, packs: int) -> None:
    table = Table(title=f"Data of steps of {packs} x {length:,} tokens")
    pauses = list(rates[0].wait)
    for column in ("workers", "samples/s", "tiles/s", "megapixels/s", *(f"wait of {pause:g} s steps, ms" for pause in pauses)):
        table.add_column(column, justify="right")
    for rate in rates:
        waits = (f"{1e3 * rate.wait[pause]:.0f}" for pause in pauses)
        table.add_row(str(rate.workers), f"{rate.samples:.1f}", f"{rate.tiles:.1f}", f"{rate.megapixels:.1f}", *waits)
    table.caption = "0 workers: the thread of the loader; wait: mean time that a step of training of that length waits for its data"
    print_table(Console(highlight=False), table)


def rates_json(rates: Sequence[Rate]) -> list[dict[str, Any]]:
    return [asdict(rate) for rate in rates]
