"""Reads that are tried again: a file system over a network fails for a moment, and a record is not bad for that."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Errors that may pass. A file that is missing, a folder or forbidden stays so.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip
# Seconds before each new try. Their sum is what every record of a disk that is gone for good costs.
PAUSES = 0.1, 0.3, 0.9


def with_retries(read: Callable[[], T]) -> T:
    """``read()``, tried again after each pause while it raises an OSError that may pass; raises what the last try raises."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
        time.sleep(pause)
    return read()
