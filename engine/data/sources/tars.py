"""WebDataset tars: members whose names are alike up to the first dot are one sample. A piece is a tar, read through an index.

A sample is a JSON of any form with images beside it, or a text, alone or with the image that it describes:

    00001.jpg 00001.txt     00002.json 00002.0.png 00002.1.png     00003.txt
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ...errors import BadRecord, UserError
from .. import files
from ..forms import CONVERSATIONS, FORMS, Place, extra_columns, find_form_of_object, read_object, read_record
from ..records import Image, Part, Record
from .indices import cached_table
from .pieces import WholeFile

ENDINGS = (".tar",)
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_MEMBERS = pa.large_list(pa.struct([("name", pa.large_string()), ("start", pa.int64()), ("length", pa.int64())]))


@dataclass(frozen=True)
class Samples:
    """The samples of a tar. index: a column of lists of members, each with the place of its bytes."""

    path: str
    stamp: files.Stamp
    columns: Mapping[str, str]
    index: pa.Table = field(repr=False)
    nbytes: int = 0

    def record(self, number: int) -> Record:
        members = [Part(**member) for member in self.index["members"][number].as_py()]
        if twice := [name for name, count in Counter(member.name for member in members).items() if count > 1]:
            raise BadRecord("malformed sample", f"{self.path} has {', '.join(twice)} more than once")
        pictures = sorted((m for m in members if _kind(m) in _IMAGE_ENDINGS), key=lambda m: _in_numbers(_ending(m)))
        place = Place("", tuple(Image(None, self.path, member) for member in pictures))
        row, columns = self._row(members)
        return read_record(row, find_form_of_object(row, columns), place)

    def _row(self, members: list[Part]) -> tuple[dict[str, Any], Mapping[str, str]]:
        """The keys of a sample: those of its JSON, or its text, beside which a JSON is metadata; and the columns that count."""
        row = {}
        texts = {_ending(member): member for member in members if _ending(member) in ("json", "txt")}
        if not texts:
            names = ", ".join(member.name for member in members)
            raise BadRecord("no known form", f"{self.path} has {names}; needed is a member .json or .txt")
        if "json" in texts:
            row = read_object(self._read(texts["json"]), f"{self.path}: {texts['json'].name}")
        if "txt" in texts and not any(form in self.columns for form in FORMS):
            if clash := [key for key in CONVERSATIONS if row.get(key) is not None]:
                raise BadRecord("several forms", f"{self.path} has {texts['txt'].name}, and {clash[0]} in {texts['json'].name}")
            extra = extra_columns(self.columns)
            return {**{column: row.get(column) for column in extra.values()}, "text": self._text(texts["txt"])}, extra
        return row, self.columns

    def _text(self, member: Part) -> str:
        try:
            return self._read(member).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRecord("unreadable record", f"{self.path}: {member.name}: {error}") from error

    def _read(self, member: Part) -> bytes:
        return files.read_part(self.path, member.start, member.length, self.stamp)


def open_tar(path: str, columns: Mapping[str, str]) -> list[WholeFile]:
    """columns: keys of the JSON, as :func:`..forms.find_form` has them. Raises UserError for a tar that is compressed, damaged, cut
    short, or has a member that leads out of it."""
    stamp = files.stamp(path)
    return [WholeFile(path, stamp, columns, _load, len(_load(path, stamp, columns).index))]


def _load(path: str, stamp: files.Stamp, columns: Mapping[str, str]) -> Samples:
    return Samples(path, stamp, columns, cached_table("tar", path, stamp, lambda: _scan(path)))


def _scan(path: str) -> pa.Table:
    """The members of each sample, samples in the order of their first member; a name without stem or ending is of none."""
    samples: dict[str, list[dict[str, Any]]] = {}
    with files.os_errors(path), files.open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
                for member in tar:
                    _refuse(member, path)
                    folder, slash, name = member.name.rpartition("/")
                    stem, dot, _ = name.partition(".")
                    if member.isfile() and stem and dot:
                        entry = {"name": member.name, "start": member.offset_data, "length": member.size}
                        samples.setdefault(folder + slash + stem, []).append(entry)
                end = tar.offset
        except tarfile.TarError as error:
            raise UserError(f"{path} is not a readable tar: {error}; it is damaged, cut short, or compressed") from error
        # tarfile takes a damaged header for the end, where only nothing or zeros may stand.
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block and block != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is damaged, or cut short, at byte {end}")
    return pa.table({"members": pa.array(list(samples.values()), _MEMBERS)})


def _refuse(member: tarfile.TarInfo, path: str) -> None:
    """Raise UserError for what no tar of data has. Nothing is ever unpacked; but who made such a tar is not to be trusted."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        wrong = "leads out of it"
    elif member.issparse() or not (member.isfile() or member.isdir()):
        wrong = "is neither a file nor a folder"
    else:
        return
    raise UserError(f"{path} is refused: its member {member.name!r} {wrong}; make the tar anew without it")


def _ending(member: Part) -> str:
    """What follows the first dot of the name."""
    return member.name.rpartition("/")[2].partition(".")[2]


def _kind(member: Part) -> str:
    return _ending(member).rpartition(".")[2].lower()


def _in_numbers(ending: str) -> list[tuple[int, str]]:
    """Orders 2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in re.split(r"([0-9]+)", ending) if part]
