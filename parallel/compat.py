"""Every private name of torch that Smalt uses, in one place; tests/parallel/test_compat.py holds them against the installed torch."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup

# The keys, in the metadata of a safetensors file, under which torch's HuggingFaceStorageReader finds where in the whole tensor
# a piece begins. The reader is public; the words of the format that it reads are not.
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY as PIECES_KEY
from torch.distributed.checkpoint._hf_utils import SAVED_OFFSETS_KEY as OFFSETS_KEY
from torch.distributed.fsdp import FSDPModule

# How FSDP2 marks a dim that tensor parallelism has cut before it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

import smalt.kernels  # noqa: F401 - registers its operators

__all__ = ["OFFSETS_KEY", "PIECES_KEY", "StridedShard"]

# From 2.12 on; before, the names without "single". They return at once and wait where their result is first used.
_all_gather: Any = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_reduce_scatter: Any = getattr(collectives, "reduce_scatter_single_autograd", None) or collectives.reduce_scatter_tensor_autograd
_all_to_all: Any = collectives.all_to_all_single_autograd
# The operators below them launch in one call and wait in another, in compiled code too. The backward pass of the functions above
# waits in the node that launches, so that nothing can be computed meanwhile.
_operators: Any = torch.ops._c10d_functional

# Operators whose results selective activation checkpointing keeps: products, attention, exchanges.
_aten = torch.ops.aten
DEAR = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
    torch.ops.smalt.attention.default, _operators.reduce_scatter_tensor.default, _operators.all_to_all_single.default,
}  # fmt: skip


def read_parameters(module: torch.nn.Module, view: Callable[[torch.nn.Parameter], Tensor]) -> None:
    """Give the module a class of its own, in which its own parameters read as a view of them (``Module._parameters``).

    ``named_parameters`` and what registers parameters still see them as they are.
    """

    def reading(name: str) -> property:
        def read(self: torch.nn.Module) -> Tensor | None:
            parameter = self._parameters[name]
            return None if parameter is None else view(parameter)

        return property(read)

    if module._parameters:
        members = {name: reading(name) for name in module._parameters}
        module.__class__ = type(module.__class__.__name__, (module.__class__,), members)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The x [n, ...] of all ranks of the group, [size * n, ...], in their order; backward sums the gradients of all ranks."""
    return _all_gather(x.contiguous(), 0, group)


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's part [n, ...] of the sum of the x [size * n, ...] of all ranks; backward gathers."""
    return _reduce_scatter(x.contiguous(), "sum", 0, group)


def all_to_all(x: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup) -> Tensor:
    """Rows of x to other ranks, ``send[r]`` of them to rank r, and ``receive[r]`` from it, in order; backward sends gradients back."""
    return _all_to_all(x.contiguous(), list(receive), list(send), group)


def launch_all_gather(x: Tensor, group_name: str, size: int) -> Tensor:
    """:func:`all_gather` without a gradient, under way: what it returns may be read after :func:`finish`."""
    return _operators.all_gather_into_tensor(x.contiguous(), size, group_name)


def launch_reduce_scatter(x: Tensor, group_name: str, size: int) -> Tensor:
    """:func:`reduce_scatter` without a gradient, under way: what it returns may be read after :func:`finish`."""
    return _operators.reduce_scatter_tensor(x.contiguous(), "sum", size, group_name)


def finish(launched: Tensor) -> Tensor:
    """The same tensor when its collective is done; on a GPU the stream waits, not the host."""
    return _operators.wait_tensor(launched)


def gathered_axis_by_axis() -> AbstractContextManager[None]:
    """Inside, DTensor gathers a tensor that two axes cut in two collectives (``disable_redistribute_transform_optimization``).

    That is all it can do with StridedShard, but newer versions look for one collective first, and warn on every rank that there is
    none; gathers of the whole model are too few to matter.
    """
    module = importlib.import_module("torch.distributed.tensor._redistribute")
    return getattr(module, "disable_redistribute_transform_optimization", nullcontext)()


def set_group_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """How long a collective of a group may take (``_set_pg_timeout``): the groups of a mesh have torch's default, half an hour."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def set_memory_budget(share: float) -> None:
    """The share of activations that compiled code keeps (``activation_memory_budget``)."""
    import torch._functorch.config as config

    config.activation_memory_budget = share


def donate_buffers(on: bool) -> None:
    """Whether compiled code may write over saved activations (``donated_buffer``): a backward pass cut in two reads them twice."""
    import torch._functorch.config as config

    config.donated_buffer = on


def set_async_tp(group: ProcessGroup | None) -> None:
    """Let compiled code run collectives of a group inside the products beside them, or of none (``_micro_pipeline_tp``)."""
    import torch._inductor.config as config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    config._micro_pipeline_tp = group is not None
    if group is not None:
        enable_symm_mem_for_group(group.group_name)


def forget_meshes() -> None:
    """Forget what torch has found out of meshes (``_clear_sharding_prop_cache``). It takes those of one shape over the same ranks for
    one mesh, groups and all, and the groups of the one before are gone."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """Multiply all of them in place (``_foreach_mul_``)."""
    torch._foreach_mul_(gradients, factor)


@contextmanager
def fake_process_group(rank: int, size: int) -> Iterator[None]:
    """A default process group of any size in one process, whose collectives do nothing (``FakeStore``), for what is only counted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_unshard_async(model: torch.nn.Module, on: bool) -> None:
    """Let FSDP2's own all-gathers, prefetched ones among them, return before they are done (``FSDPModule._set_unshard_async_op``).

    On a GPU they run on streams and need no such thing. On a CPU FSDP2 waits for each all-gather where it launches it, so that
    prefetching hides nothing without this; the public ``unshard(async_op=True)`` does not reach the prefetches of FSDP2 itself.
    """
    if isinstance(model, FSDPModule):
        model._set_unshard_async_op(on)


def widen_gradients(model: torch.nn.Module) -> None:
    """Add the gradients that a backward pass has left with FSDP2's gathered weights, in the weights' narrow dtype, to its wide sums
    (``FSDPParam.accumulate_unsharded_grad_if_needed``, ``to_accumulated_grad_if_needed``)."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def record_collectives() -> None:
    """Ask torch to record collectives; call before the process group is made. A size that the user set stays."""
    # TORCH_FR_BUFFER_SIZE, entries of the flight recorder, has had different defaults; 0 turns it off.
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def recorded_collectives(stacks: bool) -> list[dict[str, Any]]:
    """The newest collectives of this process as torch's flight recorders have them, oldest first; empty where nothing is recorded.

    stacks: with the Python frames that issued each, innermost first, under ``frames``; the first such call imports torch._inductor.
    """
    # _dump_fr_trace: the recorder of gloo; _dump_nccl_trace: NCCL's own, in builds that have NCCL. Their JSON forms have no frames.
    # What they return is a pickle of plain lists and numbers that this process has just made.
    c10d = importlib.import_module("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    for name in ("_dump_fr_trace", "_dump_nccl_trace"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            entries += pickle.loads(dump(True, stacks, False)).get("entries", [])
    return entries


def own_connection(store: dist.Store) -> dist.Store:
    """A second connection to the same store: a call that blocks on the first does not block it."""
    # clone is public, but torch's type stubs lack it.
    return store.clone()  # type: ignore[attr-defined]
