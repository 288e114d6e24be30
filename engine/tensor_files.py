"""Files that are written once, in order, and known by a checksum; safetensors files among them, written tensor by tensor.

A safetensors file is 8 bytes with the length of a JSON header, the header, and the tensors' bytes one after another
(https://huggingface.co/docs/safetensors). The library's own writer takes all tensors at once, holds the interpreter's lock while it
copies them, and knows no checksum; reading is left to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SUFFIX = ".safetensors"
# Written and hashed at a time. Both give up the interpreter's lock meanwhile: the training thread goes on.
_CHUNK = 1 << 24
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Layout = tuple[torch.dtype, Sequence[int]]


@dataclass(frozen=True)
class FileRecord:
    """A file as it was meant to be. size: bytes; checksum: :func:`checksum` of them."""

    name: str
    size: int
    checksum: str


def new_digest() -> hashlib.blake2b:
    """BLAKE2b with 256 bits, what ``b2sum -l 256`` prints: as fast as a hash gets without special instructions."""
    return hashlib.blake2b(digest_size=32)


def checksum(path: Path) -> str:
    """The checksum of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file and sync it to disk. The checksum is of what was to be written, not of what came to rest on the disk."""
    digest, size = new_digest(), 0
    with path.open("wb") as file:
        for part in parts:
            for low in range(0, len(part), _CHUNK):
                chunk = part[low : low + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, size, digest.hexdigest())


def write_tensors(
    path: Path, layout: Mapping[str, Layout], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> FileRecord:
    """Write and sync a safetensors file, one tensor at a time.

    layout: dtype and shape of each tensor by name; tensor: gives it, on the CPU, when its turn comes; metadata: text by name.
    Raises ValueError for a dtype that the format lacks and for a tensor that is not of its layout.
    """
    if lacking := {str(dtype) for dtype, _ in layout.values() if dtype not in _DTYPES}:
        raise ValueError(f"{path}: safetensors has no {', '.join(sorted(lacking))}")
    # Wide types first: then every tensor begins at a multiple of its element size.
    names = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + num_bytes(layout[name])
        header[name] = {"dtype": _DTYPES[layout[name][0]], "shape": list(layout[name][1]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for name in names:
            value = tensor(name)
            if (value.dtype, list(value.shape)) != (layout[name][0], list(layout[name][1])):
                raise ValueError(f"{path}: {name} is {value.dtype} {list(value.shape)}, its layout {layout[name]}")
            yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

    return write_file(path, parts())


def num_bytes(layout: Layout) -> int:
    """Bytes of a tensor of this dtype and shape."""
    count = layout[0].itemsize
    for size in layout[1]:
        count *= size
    return count


def sync_folder(path: Path) -> None:
    """Sync to disk what a folder lists: the names of files made, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
