"""Parquet files: a piece is a row group, decoded whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ...errors import UserError
from .. import files
from ..forms import Form, Place, read_record
from ..records import Record
from .tables import form_of_table


@dataclass(frozen=True)
class RowGroup:
    """Row group ``number`` of a file. metadata: the file's footer; stamp: of the file that it is of."""

    path: str
    stamp: files.Stamp
    metadata: pq.FileMetaData
    number: int
    form: Form

    @property
    def num_records(self) -> int:
        return self.metadata.row_group(self.number).num_rows

    def load(self) -> Rows:
        files.check(self.path, self.stamp)
        with _opened(self.path, self.metadata) as parquet:
            return Rows(parquet.read_row_group(self.number, columns=self.form.columns), self.form, Place(files.folder_of(self.path)))


@dataclass(frozen=True)
class Rows:
    """A row group in memory."""

    table: pa.Table
    form: Form
    place: Place

    @property
    def nbytes(self) -> int:
        return self.table.nbytes

    def record(self, number: int) -> Record:
        return read_record(self.table.slice(number, 1).to_pylist()[0], self.form, self.place)


def open_parquet(path: str, columns: Mapping[str, str]) -> list[RowGroup]:
    """The row groups of a file. columns: as :func:`..forms.find_form` has them. Raises UserError for what is no Parquet file, or has
    no columns of a known form."""
    stamp = files.stamp(path)
    try:
        with _opened(path) as parquet:
            metadata, names = parquet.metadata, parquet.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error
    form = form_of_table(path, names, columns)
    return [RowGroup(path, stamp, metadata, number, form) for number in range(metadata.num_row_groups)]


@contextmanager
def _opened(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    if files.is_url(path):
        with files.os_errors(path), files.open_file(path) as file:
            yield pq.ParquetFile(file, metadata=metadata)
    else:
        with pq.ParquetFile(path, metadata=metadata) as parquet:  # not mapped: a page that cannot be read would end the process
            yield parquet
