"""Which implementation an operation runs on.

``reference`` is the definition: plain torch, dense, readable, any float dtype. ``torch`` is the same formula arranged so that
it does not compute what no row sees; it is the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("reference", "torch")
_current: ContextVar[str] = ContextVar("smalt_kernels_backend", default="torch")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation of :mod:`smalt.kernels` inside the ``with`` block on the named implementation.

    Raises ValueError for a name that is not one of ``BACKENDS``.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; choose one of {', '.join(BACKENDS)}")
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def current_backend() -> str:
    """The name of the implementation in force."""
    return _current.get()
