"""A record of a data source: a conversation, or a text, with its images. :mod:`.sources` reads it, :mod:`.forms` knows its form."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from .files import is_url, open_file, read_file, read_part, stamp


@dataclass(frozen=True)
class Part:
    """A file inside another, as a member of a tar. start, length: where its bytes are."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class Image:
    """An image as it stands in a record: its bytes; or the path or URL of a file, of which it may be a part."""

    data: bytes | None
    path: str | None
    part: Part | None = None

    def __str__(self) -> str:
        if self.part is not None:
            return f"{self.path}: {self.part.name}"
        return self.path or f"{len(self.data or b'')} bytes"

    def open(self) -> BinaryIO:
        """The file of the image, to be read from its start. Raises OSError, and ValueError for a path that cannot be one."""
        if self.data is not None:
            return io.BytesIO(self.data)
        path = self.path or ""
        if self.part is not None:
            return io.BytesIO(read_part(path, self.part.start, self.part.length))
        return io.BytesIO(read_file(path)) if is_url(path) else open_file(path)

    def size(self) -> int:
        """Bytes of the file. Raises as ``open`` does."""
        if self.data is not None:
            return len(self.data)
        return self.part.length if self.part is not None else stamp(self.path or "").size


@dataclass(frozen=True)
class Record:
    """A conversation, or a text. messages: (role, content) pairs with an ``<image>`` for each image; the roles are system, user and
    assistant, or there is one message of the role text, all of which is learned. source, number: where it stands. extra: (name, text)
    of other columns, those that the source was opened with and that are not null."""

    messages: tuple[tuple[str, str], ...]
    images: tuple[Image, ...]
    source: str = ""
    number: int = -1
    extra: tuple[tuple[str, str], ...] = ()


class Records(Protocol):
    """A source: random access to its records; worker processes get it by pickle. name: by which the config calls it; path: where it
    is, for people."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord when the record cannot be read or is of no known form, UserError when the source has changed."""
        ...
