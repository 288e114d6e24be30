"""The learning rate as a pure function of config, stage and step: one schedule over a stage and those that continue it.

Progress is counted in tokens of packs, filled or not, for stages differ in tokens a step: at the border of two stages the learning
rate is then continuous, and falls as fast a token after it as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .config import RunConfig

# The share of the decay that is done where a share x of its tokens is.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "sqrt": math.sqrt,
}


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to ``peak``, a stable phase, and a decay to ``final_share`` of it.

    warmup: tokens; last: tokens before the last step, which has the final rate; decay_share: of what lies between, 0 for none;
    shape: a key of SHAPES.
    """

    peak: float
    warmup: int
    last: int
    decay_share: float
    shape: str
    final_share: float

    def rate(self, before: int, tokens: int) -> float:
        """The learning rate of a step of so many ``tokens`` with so many ``before`` it."""
        if before < self.warmup:
            return self.peak * min(1.0, (before + tokens) / self.warmup)
        if not self.decay_share:
            return self.peak
        done = (before - self.warmup) / max(1, self.last - self.warmup)
        decayed = SHAPES[self.shape](min(1.0, max(0.0, (done - 1 + self.decay_share) / self.decay_share)))
        return self.peak * (1 - (1 - self.final_share) * decayed)


def learning_rate(config: RunConfig, name: str, step: int) -> float:
    """Learning rate of step 0 .. steps - 1 of stage ``name``, before the multipliers of its parts."""
    names = _sharing(config, name)
    before = sum(config.stages[n].steps * _tokens(config, n) for n in names[: names.index(name)])
    rate = _schedule(config, names).rate(before + step * _tokens(config, name), _tokens(config, name))
    warmup = config.stages[name].warmup_steps if name != names[0] else None  # of its own, where other data or parts begin
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate


def _sharing(config: RunConfig, name: str) -> list[str]:
    """The stages that share the schedule of a stage, in order: the first has it, the others continue it."""
    names = list(config.stages)
    first = last = names.index(name)
    while config.stages[names[first]].schedule == "continued":
        first -= 1
    while last + 1 < len(names) and config.stages[names[last + 1]].schedule == "continued":
        last += 1
    return names[first : last + 1]


def _schedule(config: RunConfig, names: list[str]) -> Schedule:
    stage = config.stages[names[0]]
    decay_share, shape = {
        "constant": (0.0, "linear"),
        "cosine": (1.0, "cosine"),
        "wsd": (stage.decay_share or 0.2, stage.decay_shape or "linear"),
    }[stage.schedule]
    assert stage.learning_rate is not None  # of a stage that is not continued
    return Schedule(
        peak=stage.learning_rate,
        warmup=(stage.warmup_steps or 0) * _tokens(config, names[0]),
        last=sum(config.stages[n].steps * _tokens(config, n) for n in names) - _tokens(config, names[-1]),
        decay_share=decay_share,
        shape=shape,
        final_share=0.1 if stage.final_share is None else stage.final_share,
    )


def _tokens(config: RunConfig, name: str) -> int:
    """Of a step's packs."""
    return config.packs_of(name) * config.stages[name].sequence_length
