"""No kernel reads or writes anything but elements of the tensors that it was given: watched in Triton's interpreter.

A pointer that is handed to a kernel carries a number in bits 48 to 63, which no address of a process has. Offsets leave it in
place, so that at a load or a store it tells which tensor the address was made from. What lies between the rows of a slice of
something wider is outside, as is another tensor that happens to stand next in memory. Nor may a launch store one element twice,
for nobody knows which store a GPU does last, or tell the compiler that a number is a multiple of what it is not.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from smalt.kernels.adamw import Table

SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
LARGE = 2**30  # bytes of a tensor from which only its ends are watched, and only stores of one instruction: nothing is kept of it


_unwatched: list[str] = []


@contextmanager
def unwatched(whose):
    """Inside, kernels of another library do as they like: Liger's head stores the label's gradient twice, in order."""
    _unwatched.append(whose)
    try:
        yield
    finally:
        _unwatched.pop()


@dataclass
class Region:
    """Where a tensor lies, and at which of the bytes that it spans an element begins; None where they lie without a gap, or are too
    many."""

    name: str
    base: np.uint64
    itemsize: int
    size: int
    starts: np.ndarray | None
    stored: np.ndarray | None = None

    @classmethod
    def of(cls, x, tag):
        spread = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        span = 1 + spread if x.numel() else 0
        starts = None
        gaps = span > math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
        if gaps and span * x.element_size() <= LARGE:
            starts = torch.zeros(span, x.element_size(), dtype=torch.bool)
            starts[:, 0].as_strided(x.shape, [s * x.element_size() for s in x.stride()]).fill_(True)
            starts = starts.flatten().numpy()
        name = f"a tensor {tuple(x.shape)} of {x.dtype}, strides {x.stride()}"
        return cls(name, np.uint64((tag << 48) + x.data_ptr()), x.element_size(), span * x.element_size(), starts)

    def first_outside(self, addresses):
        """The first of the addresses at which no element begins, in bytes from the tensor's first, or None."""
        offset = addresses - self.base  # what lies before the tensor becomes enormous
        wrong = offset >= self.size
        if self.starts is None:
            wrong |= (offset & np.uint64(self.itemsize - 1)) != 0
        else:
            wrong |= ~self.starts[np.where(wrong, 0, offset)]
        return int(offset[wrong][0].astype(np.int64)) if wrong.any() else None

    def store(self, addresses):
        """Whether none of these elements of the tensor was stored before."""
        place = (addresses - self.base) // np.uint64(self.itemsize)
        if self.size > LARGE:
            return np.unique(place).size == place.size
        self.stored = np.zeros(self.size // self.itemsize, bool) if self.stored is None else self.stored
        new = not self.stored[place].any() and np.unique(place).size == place.size
        self.stored[place] = True
        return new


@contextmanager
def watched_addresses():
    """Inside, a kernel that leaves its tensors fails, with the operation and the tensor in the message."""
    from triton.runtime import interpreter

    regions, in_table, numbers = {}, [], iter(range(1 << 62))
    convert, update, hint = interpreter._implicit_cvt, Table.update, interpreter.TensorHandle.set_attr

    def numbered(arg):
        made = convert(arg)
        if hasattr(arg, "data_ptr"):
            tag = next(numbers) % 0xFFFF + 1
            regions[tag] = Region.of(arg, tag)
            made.handle.data = made.handle.data | np.uint64(tag << 48)
        return made

    def noted(self, members, block):
        in_table[:] = [Region.of(t, 0) for m in members for t in m[:5] if t is not None]
        return update(self, members, block)

    def checked_hint(self, key, values):
        if key == "tt.divisibility" and self.data.size == 1:
            assert self.data.item() % values[0] == 0, f"{self.data.item()} is said to be a multiple of {values[0]}"
        hint(self, key, values)

    def checked(method, at, mask_at):
        def access(self, *args):
            pointers, mask = args[at], None if mask_at is None else args[mask_at]
            addresses = pointers.data.reshape(-1)
            if mask is not None and not mask.data.all():
                addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            if addresses.size and not _unwatched:
                tag = int(addresses[0] >> SHIFT)
                # The addresses of a table carry no number: all lanes are then in one of its tensors.
                found = [(region.first_outside(addresses), region) for region in ([regions[tag]] if tag else in_table)]
                inside = next((region for outside, region in found if outside is None), None)
                name = method.__name__.removeprefix("create_")
                assert inside, f"{name} {found[0][0]} bytes from the start of {found[0][1].name}: not in it"
                assert name != "masked_store" or inside.store(addresses), f"two stores to one element of {inside.name}"
            plain = interpreter.TensorHandle(pointers.data & ADDRESS, pointers.dtype)
            return method(self, *args[:at], plain, *args[at + 1 :])

        return access

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", numbered)
        patch.setattr(Table, "update", noted)
        patch.setattr(interpreter.TensorHandle, "set_attr", checked_hint)
        for name, at, mask_at in (("masked_load", 0, 1), ("masked_store", 0, 2), ("atomic_rmw", 1, 3), ("atomic_cas", 0, None)):
            method = getattr(interpreter.InterpreterBuilder, f"create_{name}")
            patch.setattr(interpreter.InterpreterBuilder, f"create_{name}", checked(method, at, mask_at))
        yield
