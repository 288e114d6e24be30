"""What a step is: a function of one record, or a signature of each record and a decision over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..records import Record


@dataclass(frozen=True)
class Removed:
    """Why a record was removed. cause: the short kind that it is counted under; like: number of the record that it is too like, in the
    order of reading."""

    cause: str
    detail: str = ""
    like: int | None = None


@dataclass(frozen=True)
class RecordStep:
    """apply: a pure function that returns the record, or a changed one, and raises BadRecord to remove it; changes: whether it ever
    changes one; of_talks: it looks at a part that a plain text does not have."""

    name: str
    apply: Callable[[Record], Record]
    changes: bool = False
    of_talks: bool = False


@dataclass(frozen=True)
class SourceStep:
    """signature: what the decision needs of a record, by a pure function that raises BadRecord to remove it; decide: the records to
    remove, by number, from the (number, signature) of all in the order of reading; of_talks: as of RecordStep."""

    name: str
    signature: Callable[[Record], bytes]
    decide: Callable[[Iterable[tuple[int, bytes]]], dict[int, Removed]]
    of_talks: bool = False


Step = RecordStep | SourceStep
