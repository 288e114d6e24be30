"""What the threads of all ranks tell each other: values, or an error or a request to end, which then ends all of them alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..errors import BadRecord, UserError

T = TypeVar("T")


class Exchange(Protocol):
    """Of small objects between all ranks, by rank; each makes one at the same point of its thread."""

    def gather(self, value: Any) -> list[Any]: ...

    def close(self) -> None: ...


class Closing(Exception):
    """A rank was told to end its thread."""


class Told(Exception):
    """The same on all ranks: what one of them has raised."""

    def __init__(self, error: Exception):
        self.error = error


@dataclass(frozen=True)
class _Said:
    value: Any = None
    error: Exception | None = None
    closing: bool = False


class Sharing:
    """closed: set when this rank's thread is to end; it then takes part in one more exchange, in which the others hear of it."""

    def __init__(self, exchange: Exchange, rank: int, closed: threading.Event):
        self.exchange, self.rank, self.closed = exchange, rank, closed

    def share(self, make: Callable[[], T]) -> list[T]:
        """What each rank makes, by rank. Raises Told on all ranks for what one of them raises, Closing when one of them is closed."""
        try:
            said = _Said(closing=True) if self.closed.is_set() else _Said(make())
        except Exception as error:
            said = _Said(error=self._sendable(error))
        heard: list[_Said] = self.exchange.gather(said)
        if errors := [one.error for one in heard if one.error is not None]:
            raise Told(errors[0])
        if any(one.closing for one in heard):
            raise Closing
        return [one.value for one in heard]

    def tell(self, error: Exception) -> None:
        """Tell the others of an error, at the exchange that they come to next."""

        def fail() -> None:
            raise error

        with contextlib.suppress(Told, Closing):
            self.share(fail)

    def _sendable(self, error: Exception) -> Exception:
        if isinstance(error, UserError | BadRecord):
            return error
        return RuntimeError(f"reading data failed on rank {self.rank}: {type(error).__name__}: {error}")
