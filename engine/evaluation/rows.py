"""Rows of a table on disk: TSV, CSV, JSON lines or Parquet, whole in memory, a bad one in its place."""

from __future__ import annotations

import csv
import json
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import BadRecord, UserError

Row = dict[str, Any] | BadRecord
SPLITS = ("_test", "_val", "_dev")


def read_rows(name: str, path: Path) -> list[Row]:
    """The rows of a file, or of all files of the one kind in a folder, in the order of their names; these have a column ``file``.

    Raises UserError for what is not there, not readable, or of no known kind.
    """
    if not path.is_dir():
        return _read(name, path)
    files = [p for p in sorted(path.iterdir()) if p.suffix in READERS]
    if len({p.suffix for p in files}) != 1:
        what = "files of several kinds" if files else "no file"
        raise UserError(f"evaluation task {name!r}: {path} holds {what} of {', '.join(READERS)}; one kind is needed")
    return [{"file": _stem(file), **row} if isinstance(row, dict) else row for file in files for row in _read(name, file)]


def first_row(name: str, path: Path) -> dict[str, Any] | None:
    """The first good row of a file or folder, None where there are no rows that could be read. Raises as :func:`read_rows` does."""
    files = [p for p in sorted(path.iterdir()) if p.suffix in READERS][:1] if path.is_dir() else [path]
    if not files or not path.exists() or files[0].suffix not in READERS:
        return None
    return next((row for row in _rows(name, files[0]) if isinstance(row, dict)), None)


def _read(name: str, path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise UserError(f"evaluation task {name!r}: {path} is no {', '.join(READERS)} file")
    if not (rows := list(_rows(name, path))):
        raise UserError(f"evaluation task {name!r}: {path} holds no questions")
    return rows


def _rows(name: str, path: Path) -> Iterator[Row]:
    try:
        yield from READERS[path.suffix](path)
    except OSError as error:
        raise UserError(f"evaluation task {name!r}: {path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"evaluation task {name!r}: {path} is damaged: {error}") from error


def _stem(file: Path) -> str:
    """The subject of "astronomy_test.csv"."""
    return next((file.stem.removesuffix(end) for end in SPLITS if file.stem.endswith(end)), file.stem)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_row(line, f"{path}, line {number}")


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord("malformed line", f"{where}: {error}")
    return row if isinstance(row, dict) else BadRecord("malformed line", f"{where}: it is no object")


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(64):
            yield from batch.to_pylist()


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)  # an image in base64 is one field
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter)
            first = next(lines, [])
            header = _options_header(len(first)) if _is_question(first) else first
            if header is not first:
                yield _separated_row(first, header, f"{path}, line 1")
            for fields in lines:
                if any(fields):
                    yield _separated_row(fields, header, f"{path}, line {lines.line_num}")

    return read


def _is_question(first: list[str]) -> bool:
    """Whether a first line is no header but a question already, with the letter of its answer at the end: MMLU's files have none."""
    return len(first) > 3 and "question" not in first and first[-1] in string.ascii_uppercase[: len(first) - 2]


def _options_header(num_columns: int) -> list[str]:
    return ["question", *string.ascii_uppercase[: num_columns - 2], "answer"]


def _separated_row(fields: list[str], header: list[str], where: str) -> Row:
    if len(fields) != len(header):
        return BadRecord("malformed line", f"{where}: {len(fields)} fields, needed are {len(header)}")
    return dict(zip(header, fields, strict=True))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": _separated("\t"),
    ".csv": _separated(","),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
