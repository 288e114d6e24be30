"""Writes the data of the default run: questions about the 1,797 handwritten digits that scikit-learn ships.

The digits are split by image, so that no image of the evaluation was ever trained on. Training images are shifted, rotated
and made noisy. The records are ordinary chat messages with images, in Parquet; nothing else in Smalt knows that they are digits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from .chat import PLACEHOLDER, SPECIAL_TOKENS

HELD_OUT_SHARE = 0.2
VARIANTS = 12  # augmented copies of each training image
VOCABULARY = 320
SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


@dataclass(frozen=True)
class Task:
    """A kind of question about a row of digits. ``thoughts``: worked solutions, the terse one first."""

    questions: tuple[str, ...]
    answer: Callable[[list[int]], str]
    thoughts: tuple[Callable[[list[int]], str], ...]
    counts: tuple[int, ...]  # how many images a training question has, drawn evenly from these
    held_out_counts: tuple[int, ...]


def _spelled(digits: list[int]) -> str:
    return ",".join(map(str, digits))


def _running_sums(digits: list[int]) -> str:
    return ",".join(str(s) for s in np.cumsum(digits)[1:])


def _sum_steps(digits: list[int]) -> str:
    """From the sum of the first two, one addition of two digits at a time: 5, 7, 8 gives ``12,12+8:2+8=10,20``."""
    total = digits[0] + digits[1]
    steps = [str(total)]
    for d in digits[2:]:
        ones, after = total % 10, total + d
        steps.append(f"{total}+{d}={after}" if total < 10 else f"{total}+{d}:{ones}+{d}={ones + d},{after}")
        total = after
    return ",".join(steps)


def _largest_steps(digits: list[int]) -> str:
    best, steps = digits[0], []
    for d in digits[1:]:
        steps.append(f"{best}<{d}" if best < d else f"{best}>={d}")
        best = max(best, d)
    return ",".join(steps)


TASKS = {
    "read": Task(
        questions=("read the digits", "which digits?"),
        answer=lambda d: "".join(map(str, d)),
        thoughts=(_spelled, lambda d: ",".join(f"{i}:{x}" for i, x in enumerate(d, 1))),
        counts=(1, 2, 3, 4),
        held_out_counts=(1, 2, 3, 4),
    ),
    "sum": Task(
        questions=("add the digits", "what is the sum?"),
        answer=lambda d: str(sum(d)),
        thoughts=(_running_sums, _sum_steps, _sum_steps, _sum_steps),
        counts=(2, 3, 3, 4),
        held_out_counts=(3,),
    ),
    "largest": Task(
        questions=("the largest digit?", "which digit is largest?"),
        answer=lambda d: str(max(d)),
        thoughts=(_spelled, lambda d: f"{_spelled(d)}:{_largest_steps(d)}"),
        counts=(2, 3, 4),
        held_out_counts=(2, 3, 4),
    ),
}


def write_digits(folder: Path, records: int = 20_000, questions: int = 500, seed: int = 0) -> dict[str, int]:
    """Write ``train/TASK.parquet``, ``held_out/TASK.parquet``, ``train/text.parquet``, which has the sums without images, and
    ``tokenizer.json`` into ``folder``; returns records by file.

    ``examples/0.png`` to ``9.png`` are held-out digits, to ask a trained model about.

    records: training records a task; questions: held-out records a task. The same arguments write the same bytes of records.
    """
    pixels, labels = read_digits()
    folder.mkdir(parents=True, exist_ok=True)  # before what takes seconds
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    held_out, train = np.split(order, [int(HELD_OUT_SHARE * len(labels))])
    augmented = augment(np.repeat(pixels[train], VARIANTS, axis=0), rng)
    pools = {
        "train": ([png(p) for p in augmented], np.repeat(labels[train], VARIANTS)),
        "held_out": ([png(p) for p in pixels[held_out]], labels[held_out]),
    }
    written, texts = {}, list[str]()
    for split, (pngs, pool_labels) in pools.items():
        (folder / split).mkdir(exist_ok=True)
        for name, task in TASKS.items():
            counts = task.counts if split == "train" else task.held_out_counts
            rows = [_record(task, counts, pngs, pool_labels, rng) for _ in range(records if split == "train" else questions)]
            path = folder / split / f"{name}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=1000)
            written[str(path)] = len(rows)
            texts += [m["content"].replace(PLACEHOLDER, "") for row in rows[:1000] for m in row["messages"]]
    path = folder / "train" / "text.parquet"
    # Numbers of its own: those of the tasks stay what they were before there was text.
    text_rng = np.random.default_rng([seed, 1])
    rows = [_text_record(TASKS["sum"], text_rng) for _ in range(records)]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=1000)
    written[str(path)] = len(rows)
    _write_examples(folder / "examples", *pools["held_out"])
    train_tokenizer(texts).save(str(folder / "tokenizer.json"))
    (folder / "digits.json").write_text(json.dumps({"seed": seed, "records": records, "questions": questions}))
    return written


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, float [1797, 8, 8] from 0 to 16, and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install 'smalt[digits]'") from error
    data = load_digits()
    return data.images, data.target


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate by up to 15 degrees, shift by up to 0.8 pixels, scale by up to 10%, and add noise; bilinear, all images at once."""
    n, size = len(pixels), pixels.shape[-1]
    angle, scale = np.deg2rad(rng.uniform(-15, 15, n)), rng.uniform(0.9, 1.1, n)
    shift = rng.uniform(-0.8, 0.8, (2, n))
    centre = (size - 1) / 2
    y, x = np.meshgrid(np.arange(size) - centre, np.arange(size) - centre, indexing="ij")
    cos, sin = (np.cos(angle) * scale)[:, None, None], (np.sin(angle) * scale)[:, None, None]
    source_y = cos * y - sin * x + centre + shift[0][:, None, None]
    source_x = sin * y + cos * x + centre + shift[1][:, None, None]
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    source_y, source_x = np.clip(source_y + 2, 0, size + 2.999), np.clip(source_x + 2, 0, size + 2.999)
    top, left = source_y.astype(int), source_x.astype(int)
    fy, fx = source_y - top, source_x - left
    image = np.arange(n)[:, None, None]
    upper = padded[image, top, left] * (1 - fx) + padded[image, top, left + 1] * fx
    lower = padded[image, top + 1, left] * (1 - fx) + padded[image, top + 1, left + 1] * fx
    moved = upper * (1 - fy) + lower * fy
    return np.clip(moved + rng.normal(0, 0.6, moved.shape), 0, 16)


def png(pixels: np.ndarray) -> bytes:
    """A picture, [S, S] grey or [S, S, 3] of colours, from 0 to 16."""
    buffer = io.BytesIO()
    Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _write_examples(folder: Path, pngs: list[bytes], labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for digit in range(10):
        (folder / f"{digit}.png").write_bytes(pngs[int(np.flatnonzero(labels == digit)[0])])


def _record(task: Task, counts: tuple[int, ...], pngs: list[bytes], labels: np.ndarray, rng: np.random.Generator) -> dict:
    chosen = rng.integers(len(pngs), size=counts[rng.integers(len(counts))])
    digits = [int(d) for d in labels[chosen]]
    images = [{"bytes": pngs[i], "path": None} for i in chosen]
    return {"messages": _messages(task, digits, PLACEHOLDER * len(digits), rng), "images": images}


def _text_record(task: Task, rng: np.random.Generator) -> dict:
    """The same question about digits that are written out."""
    digits = rng.integers(10, size=task.counts[rng.integers(len(task.counts))]).tolist()
    return {"messages": _messages(task, digits, f"{_spelled(digits)}:", rng), "images": []}


def _messages(task: Task, digits: list[int], shown: str, rng: np.random.Generator) -> list[dict[str, str]]:
    question = task.questions[rng.integers(len(task.questions))]
    thought = task.thoughts[rng.integers(len(task.thoughts))](digits)
    return [
        {"role": "user", "content": shown + question},
        {"role": "assistant", "content": f"<think>{thought}</think>{task.answer(digits)}"},
    ]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE that keeps every digit and sign a token of its own, so that arithmetic is over digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
