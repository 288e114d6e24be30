"""What is written is what safetensors reads, and its checksum is that of the bytes."""

import json
import struct
import subprocess

import pytest
import torch
from safetensors import safe_open

from smalt.engine.tensor_files import checksum, write_file, write_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def write(path, tensors):
    layout = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    return write_tensors(path, layout, tensors.__getitem__, {"format": "pt", "note": "é"})


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_and_odd_shape_is_read_back(tmp_path):
    torch.manual_seed(0)
    shapes = [(), (0,), (3, 0, 2), (1,), (3, 5), (2, 3, 7)]
    tensors = {f"{d}{list(s)}": torch.randint(0, 2, s).to(d) for d in DTYPES for s in shapes}
    tensors["turned"] = torch.randn(4, 6).T
    write(tmp_path / "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
        assert set(file.keys()) == set(tensors)
        for name, want in tensors.items():
            got = file.get_tensor(name)
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert torch.equal(bits(got), bits(want)), name


def test_every_tensor_is_aligned(tmp_path):
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(3),
        "c": torch.zeros(1, dtype=torch.bfloat16),
        "d": torch.zeros(1).double(),
    }
    write(tmp_path / "a.safetensors", tensors)
    raw = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert not [n for n, t in tensors.items() if header[n]["data_offsets"][0] % t.element_size()]


def test_checksum_is_that_of_b2sum(tmp_path):
    # More than one chunk of writing, and an end that is no whole chunk.
    record = write_file(tmp_path / "a", [b"", b"x" * 40_000_001, memoryview(b"end")])
    said = subprocess.run(["b2sum", "-l", "256", tmp_path / "a"], capture_output=True, text=True, check=True).stdout.split()[0]
    assert record.checksum == checksum(tmp_path / "a") == said
    assert record.size == (tmp_path / "a").stat().st_size == 40_000_004


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"safetensors has no torch\.complex64"):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"a is torch\.float32 \[2\], its layout"):
        write_tensors(tmp_path / "a.safetensors", {"a": (torch.float32, (3,))}, lambda name: torch.zeros(2), {})
