"""The output of a curation: Parquet files in the form that sources are read in, in row groups of bounded size."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import UserError
from ...tensor_files import sync_folder
from .config import CurationConfig, Decontaminate

REPORT, REMOVED = "report.json", "removed.jsonl"
_OWN_FILES = (REPORT, REMOVED)
_TEXTS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PICTURES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_OWN = {"messages": _TEXTS, "images": _PICTURES, "source": pa.string(), "record": pa.int64()}


def check_output(config: CurationConfig, overwrite: bool) -> None:
    """Raise UserError for an output that is there already, that holds a source, or for a column that would stand twice; and where the
    folders beside it that a killed curation leaves are not that."""
    output = config.output
    if taken := set(config.keep_columns) & set(_OWN):
        raise UserError(f"keep_columns names {', '.join(sorted(taken))}, which the output has of its own; leave it out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not overwrite:
            raise UserError(f"{output} is there already; choose another folder with --out, or replace it with --overwrite")
        if not output.is_dir() or (others := {p.name for p in output.iterdir()} - _written(output)):
            what = f"holds {', '.join(sorted(others))}" if output.is_dir() else "is a file"
            raise UserError(f"{output} is not replaced: it {what}, which no curation has written; choose another folder with --out")
    partial, replaced = _work_folders(output)
    if replaced.exists() and not output.exists():
        raise UserError(
            f"{output} is not there, and {replaced} is: a curation was killed while it replaced the one by its own; rename {replaced} "
            f"to {output}, or remove it"
        )
    for left in (partial, replaced):
        there = {p.name for p in left.iterdir() if p.suffix != ".parquet"} if left.exists() else set()
        if others := there - set(_OWN_FILES):
            raise UserError(
                f"{left}, which a curation of {output} needs, holds {', '.join(sorted(others))}, which none has written; "
                "rename it, or choose another folder with --out"
            )
    sets = [source for step in config.steps.values() if isinstance(step, Decontaminate) for source in step.sources.items()]
    for name, path in [*config.sources.items(), *sets]:
        if Path(path).resolve().is_relative_to(output.resolve()):
            raise UserError(
                f"source {name!r} ({path}) lies in the output {output}, which is replaced; choose another folder with --out"
            )


def _written(output: Path) -> set[str]:
    """The names of files that a curation has written there, by its own report."""
    try:
        sources = json.loads((output / REPORT).read_bytes())["sources"]
        return {*_OWN_FILES, *(f"{name}.parquet" for name in sources)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _work_folders(output: Path) -> tuple[Path, Path]:
    """What is being written, and what it is about to take the place of."""
    return output.with_name(output.name + ".partial"), output.with_name(output.name + ".replaced")


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``output`` when all of it is on disk. Raises UserError."""
    partial, replaced = _work_folders(output)
    try:
        for left in (partial, replaced):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        sync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{output} cannot be written: {error}; choose another folder with --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class RecordWriter:
    """Writes the rows of one source. columns: those beside messages, images, source and record, as text."""

    def __init__(self, path: Path, columns: Sequence[str], most_records: int, most_bytes: int):
        self._schema = pa.schema([*_OWN.items(), *((column, pa.string()) for column in columns)])
        self._most_records, self._most_bytes = most_records, most_bytes
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._file = path.open("wb")
        self._parquet = pq.ParquetWriter(self._file, self._schema)

    def add(self, row: dict[str, Any], size: int) -> None:
        """size: bytes of the row."""
        if self._rows and (len(self._rows) >= self._most_records or self._bytes + size > self._most_bytes):
            self._flush()
        self._rows.append(row)
        self._bytes += size

    def close(self) -> None:
        self._flush()
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._parquet.write_table(pa.Table.from_pylist(self._rows, self._schema), row_group_size=len(self._rows))
        self._rows, self._bytes = [], 0
