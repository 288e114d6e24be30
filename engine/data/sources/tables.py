"""What sources whose records are rows of a table have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import BadRecord, UserError
from ..forms import Form, find_form


def form_of_table(path: str, present: Sequence[str], columns: Mapping[str, str]) -> Form:
    """The form of all rows. Raises UserError where the columns are of no form or of several, or lack one of those that were named."""
    if missing := [column for column in columns.values() if column not in present]:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, which data.columns or a curation names; its columns are {', '.join(present)}"
        )
    try:
        return find_form(present, columns)
    except BadRecord as error:
        raise UserError(f"{path}: {error}; name them in data.columns, as messages = 'dialog', images = 'pictures'") from error
