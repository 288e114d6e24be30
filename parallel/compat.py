"""Every private name of torch that Smalt uses, in one place; tests/parallel/test_compat.py holds them against the installed torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

# How FSDP2 marks a dim that tensor parallelism has cut before it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard"]

# From 2.12 on; before, the names without "single". They return at once and wait where their result is first used.
_all_gather: Any = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_reduce_scatter: Any = getattr(collectives, "reduce_scatter_single_autograd", None) or collectives.reduce_scatter_tensor_autograd
_all_to_all: Any = collectives.all_to_all_single_autograd
# The operators below them launch in one call and wait in another, in compiled code too. The backward pass of the functions above
# waits in the node that launches, so that nothing can be computed meanwhile.
_operators: Any = torch.ops._c10d_functional


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


def set_memory_budget(share: float) -> None:
    """The share of activations that compiled code keeps (``activation_memory_budget``)."""
    import torch._functorch.config as config

    config.activation_memory_budget = share


def keep_buffers() -> None:
    """Compiled code leaves saved activations alone, for a backward pass that is cut in two reads them twice (``donated_buffer``)."""
    import torch._functorch.config as config

    config.donated_buffer = False


def enable_async_tp(group: ProcessGroup) -> None:
    """Let compiled code run collectives inside the products beside them (``_micro_pipeline_tp``)."""
    import torch._inductor.config as config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)


def scale_gradients(gradients: list[Tensor], factor: float) -> None:
    """Multiply all of them in place (``_foreach_mul_``)."""
    torch._foreach_mul_(gradients, factor)


def set_unshard_async(model: torch.nn.Module, on: bool) -> None:
    """Let FSDP2's own all-gathers, prefetched ones among them, return before they are done (``FSDPModule._set_unshard_async_op``).

    On a GPU they run on streams and need no such thing. On a CPU FSDP2 waits for each all-gather where it launches it, so that
    prefetching hides nothing without this; the public ``unshard(async_op=True)`` does not reach the prefetches of FSDP2 itself.
    """
    if isinstance(model, FSDPModule):
        model._set_unshard_async_op(on)


def flight_records() -> list[dict[str, Any]]:
    """What gloo's flight recorder holds (``torch._C._distributed_c10d._dump_fr_trace_json``): the newest launches of this process.

    Of each: record_id, profiling_name ("gloo:all_gather"), process_group (name, description), time_created_ns (Unix time),
    input_sizes, output_sizes, input_dtypes. It holds TORCH_FR_BUFFER_SIZE of them, 2000 by default; send and recv are not among
    them. The profiler says nothing of process groups where the backend is gloo, so this is where they come from.
    """
    import torch._C._distributed_c10d as c10d

    # The stubs of torch lack it.
    dump: Any = getattr(c10d, "_dump_fr_trace_json")  # noqa: B009
    return json.loads(dump(True, False)).get("entries", [])
