"""What more than one operation checks of its arguments."""

from __future__ import annotations


def check_scales(name: str, **scales: float | None) -> None:
    """Raises ValueError for a scale that is neither None nor positive."""
    for what, value in scales.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {what} is {value}; it must be positive")
