"""What the commands of ``smalt`` check and write alike."""

from __future__ import annotations

import math
import os
from json import dumps
from pathlib import Path

from .errors import UserError


def at_least(lowest: int, **options: float | None) -> None:
    """Raise UserError for an option that is below ``lowest`` or not finite; None is one that was not given."""
    for name, value in options.items():
        if value is not None and not lowest <= value < math.inf:
            also = " and finite" if isinstance(value, float) else ""
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {lowest}{also}")


def check_outputs(*paths: Path | None) -> None:
    """Make the folders of files that are to be written, before what takes long. Raises UserError for one that cannot be written."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}; choose another file") from error
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path} is a folder, or not to be written; choose another file")


def write_json(path: Path | None, value: object) -> None:
    if path is not None:
        path.write_text(dumps(value, indent=2) + "\n")
