"""Datasets that Hugging Face ``datasets`` saved to disk: the whole folder is one piece, mapped; its images stay undecoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from .. import files
from ..forms import Form, Place, read_record
from ..records import Record
from .tables import form_of_table

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class SavedDataset:
    """stamp: of the file that is written last, and anew each time."""

    path: str
    stamp: files.Stamp
    form: Form
    num_records: int

    def load(self) -> SavedRows:
        files.check(f"{self.path}/{STATE}", self.stamp)
        return SavedRows(_load(self.path).select_columns(self.form.columns), self.form, Place(self.path))


@dataclass(frozen=True)
class SavedRows:
    dataset: Any
    form: Form
    place: Place
    nbytes: int = 0

    def record(self, number: int) -> Record:
        return read_record(self.dataset[number].to_pylist()[0], self.form, self.place)


def open_saved_dataset(path: str, columns: Mapping[str, str]) -> list[SavedDataset]:
    """columns: as :func:`..forms.find_form` has them. Raises UserError without the library, or where the columns are of no form."""
    stamp = files.stamp(f"{path}/{STATE}")
    try:
        dataset = _load(path)
    except OSError as error:
        raise UserError(f"{path} is not a readable dataset of Hugging Face: {error}") from error
    return [SavedDataset(path, stamp, form_of_table(path, dataset.column_names, columns), len(dataset))]


def _load(path: str) -> Any:
    """The dataset; its rows are tables of Arrow, in which images are what was stored. Raises OSError."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path} was saved by Hugging Face datasets: pip install 'smalt[datasets]'") from error
    try:
        return datasets.load_from_disk(path).with_format("arrow")
    except Exception as error:  # whatever the library makes of a file that is missing or damaged
        raise OSError(f"{type(error).__name__}: {error}") from error
