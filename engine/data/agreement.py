"""What the ranks have read of held-out data, compared before it is used.

Every rank reads it for itself. A file can be bad, missing or another one on one machine alone; its ranks would then go on with numbers
of their own, with no error. (What is trained on is shared out, and compared, by :mod:`.loader`.)
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from smalt.model import Document
from smalt.parallel import World

from ..errors import UserError
from .reading import SkippedSample

T = TypeVar("T")

# The fingerprint of a rank that could not read.
FAILED = 0
# Ranks that an error names before it counts the rest.
MOST_RANKS = 8


@dataclass(frozen=True)
class Entry:
    """What one rank has made of one thing, in words: name is outcome. detail: of an error, which is no part of what is compared."""

    name: str
    outcome: str
    detail: str = field(default="", compare=False)

    @staticmethod
    def of(sample: Document | SkippedSample, more: bytes = b"") -> Entry:
        """more: what else was made of the record."""
        name = f"record {sample.record} of source {sample.source!r}"
        if isinstance(sample, SkippedSample):
            return Entry(name, f"skipped for {sample.cause!r}", sample.detail)
        checksum = zlib.crc32(more, zlib.crc32(sample.targets.data, zlib.crc32(sample.tokens.data)))
        return Entry(name, f"read (tokens: {len(sample)}, tiles: {len(sample.tiles)}, checksum: {checksum:08x})")

    def __str__(self) -> str:
        return f"{self.outcome} ({self.detail})" if self.detail else self.outcome


@dataclass(frozen=True)
class Account:
    """All that a rank has read for one purpose, in order. fingerprint: 63 bits, the same in every process that has read the same."""

    entries: list[Entry]
    fingerprint: int

    @staticmethod
    def of(entries: list[Entry]) -> Account:
        content = [(e.name, e.outcome) for e in entries]
        digest = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
        return Account(entries, int.from_bytes(digest) >> 1)


def read_alike(world: World, where: str, read: Callable[[], T], account: Callable[[T], Account]) -> T:
    """``read()``, of which all ranks have the same account; every rank calls it. where: begins the error, as "step 12".

    Raises what ``read`` raises, and UserError on all ranks when their accounts differ, on those that could read when others could not.
    """
    if world.size == 1:
        return read()
    failure: Exception | None = None
    try:
        made = read()
        own = account(made)
    except Exception as error:  # the other ranks wait to hear of it
        failure, own = error, Account([], FAILED)
    if not world.is_same(own.fingerprint):
        _explain(world, where, own, failure)
    if failure is not None:
        raise failure
    return made


def _explain(world: World, where: str, own: Account, failure: Exception | None) -> NoReturn:
    """Raise the error of ranks whose accounts differ."""
    failures = world.gather(f"{type(failure).__name__}: {failure}" if failure is not None else "")
    if failure is not None:
        raise failure
    if failed := [rank for rank, text in enumerate(failures) if text]:
        raise UserError(f"{where}: {_ranks(failed)} cannot read the data that this rank can: {failures[failed[0]]}")
    main = world.agree(lambda: own.entries)
    pairs = enumerate(itertools.zip_longest(own.entries, main))
    first = next((number for number, (ours, theirs) in pairs if ours != theirs), None)
    at = min(number for number in world.gather(first) if number is not None)
    views = world.gather(own.entries[at] if at < len(own.entries) else None)
    raise UserError(f"{where}: the ranks read different data: {describe(views)}; give every machine the same files, then --resume")


def describe(views: Sequence[Entry | None]) -> str:
    """What each rank has made of one thing, the few before the many. views: by rank, None where the rank has read less."""
    groups: dict[Entry | None, list[int]] = {}
    for rank, view in enumerate(views):
        groups.setdefault(view, []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: len(group[1]))
    name, said = None, []
    for view, ranks in ordered:
        repeated = view is not None and view.name == name
        outcome = "nothing more is read" if view is None else f"{view}" if repeated else f"{view.name} is {view}"
        name = view.name if view is not None else None
        last = view is ordered[-1][0] and len(ranks) > 1 and len(ordered) > 1
        said.append(f"{outcome} on {'the others' if last else _ranks(ranks)}")
    return " and ".join(said)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:MOST_RANKS]))
    more = f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"
