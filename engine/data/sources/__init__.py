"""The kinds of data sources, a file each, behind one way to open them."""

from .opening import CACHED_BYTES, open_source, open_sources

__all__ = ["CACHED_BYTES", "open_source", "open_sources"]
