"""Resampling in a run: what training measures, the weights that it posts to the loader, and what of it a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from smalt.parallel import PackShard

from .data.loader import StepBatch
from .data.mixture import DIGITS, Mixture, Resampled, WindowWeights
from .data.resampling import Streaks, source_factors
from .data.stream import as_bits
from .sections import ResamplingConfig

LN2 = math.log(2.0)


class Resampler:
    """Of one stage. saved: of :meth:`state`, or None where the stage begins; done: its steps that are done."""

    def __init__(self, config: ResamplingConfig, mixture: Mixture, sizes: Mapping[str, int], done: int, saved: Any = None):
        saved = saved or {"sizes": {}, "lows": {}, "streaks": {}, "posts": {}}
        self.config, self.mixture, self.sizes = config, mixture, dict(sizes)
        self.lows: dict[str, list[float]] = {name: list(saved["lows"].get(name, [])) for name in sizes}
        self.streaks = Streaks(sizes if config.visits else {}, saved["streaks"] if config.visits else None)
        posts = {int(step): self._usable(Resampled(**post), saved["sizes"]) for step, post in saved["posts"].items()}
        self.weights = WindowWeights(mixture, config.every, config.lag, posts, done)

    def _usable(self, post: Resampled, sizes: Mapping[str, int]) -> Resampled:
        """Without what is of a source that is gone, or of records that have changed. sizes: of the sources when it was posted."""
        factors = {name: factor for name, factor in post.factors.items() if name in self.sizes}
        thinned = {name: some for name, some in post.thinned.items() if name in self.sizes and sizes.get(name) == self.sizes[name]}
        return replace(post, factors=factors, thinned=thinned)

    def due(self, done: int) -> bool:
        """Whether new weights are made after step ``done``, at the end of a stage none."""
        return self.config.every > 0 and done % self.config.every == 0 and done < self.mixture.steps

    def unsolved(self, batch: StepBatch, device: torch.device) -> UnsolvedTokens | None:
        return UnsolvedTokens(batch, device) if self.config.visits else None

    def see(self, batch: StepBatch, unsolved: list[float]) -> None:
        """unsolved: of each document of the step, over all ranks, how many target tokens were not the likeliest by far."""
        for sample, count in zip(batch.samples, unsolved, strict=True):
            self.streaks.see(sample.source, sample.record, count == 0)

    def resample(self, done: int, losses: Mapping[str, float]) -> dict[str, float]:
        """Post the weights that follow from all that was measured up to step ``done``. losses: held-out, by source, the same on every
        rank; to three digits after the point, so that layouts, whose losses differ in their last bits, hardly ever differ in what
        follows. Returns what is logged."""
        newest = self.config.measurements
        for name, lows in self.lows.items():
            known = [*lows, *([round(losses[name], 3)] if math.isfinite(losses[name]) else [])]
            self.lows[name] = [*lows, min(known)][-newest:] if known else []
        factors = source_factors(self.lows, self.mixture.at(done), self.config.floor)
        thinned = self.streaks.thinned(self.config.visits) if self.config.visits else {}
        self.weights.post(done, Resampled(factors, {name: as_bits(some) for name, some in thinned.items()}, self.config.kept))
        return {
            **{f"resampling/factor/{name}": factor / DIGITS for name, factor in factors.items()},
            **{f"resampling/thinned/{name}": int(some.sum()) for name, some in thinned.items()},
        }

    def state(self) -> dict[str, Any]:
        """For JSON: what is measured, and what is posted and may yet count."""
        posts = {str(step): asdict(post) for step, post in self.weights.posts.items()}
        return {"sizes": self.sizes, "lows": self.lows, "streaks": self.streaks.state(), "posts": posts}


class UnsolvedTokens:
    """Counts, while the losses of a step are made, the target tokens of each document whose probability is at most one half.

    counts: float64 by document of the step; the sum over the world is above 0 for those that are not solved.
    """

    def __init__(self, batch: StepBatch, device: torch.device):
        self.counts = torch.zeros(len(batch.samples), dtype=torch.float64, device=device)
        self.firsts = iter(batch.firsts)

    def see(self, nll: Tensor, shard: PackShard) -> None:
        """The packs of this replica, in their order. nll: nats, of the rows of the shard."""
        missed = (shard.loss_weight > 0) & ~(nll.detach() < LN2)
        document = (next(self.firsts) + shard.documents).where(missed, 0)
        self.counts.index_add_(0, document, missed.double())
