"""The two kinds of error that a user can cause: one ends the run, the other loses a sample."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the code is wrong; the message names it, says where it is and what to do. Shown without a traceback."""


class BadRecord(Exception):
    """A record that cannot be used. ``cause`` is the short kind that it is counted under."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail
