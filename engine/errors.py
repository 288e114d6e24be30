"""The two kinds of error that a user can cause, one of which ends the run and the other loses a sample, and how they are said."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smalt.parallel import World

_TIME_TO_TELL = timedelta(seconds=5)


class UserError(Exception):
    """Something outside the code is wrong; the message names it, says where it is and what to do. Shown without a traceback."""


class BadRecord(Exception):
    """A record that cannot be used. ``cause`` is the short kind that it is counted under."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return BadRecord, (self.cause, self.detail)


def warn(text: str) -> None:
    """Say what does not end the run, on stderr."""
    _say(f"warning: {text}")


def tell(error: UserError | BadRecord, world: World | None) -> None:
    """Print what ends this process. The main one speaks for all that have the same to say; another rank speaks, and is named, where
    the main one says something else, or nothing in time. world: None before the processes have met."""
    if world is None or world.store is None:
        _say(f"error: {error}")
        return
    # Torchrun's, when one process has ended: each still says what it has to say.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if world.is_main:
        _say(f"error: {error}")
        world.store.set("error", str(error))
        return
    try:
        world.store.wait(["error"], _TIME_TO_TELL)
        told = world.store.get("error").decode()
    except RuntimeError:  # not in time, or the store is gone
        told = None
    if told != str(error):
        _say(f"error on rank {world.rank}: {error}")


def _say(line: str) -> None:
    # In one write: the processes of a node share stderr, and print would write the end of the line on its own.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
