"""The libraries of the extra ``curate``, imported where a step needs them."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import UserError


def library(name: str) -> Any:
    """The module ``name``. Raises UserError with the extra that it comes with."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"a step of the curation needs the library {name} ({error}): pip install 'smalt[curate]'") from error
