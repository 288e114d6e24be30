"""Loss spikes: which updates are not applied, when the weights go back to a checkpoint, and which samples were to blame.

A step is a spike when its loss, or the logarithm of its gradient norm, is more than ``sigmas`` robust standard deviations above the
median of the last ``window`` steps that were not. The update of a spike is skipped. After ``skips`` spikes in a row, or when the
loss stays above half of that limit for ``raised`` steps, the weights go back and the data goes on, as in PaLM (arXiv:2204.02311, 5.1).

Loss and norm are those of all ranks together, the same bits on each, so every rank decides the same without a collective.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .data.loader import SampleId
from .sections import SpikesConfig

SPIKES = "spikes.jsonl"
# The median absolute deviation of a normal distribution times this is its standard deviation.
NORMAL = 1.4826
# The least standard deviation that is believed: as a share of its median, and of the logarithm of the norm as it is. Without
# one, a run over a handful of records, whose loss hardly moves, would be all spikes.
LEAST_LOSS, LEAST_LOG_NORM = 0.005, 0.05


@dataclass(frozen=True)
class Verdict:
    """What to do after the backward pass of a step.

    ok: apply the update. skip: do not. rollback: do not, and load the newest checkpoint of step ``before`` or earlier.
    stop: the run has gone back ``max_rollbacks`` times already. reason: a sentence; empty where all is well.
    """

    action: Literal["ok", "skip", "rollback", "stop"]
    reason: str = ""
    before: int = 0


OK = Verdict("ok")


class SpikeRule:
    """Sees every step of a stage in order. state: what ``state`` gave, to go on from there."""

    def __init__(self, config: SpikesConfig, state: Mapping[str, Any] | None = None):
        self.config = config
        self._load(state or {})

    def _load(self, state: Mapping[str, Any]) -> None:
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=self.config.window)
        self.log_norms: deque[float] = deque(state.get("log_norms", ()), maxlen=self.config.window)
        self.skipped: int = state.get("skipped", 0)
        self.raised: int = state.get("raised", 0)
        self.rollbacks: int = state.get("rollbacks", 0)

    def see(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge a step before its update is applied. step: its number; loss: over all ranks; grad_norm: before clipping.

        A loss or norm that is not finite is skipped, rule or no rule, and leaves no trace in it.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Verdict("skip", "the loss or its gradient is not finite")
        if not self.config.enabled:
            return OK
        log_norm = math.log(grad_norm) if grad_norm > 0 else None
        loss_sigmas = self._above(self.losses, loss, LEAST_LOSS, 1e-12)
        norm_sigmas = self._above(self.log_norms, log_norm, 0.0, LEAST_LOG_NORM) if log_norm is not None else 0.0
        limit = self.config.sigmas
        spike, raised = max(loss_sigmas, norm_sigmas) > limit, loss_sigmas > limit / 2
        self.skipped = self.skipped + 1 if spike else 0
        self.raised = self.raised + 1 if raised else 0
        if not (spike or raised):
            self.losses.append(loss)
        if not spike and log_norm is not None:
            self.log_norms.append(log_norm)
        return self._verdict(step, spike, loss_sigmas, norm_sigmas)

    def _above(self, window: deque[float], value: float, least_share: float, least: float) -> float:
        """Robust standard deviations of a value above the median of a window; 0 until the window is full."""
        if len(window) < self.config.window:
            return 0.0
        median = statistics.median(window)
        deviation = NORMAL * statistics.median([abs(v - median) for v in window])
        return (value - median) / max(deviation, least_share * abs(median), least)

    def _verdict(self, step: int, spike: bool, loss_sigmas: float, norm_sigmas: float) -> Verdict:
        config = self.config
        what = (
            f"loss {loss_sigmas:.1f} and gradient norm {norm_sigmas:.1f} robust standard deviations above the last {config.window} "
            f"steps, of which {config.sigmas:g} are a spike"
        )
        if self.skipped >= config.skips:
            why, first = f"{self.skipped} spikes in a row", step - self.skipped + 1
        elif self.raised >= config.raised:
            why, first = f"the loss is up since {self.raised} steps", step - self.raised + 1
        elif spike:
            return Verdict("skip", what)
        else:
            return OK
        if self.rollbacks >= config.max_rollbacks:
            return Verdict("stop", f"{why}, after {self.rollbacks} rollbacks ({what})")
        return Verdict("rollback", f"{why} ({what})", first - config.rollback_steps)

    def rolled_back(self, saved: Mapping[str, Any]) -> None:
        """After the weights went back: measure by the steps that led to them. saved: the state of the rule in their checkpoint."""
        self._load({**saved, "skipped": 0, "raised": 0, "rollbacks": self.rollbacks + 1})

    def accept(self) -> None:
        """Where there is no checkpoint to go back to: forget what was, and learn the new level."""
        self.losses.clear()
        self.log_norms.clear()
        self.skipped = self.raised = 0

    def state(self) -> dict[str, Any]:
        """JSON, for the checkpoint."""
        return {
            "losses": list(self.losses), "log_norms": list(self.log_norms),
            "skipped": self.skipped, "raised": self.raised, "rollbacks": self.rollbacks,
        }  # fmt: skip


def write_spike(folder: Path, step: int, verdict: Verdict, loss: float, grad_norm: float, samples: Iterable[SampleId]) -> None:
    """Append a line to ``spikes.jsonl``: what was decided, and every document of the step. For the main process."""
    line = {
        "step": step, "action": verdict.action, "reason": verdict.reason,
        # JSON knows no NaN.
        "loss": loss if math.isfinite(loss) else None, "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "samples": [asdict(sample) for sample in samples],
    }  # fmt: skip
    with (folder / SPIKES).open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
