"""The rule of resampling: from what was measured so far to the weights of sources and the records that are shown less often.

The paper names "key data resampling" and says nothing of it; this rule is Smalt's. A source is worth its progress: how far its
held-out loss has fallen below all that it was. What is solved already and what is noise have none. A record that is solved every time,
or never, teaches little.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from .mixture import DIGITS

# A streak is a signed byte.
LONGEST_STREAK = 127


def progress(lows: Sequence[float]) -> float:
    """How far the lowest loss has fallen, in nats a token. Noise hardly ever finds a new low, and what was forgotten and comes back is
    none. lows: lowest held-out loss up to each measurement, oldest first; empty where none was finite."""
    return lows[0] - lows[-1] if lows else 0.0


def source_factors(lows: Mapping[str, Sequence[float]], weights: Mapping[str, Fraction], floor: float) -> dict[str, int]:
    """By what the weight of each source is multiplied, in thousandths: ``floor`` and a part in proportion to its progress, so that the
    sum of the weights stays as it is. All stay as they are where there is no progress.

    lows: of each source, as in :func:`progress`; weights: of the mixture, by source.
    """
    found = {name: progress(lows[name]) for name in weights}
    mean = sum(float(weights[name]) * found[name] for name in weights) / float(sum(weights.values()))
    if not mean:
        return dict.fromkeys(weights, DIGITS)
    return {name: max(1, round(DIGITS * (floor + (1 - floor) * found[name] / mean))) for name in weights}


class Streaks:
    """How often each record was solved in a row, or, below 0, was not: int8 by source."""

    def __init__(self, sizes: Mapping[str, int], saved: Mapping[str, str] | None = None):
        """saved: of :meth:`state`; a source whose size is not what it was begins anew."""
        self.streaks = {name: np.zeros(size, np.int8) for name, size in sizes.items()}
        for name, text in (saved or {}).items():
            streak = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int8)
            if len(streak) == sizes.get(name):
                self.streaks[name] = streak.copy()

    def see(self, source: str, record: int, solved: bool) -> None:
        streak = int(self.streaks[source][record])
        streak = max(streak, 0) + 1 if solved else min(streak, 0) - 1
        self.streaks[source][record] = np.clip(streak, -LONGEST_STREAK, LONGEST_STREAK)

    def thinned(self, visits: int) -> dict[str, np.ndarray]:
        """Bool by record: it was solved, or was not, in each of the last ``visits`` visits or more."""
        return {name: np.abs(streak) >= visits for name, streak in self.streaks.items()}

    def state(self) -> dict[str, str]:
        """For JSON."""
        return {name: base64.b64encode(zlib.compress(streak.tobytes())).decode() for name, streak in self.streaks.items()}
