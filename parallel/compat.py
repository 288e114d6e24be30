"""Everything of torch that is private and that Smalt uses, each name with what it is for."""

from __future__ import annotations

import importlib
import os
import pickle
from typing import Any

import torch.distributed as dist


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
