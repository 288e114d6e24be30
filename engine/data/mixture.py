"""How much of each source a stage reads: weights that may follow from epochs, move over the stage, or be resampled."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from ..sections import StageConfig, weights_of
from .stream import Mix

# Weights that are computed while a stage runs have three digits, so that every layout has the same ones.
DIGITS = 1000
# Steps of a stage at which moving weights are looked at, for the mean of them.
POINTS = 100
# Seconds after which who waits for weights looks up.
PATIENCE = 0.1


@dataclass(frozen=True)
class Mixture:
    """Weights at the first and at the last step of a stage, linear between them, of sources that have one at either. ends: where in
    its own order a source is used up, of those that have an end."""

    start: dict[str, Fraction]
    end: dict[str, Fraction]
    steps: int = 1
    ends: dict[str, int] = field(default_factory=dict)

    def at(self, step: int) -> dict[str, Fraction]:
        """While step ``step`` of the stage is planned, counted from 1; after the last as in the last."""
        done = Fraction(min(step, self.steps) - 1, max(1, self.steps - 1))
        return {name: first + (self.end[name] - first) * done for name, first in self.start.items()}

    def mix(self, step: int) -> Mix:
        """The same for the stream: exact where weights stay as they are, to three digits where they move."""
        at = self.at(step)
        return Mix(whole(at) if self.start == self.end else self.rounded(at), self.ends)

    def rounded(self, weights: Mapping[str, Fraction]) -> dict[str, int]:
        """To three digits. Where sources end, one without a weight at this step has the smallest: it takes over from the others."""
        return (dict.fromkeys(self.start, 1) if self.ends else {}) | thousandths(weights)

    def shares(self) -> dict[str, float]:
        """Of the samples of the whole stage, where no source is used up."""
        steps = [self.at(1 + i * self.steps // POINTS) for i in range(POINTS)]
        return {name: sum(float(at[name] / sum(at.values())) for at in steps) / len(steps) for name in self.start}


def mixture_of(stage: StageConfig, sizes: Mapping[str, int]) -> Mixture:
    """sizes: records of each source that the stage reads. A source ends after whole records; it has one at least."""
    ends = {name: max(1, round(times * sizes[name])) for name, times in stage.epochs.items()}
    if not stage.mixture:
        weights = {name: Fraction(end) for name, end in ends.items()}
        return Mixture(weights, weights, stage.steps, ends)
    start, end = ({name: written(weights_of(stage.mixture[name])[i]) for name in stage.sources} for i in (0, 1))
    return Mixture(start, end, stage.steps, ends)


def fixed_mix(weights: Mapping[str, float]) -> Mix:
    """Of weights that stay as they are."""
    return Mix(whole({name: written(weight) for name, weight in weights.items()}))


def written(weight: float) -> Fraction:
    """As the config has it: 0.1 is a tenth."""
    return Fraction(repr(float(weight)))


def whole(weights: Mapping[str, Fraction]) -> dict[str, int]:
    """The smallest whole numbers in exactly these proportions, without zeros."""
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    numbers = {name: int(weight * scale) for name, weight in weights.items() if weight}
    divisor = math.gcd(*numbers.values())
    return {name: number // divisor for name, number in numbers.items()}


def thousandths(weights: Mapping[str, Fraction]) -> dict[str, int]:
    """Shares rounded to three digits, without zeros; what has any weight keeps the smallest one."""
    total = sum(weights.values())
    return {name: max(1, round(DIGITS * weight / total)) for name, weight in weights.items() if weight}


@dataclass(frozen=True)
class Resampled:
    """What resampling makes of a mixture. factors: thousandths by which weights are multiplied; thinned and kept: as of
    :class:`.stream.Mix`."""

    factors: dict[str, int] = field(default_factory=dict)
    thinned: dict[str, str] = field(default_factory=dict)
    kept: float = 1.0


class WindowWeights:
    """The mix of each window of samples, by the step that is planned when it is first read.

    With ``every``, training posts what it measured after each multiple of that many steps; it counts from ``lag`` + 1 steps later.
    The thread that plans waits for it there, so that the window is the same one however far that thread is ahead. posts: by step, of a
    stage whose first ``done`` steps are done.
    """

    def __init__(self, mixture: Mixture, every: int = 0, lag: int = 0, posts: Mapping[int, Resampled] | None = None, done: int = 0):
        self.mixture, self.every, self.lag = mixture, every, lag
        self.posts = dict(posts or {})
        self.posted = threading.Condition()
        if every:  # where the run had another cadence, lag, or none, what it posted before counts, or the oldest that is kept
            kept = sorted(self.posts)
            for step in range(max(every, self.due(done + 1)), done + 1, every):
                near = max((at for at in kept if at <= step), default=kept[0] if kept else None)
                self.posts.setdefault(step, self.posts[near] if near is not None else Resampled())

    def at(self, step: int) -> Mix | None:
        """While ``step`` is planned; None after a while in which what it follows from was not posted."""
        due = self.due(step)
        if not due:
            return self.mixture.mix(step)
        with self.posted:
            if not self.posted.wait_for(lambda: due in self.posts, PATIENCE):
                return None
            post = self.posts[due]
        weights = {name: weight * post.factors.get(name, DIGITS) for name, weight in self.mixture.at(step).items()}
        return Mix(self.mixture.rounded(weights), self.mixture.ends, post.thinned, post.kept)

    def due(self, step: int) -> int:
        """The step after which was posted what counts while ``step`` is planned; 0: none yet."""
        return max(0, step - self.lag - 1) // self.every * self.every if self.every else 0

    def post(self, step: int, resampled: Resampled) -> None:
        """After step ``step`` was trained."""
        with self.posted:
            self.posts[step] = resampled
            self.posts = {at: post for at, post in self.posts.items() if at >= self.due(step + 1)}
            self.posted.notify_all()
