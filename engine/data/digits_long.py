"""Writes the data of the long-context run: rows of coloured handwritten digits, and the question which digit has a colour.

One digit of a row has the colour that is asked for, anywhere in it; all others have other colours. A row is as long as its source
says, up to eight times what the first stages train on.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .chat import PLACEHOLDER
from .digits import HELD_OUT_SHARE, SCHEMA, augment, png, read_digits, train_tokenizer

LENGTH = 64
"""Tokens of the longest document of the first stages."""
TIMES = (1, 8)
"""How many times as long the held-out documents are, one file each."""
TEMPLATE_TOKENS = 12
"""Of a document, what is no image: question, thought, answer and what the chat template adds."""
VARIANTS = 6  # augmented copies of each training image
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "purple": (1, 0, 1), "cyan": (0, 1, 1),
    "white": (1, 1, 1), "orange": (1, 0.5, 0),
}  # fmt: skip


def write_long_digits(folder: Path, records: int = 8000, questions: int = 100, seed: int = 0) -> dict[str, int]:
    """Write ``train/few.parquet``, ``short`` and ``long``, ``held_out/x1.parquet`` and ``x8``, and ``tokenizer.json``; returns
    records by file.

    few: rows of one to four digits; short: up to LENGTH tokens, short rows more often than long ones; long: seven to eight times that;
    held-out rows are as long as fits. records: of few and of short, of long a fortieth of them; questions: of each held-out file. The
    same arguments write the same bytes of records.
    """
    pixels, labels = read_digits()
    folder.mkdir(parents=True, exist_ok=True)  # before what takes seconds
    rng = np.random.default_rng(seed)
    held_out, train = np.split(rng.permutation(len(labels)), [int(HELD_OUT_SHARE * len(labels))])
    pools = {
        "train": _Pool(augment(np.repeat(pixels[train], VARIANTS, axis=0), rng), np.repeat(labels[train], VARIANTS)),
        "held_out": _Pool(pixels[held_out], labels[held_out]),
    }
    short, long = (times * LENGTH - TEMPLATE_TOKENS for times in (1, max(TIMES)))
    files: dict[str, tuple[int, Callable[[], int]]] = {
        "train/few": (records, lambda: int(rng.integers(1, 5))),
        "train/short": (records, lambda: int(math.exp(rng.uniform(0, math.log(short + 1))))),
        "train/long": (-(-records // 40), lambda: int(rng.integers(long * 7 // 8, long + 1))),
        **{f"held_out/x{times}": (questions, functools.partial(int, times * LENGTH - TEMPLATE_TOKENS)) for times in TIMES},
    }
    written = {}
    for name, (count, draw) in files.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        rows = [_record(pools[path.parent.name], draw(), rng) for _ in range(count)]
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=100)
        written[str(path)] = count
    train_tokenizer([f"{colour}?{colour}7" for colour in COLOURS]).save(str(folder / "tokenizer.json"))
    (folder / "digits_long.json").write_text(json.dumps({"seed": seed, "records": records, "questions": questions}))
    return written


class _Pool:
    """Digits of one split. pixels: float [N, 8, 8] from 0 to 16; labels: [N]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels
        self.coloured = functools.cache(self._coloured)

    def _coloured(self, number: int, colour: str) -> bytes:
        return png(self.pixels[number][..., None] * np.array(COLOURS[colour]))


def _record(pool: _Pool, count: int, rng: np.random.Generator) -> dict:
    """A question about a row of so many digits."""
    chosen, at = rng.integers(len(pool.labels), size=count), int(rng.integers(count))
    asked, *others = rng.permutation(list(COLOURS)).tolist()
    colours = [asked if i == at else others[number] for i, number in enumerate(rng.integers(len(others), size=count))]
    digit = int(pool.labels[chosen[at]])
    return {
        "messages": [
            {"role": "user", "content": PLACEHOLDER * count + f"{asked}?"},
            {"role": "assistant", "content": f"<think>{asked}{digit}</think>{digit}"},
        ],
        "images": [{"bytes": pool.coloured(int(i), colour), "path": None} for i, colour in zip(chosen, colours, strict=True)],
    }
