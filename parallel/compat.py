"""The private names of torch that Smalt uses, each in one function that says what for."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


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
