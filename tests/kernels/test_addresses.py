"""The watch over addresses under which all tests of kernels run (conftest.py) sees a kernel that leaves its tensors."""

import pytest
import torch

from smalt.kernels.adamw import Hyperparameters, Member, Table, launch_step
from smalt.kernels.launch import INTERPRET, jit, tl

pytestmark = pytest.mark.skipif(not INTERPRET, reason="addresses are watched in the interpreter")


@jit
def _copy_kernel(x, y, first, x_limit, y_limit, x_stride, y_stride, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    value = tl.load(x + (i // 4) * x_stride + i % 4, mask=i < x_limit, other=0.0)
    tl.store(y + (i // 4) * y_stride + i % 4, value, mask=i < y_limit)


def copy(first=0, x_limit=12, y_limit=12, x_stride=6, y_stride=4):
    """A kernel that copies x [3, 4], a slice of something wider, to y."""
    x, y = torch.arange(30.0).view(5, 6)[1:4, 1:5], torch.empty(5, 4)[1:4]
    _copy_kernel[(1,)](x, y, first, x_limit, y_limit, x_stride, y_stride, BLOCK=16)
    return x, y


def test_what_stays_inside_is_left_alone():
    x, y = copy()
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"x_limit": 13}, r"masked_load 72 bytes from .* \(3, 4\)"),  # past the end
        ({"x_limit": 16}, "masked_load 72 bytes"),
        ({"x_stride": 4}, "masked_load 16 bytes"),  # between two rows
        ({"first": -1}, "masked_load -4 bytes"),  # before the first
        ({"y_limit": 13}, "masked_store 48 bytes"),
        ({"y_stride": 6}, "masked_store 48 bytes"),
    ],
)
def test_what_leaves_a_tensor_is_seen(fault, message):
    with pytest.raises(Exception, match=message):  # the interpreter's own, around ours
        copy(**fault)


def test_gaps_of_an_expanded_tensor_are_outside_too():
    x, y = torch.arange(6.0)[::2].expand(4, 3), torch.empty(4, 4)
    with pytest.raises(Exception, match="masked_load 4 bytes"):
        _copy_kernel[(1,)](x, y, 0, 16, 16, 0, 4, BLOCK=16)


@pytest.mark.parametrize(("programs", "step"), [(2, 3), (1, 0)])  # two programs, and two lanes of one
def test_an_element_that_is_stored_twice_is_seen(programs, step):
    with pytest.raises(Exception, match="two stores to one element"):
        _overlap_kernel[(programs,)](torch.empty(9), step or 1, step, BLOCK=4)


@jit
def _overlap_kernel(y, step, stride, BLOCK: tl.constexpr):
    tl.store(y + tl.program_id(0) * step + tl.arange(0, BLOCK) * (stride > 0), 1.0)


@jit
def _hint_kernel(x, first):
    tl.store(x, tl.multiple_of(first, 8))


def test_a_hint_that_lies_is_seen():
    x = torch.empty(1, dtype=torch.int32)
    _hint_kernel[(1,)](x, 24)
    with pytest.raises(Exception, match="28 is said to be a multiple of 8"):
        _hint_kernel[(1,)](x, 28)


@jit
def _table_kernel(table, limit, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.load(tl.load(table).to(tl.pointer_type(tl.float32)) + i, mask=i < limit)


def test_tensors_that_are_found_through_a_table_are_watched_too():
    x = torch.zeros(4, 7)
    launch_step([Member(*x[:, :5], None, 0, 0)], torch.ones(()), Hyperparameters(0.1, (0.9, 0.9), 1e-8, 0.1, 1, 1), Table())
    table = torch.tensor([x.data_ptr()])
    _table_kernel[(1,)](table, 5, BLOCK=8)
    with pytest.raises(Exception, match="masked_load 20 bytes"):
        _table_kernel[(1,)](table, 6, BLOCK=8)
