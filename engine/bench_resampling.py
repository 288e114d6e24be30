"""What resampling saves: tokens to the same held-out accuracy on a mixture of an easy, a hard and a noisy source.

The sources are questions about handwritten digits: to read one, to name the larger of two, and to add two, with an answer that is
drawn at random, in the held-out records as in those of training, so that nothing can be learned from it. Half of all records are such
noise. Two runs of a seed have the same model, data and learning rate; one draws all records alike, the other resamples by the rule of
:mod:`.data.resampling`, which is told nothing of the sources. Target and stop are fixed: a run ends at the first measurement that
reaches the accuracy, or after its steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from smalt.parallel import PackShard, alone

from .config import RunConfig, parse_config
from .data.chat import PLACEHOLDER
from .data.digits import HELD_OUT_SHARE, SCHEMA, VARIANTS, augment, png, read_digits, train_tokenizer
from .resampler import LN2
from .stage import Stage
from .trainer import open_data

HELD_OUT = 200  # records of each source
# Records of training of each source, by which they are mixed.
RECORDS = {"easy": 5000, "hard": 5000, "noisy": 10_000}
# Of each source: its question, the digits of one, and the answer; what is drawn at random is drawn from the generator.
SOURCES: dict[str, tuple[str, int, Callable[[list[int], np.random.Generator], int]]] = {
    "easy": ("which digit?", 1, lambda digits, rng: digits[0]),
    "hard": ("which digit is larger?", 2, lambda digits, rng: max(digits)),
    "noisy": ("what is the sum?", 2, lambda digits, rng: int(rng.integers(19))),
}
LEARNED = ("easy", "hard")
# Steps of a run at most, between measurements of the accuracy, and the mean accuracy on what can be learned at which it ends.
STEPS, EVERY, TARGET = 1500, 20, 0.9
RESAMPLING = {"every": 10, "lag": 2, "measurements": 4, "floor": 0.05}


@dataclass(frozen=True)
class Outcome:
    """One run. tokens: until the accuracy was reached, None where it was not; measured: held-out tokens that resampling has looked at
    meanwhile; drawn: share of the documents by source; curve: of (tokens, mean accuracy) at each measurement."""

    seed: int
    resampled: bool
    tokens: int | None
    measured: int
    drawn: dict[str, float]
    curve: list[tuple[int, float]]


def bench_resampling(
    seeds: int, steps: int = STEPS, target: float = TARGET, progress: Callable[[str], None] = lambda said: None
) -> list[Outcome]:
    """Both runs of each of the seeds 0, 1, ... Raises UserError where scikit-learn, which has the digits, is missing."""
    found = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_sources(Path(folder), seed)
            for resampled in (False, True):
                found.append(tokens_to_accuracy(experiment(Path(folder), seed, steps, resampled), target))
                progress(_said(found[-1]))
    return found


def write_sources(folder: Path, seed: int) -> None:
    """Write {train,held_out}/SOURCE.parquet and the tokenizer; no image of a held-out record is among those of training."""
    pixels, labels = read_digits()
    rng = np.random.default_rng(seed)
    held_out, train = np.split(rng.permutation(len(labels)), [int(HELD_OUT_SHARE * len(labels))])
    shown = {"train": augment(np.repeat(pixels[train], VARIANTS, axis=0), rng), "held_out": pixels[held_out]}
    answers = {"train": np.repeat(labels[train], VARIANTS), "held_out": labels[held_out]}
    for split, images in shown.items():
        (folder / split).mkdir(parents=True)
        pngs = [png(image) for image in images]
        for source, (question, count, answer) in SOURCES.items():
            rows = []
            for chosen in rng.integers(len(pngs), size=(RECORDS[source] if split == "train" else HELD_OUT, count)):
                said = str(answer([int(answers[split][i]) for i in chosen], rng))
                asked = {"role": "user", "content": PLACEHOLDER * count + question}
                images_ = [{"bytes": pngs[i], "path": None} for i in chosen]
                rows.append({"messages": [asked, {"role": "assistant", "content": said}], "images": images_})
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / split / f"{source}.parquet")
    train_tokenizer([question for question, _, _ in SOURCES.values()] + list("0123456789")).save(str(folder / "tokenizer.json"))


def experiment(folder: Path, seed: int, steps: int, resampled: bool) -> RunConfig:
    """The run over the sources in ``folder``."""
    stage = {
        "steps": steps, "sequence_length": 512, "mixture": RECORDS,
        "resampling": RESAMPLING if resampled else {}, "trainable": {"vision": 1.0, "projector": 1.0, "language": 1.0},
        "learning_rate": 3e-3, "warmup_steps": 20, "schedule": "constant",
    }  # fmt: skip
    model = {
        "init_std": 0.04,
        "vision": {"num_layers": 1, "width": 64, "num_heads": 2, "ffn": 128, "patch": 4, "tile": 8},
        "language": {
            "num_layers": 2, "width": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "ffn": 192, "vocabulary": 320,
            "rope_theta": 10000.0,
        },
    }  # fmt: skip
    data = {
        "tokenizer": folder / "tokenizer.json", "packs_per_step": 1, "window": 32, "prefetch": 1, "workers": 0,
        "validation_documents": HELD_OUT,
        "sources": {source: str(folder / "train" / f"{source}.parquet") for source in SOURCES},
        "validation": {source: str(folder / "held_out" / f"{source}.parquet") for source in SOURCES},
    }  # fmt: skip
    values = {"seed": seed, "device": "cpu", "model": model, "data": data, "stages": {"mix": stage}}
    return parse_config({**values, "optimizer": {"weight_decay": 0.01, "betas": [0.9, 0.98]}}, "bench")


def tokens_to_accuracy(config: RunConfig, target: float) -> Outcome:
    """Train until the mean accuracy on the held-out records of what can be learned reaches the target, or the steps are done."""
    stage = Stage(config, "mix", alone(torch.device("cpu")), open_data(config), None, None)
    tokens, measured, reached = 0, 0, False
    drawn, curve = dict.fromkeys(SOURCES, 0), list[tuple[int, float]]()
    held_out = sum(int((one.kv_start < len(one.tokens)).sum()) for packs in stage.validation.packs.values() for one in packs)
    try:
        for batch in stage.batches():
            stage.train_step(batch)
            tokens += batch.tokens
            drawn = {source: count + batch.documents[source] for source, count in drawn.items()}
            if stage.resampler.due(stage.done):
                stage.resample(stage.validate())
                measured += held_out
            if stage.done % EVERY == 0:
                curve.append((tokens, float(np.mean([accuracy(stage, source) for source in LEARNED]))))
                reached = curve[-1][1] >= target
            if reached:
                break
    finally:
        stage.close()
    shares = {source: count / sum(drawn.values()) for source, count in drawn.items()}
    return Outcome(config.seed, config.stages["mix"].resampling.every > 0, tokens if reached else None, measured, shares, curve)


def accuracy(stage: Stage, source: str) -> float:
    """Share of the held-out records whose answer greedy decoding gives with more than half of the probability for each token."""
    solved = []

    def see(nll: Tensor, shard: PackShard) -> Tensor:
        missed = (shard.loss_weight > 0) & ~(nll < LN2)
        filled = shard.kv_start < len(nll)
        documents = shard.documents[filled]
        counts = torch.zeros(int(documents.max()) + 1).index_add_(0, documents, missed[filled].float())
        solved.append(counts == 0)
        return nll.sum()

    stage.model.evaluate(stage.validation.packs[source], see, 1)
    return float(torch.cat(solved).float().mean())


def resampling_table(found: Sequence[Outcome], target: float = TARGET) -> Table:
    """Each seed's tokens, what resampling saved of them, and the held-out tokens that it looked at for that."""
    table = Table(title=f"Tokens to a held-out accuracy of {target:.0%}, and the share of the documents by source")
    for column in ("seed", "weights", "tokens", "saved", "held out", *SOURCES):
        table.add_column(column, justify="left" if column == "weights" else "right")
    plain = {one.seed: one.tokens for one in found if not one.resampled}
    for one in found:
        before = plain[one.seed]
        saved = f"{1 - one.tokens / before:.0%}" if one.resampled and one.tokens and before else ""
        tokens = f"{one.tokens:,}" if one.tokens else f"not in {one.curve[-1][0]:,}"
        table.add_row(str(one.seed), _name(one), tokens, saved, f"{one.measured:,}", *(f"{share:.0%}" for share in one.drawn.values()))
    return table


def resampling_json(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def _name(outcome: Outcome) -> str:
    return "resampled" if outcome.resampled else "as records are"


def _said(outcome: Outcome) -> str:
    tokens, reached = outcome.curve[-1]
    return f"seed {outcome.seed}, {_name(outcome)}: {reached:.1%} after {tokens:,} tokens"
