"""Opens a source, whose kind follows from its path and from what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .. import files
from ..records import Records
from ..retry import with_retries
from . import hugging_face, json_lines, tars
from .parquet import open_parquet
from .pieces import Piece, PieceRecords

# Of memory that a source may fill with what it has decoded, in all processes that read it.
CACHED_BYTES = 2**30


@dataclass(frozen=True)
class _Kind:
    """open: the pieces of a file, with the names of its columns."""

    endings: tuple[str, ...]
    open: Callable[[str, Mapping[str, str]], Sequence[Piece]]


_KINDS = (
    _Kind((".parquet",), open_parquet),
    _Kind((*json_lines.ENDINGS, *json_lines.COMPRESSED_ENDINGS), json_lines.open_json_lines),
    _Kind(tars.ENDINGS, tars.open_tar),
)
_ENDINGS = ", ".join(ending for kind in _KINDS for ending in kind.endings)


def open_sources(
    paths: Mapping[str, str | Path],
    columns: Mapping[str, Mapping[str, str]] | None = None,
    cached_bytes: int = CACHED_BYTES,
) -> dict[str, Records]:
    """Every source by its name; the arguments are those of :func:`open_source`, by name. Raises as it does."""
    return {name: open_source(name, path, (columns or {}).get(name), cached_bytes) for name, path in paths.items()}


def open_source(name: str, path: str | Path, columns: Mapping[str, str] | None = None, cached_bytes: int = CACHED_BYTES) -> Records:
    """A file, a folder of files of one kind, a pattern of files (``data/*.tar``), or a saved dataset; on a disk or a URL of fsspec.

    columns: names of columns by what is in them: messages, conversations, text, caption, images; under other names, columns that the
    records carry as text. cached_bytes: of memory for what was decoded, in each process that reads. Raises UserError for what is
    missing, unreadable, empty, or of no known form.
    """
    place = str(path).removeprefix("file://")
    try:
        pieces = _pieces(place, dict(columns or {}))
        if not any(piece.num_records for piece in pieces):
            raise UserError(f"{place} holds no records")
    except UserError as error:
        raise UserError(f"data source {name!r}: {error}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise UserError(f"data source {name!r}: {place} cannot be read: {error}") from error
    return PieceRecords(name, place, pieces, cached_bytes)


def _pieces(path: str, columns: dict[str, str]) -> list[Piece]:
    if "::" in path:
        raise UserError(f"{path} is a chain of URLs; give the URL of the files themselves")
    if files.is_folder(path):
        folder = path.rstrip("/") or "/"
        names = [file.rpartition("/")[2] for file in files.files_in(folder)]
        if hugging_face.STATE in names:
            return list(with_retries(lambda: hugging_face.open_saved_dataset(folder, columns)))
        found = _one_kind(folder, names)
    else:
        found = _named(path)
    open_file = next(kind.open for kind in _KINDS if found[0].endswith(kind.endings))
    return [piece for file in found for piece in with_retries(lambda: open_file(file, columns))]  # noqa: B023 - called at once


def _named(path: str) -> list[str]:
    """The files that a path which is no folder names: one, or those of a pattern."""
    found = [path] if files.exists(path) else files.files_like(path)
    if not found:
        raise UserError(f"{path} does not exist. `smalt data digits` makes the data of the default run.")
    if unknown := [file for file in found if _kind_of(file) is None]:
        packed = unknown[0].endswith((".tar.gz", ".tgz", ".tar.zst"))
        hint = "; unpack it, so that its members can be read in any order" if packed else ""
        raise UserError(f"{unknown[0]} ends in none of {_ENDINGS}{hint}")
    if len({_kind_of(file) for file in found}) > 1:
        raise UserError(f"{path} names files of several kinds: {', '.join(found[:3])}, ...; a source is of one kind")
    return found


def _one_kind(folder: str, names: Sequence[str]) -> list[str]:
    """The files of a folder that hold records. A .json beside others is about them."""
    if hugging_face.SPLITS in names:
        raise UserError(f"{folder} is a dataset of several splits; name the folder of one, as {folder}/train")
    known = [name for name in names if _kind_of(name) is not None]
    known = [name for name in known if not name.endswith(".json")] or known
    if not known:
        raise UserError(f"{folder} holds no file that ends in one of {_ENDINGS}")
    first_of_kind = {_kind_of(name): name for name in reversed(known)}
    if len(first_of_kind) > 1:
        some = ", ".join(first_of_kind.values())
        raise UserError(f"{folder} holds files of several kinds: {some}; name those you mean by a pattern, as {folder}/*.parquet")
    return [f"{folder}/{name}" for name in known]


def _kind_of(file: str) -> _Kind | None:
    return next((kind for kind in _KINDS if file.endswith(kind.endings)), None)
