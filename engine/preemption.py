"""Preemption: a run that is told to end finishes its step, saves, and ends; if it cannot in time, it says so and ends all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from types import TracebackType

from . import LAUNCHER
from .errors import warn

_SECONDS_BETWEEN_LOOKS = 1.0
# Between the last word of a process and the SIGKILL that comes at the end of its grace.
_SECONDS_FOR_LAST_WORDS = 1.0


class Preemption:
    """While it is open, SIGTERM sets ``asked`` instead of ending the process; a second one changes nothing. Before :meth:`begin` and
    after :meth:`end_at_once`, when there is nothing to save, it ends the process, with code 0.

    So does the death of torchrun: its workers live in sessions of their own, and would go on writing beside those of the next launch.
    A second before ``grace_seconds`` have passed since then the process ends with code 1, wherever it is: a thread sees to it, for
    the one that trains can be deep in a collective. The handler that SIGTERM had is back afterwards, unless the process was asked to
    end: then SIGTERM is ignored, so that its exit code stays that of what it did. To be opened in the main thread, before the
    processes meet: what waits for those of a dead torchrun would wait long. The first process speaks for all, on stderr.
    """

    def __init__(self) -> None:
        self.grace_seconds = 0.0
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.asked = False
        # Why nothing is lost if the process ends at once; None while something would be.
        self._at_once: str | None = "training has not begun"
        self._ending = threading.Lock()
        self._under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def __enter__(self) -> Preemption:
        # Python writes the number of a signal into this at once; a handler would wait for the main thread to leave its collective.
        self._signals, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._handler_before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._descriptor_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._descriptor_before)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.asked else self._handler_before or signal.SIG_DFL)
        self._told.close()
        self._thread.join()
        self._signals.close()

    def begin(self, grace_seconds: float) -> None:
        """From here on there is something to save."""
        self.grace_seconds = grace_seconds
        self._at_once = None

    def end_at_once(self) -> None:
        """From here on nothing can be lost: whoever is asked to end, or has been, ends at once, with code 0."""
        self._at_once = "the last checkpoint is saved, the evaluation is not finished; --continue does it again"
        if self.asked:
            self._end()

    # The rest runs in the thread, _end in either.

    def _watch(self) -> None:
        self._signals.settimeout(_SECONDS_BETWEEN_LOOKS)
        cause = None
        while cause is None:
            try:
                numbers = self._signals.recv(64)
            except TimeoutError:
                if self._under_torchrun and os.getppid() != LAUNCHER:
                    cause = "torchrun, which started this process, is gone"
                continue
            if not numbers:
                return
            if signal.SIGTERM in numbers:
                cause = "SIGTERM"
        self.asked = True
        if self._at_once:
            self._end()
        # After the look at _at_once, which begin() takes back when the grace is set.
        deadline = time.monotonic() + self.grace_seconds - _SECONDS_FOR_LAST_WORDS
        self._say(f"{cause}: saving after this step, for which there are {self.grace_seconds:g} s (checkpoint.grace_seconds)")
        while (left := deadline - time.monotonic()) > 0:
            self._signals.settimeout(left)
            with contextlib.suppress(TimeoutError):
                if not self._signals.recv(64):
                    return
        self._say(
            f"not at an end in {self.grace_seconds:g} s (checkpoint.grace_seconds); the last checkpoint that was finished is good"
        )
        os._exit(1)

    def _end(self) -> None:
        with self._ending:
            self._say(f"asked to end: {self._at_once}")
            os._exit(0)

    def _say(self, text: str) -> None:
        if self.is_main:
            # Whoever read stderr may be gone.
            with contextlib.suppress(OSError):
                warn(text)
