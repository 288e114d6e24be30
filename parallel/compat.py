"""The private names of torch that Smalt uses, each with what it is for."""

# How FSDP2 marks a dim that tensor parallelism has cut before it (torch/distributed/tensor/placement_types.py).
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

__all__ = ["StridedShard"]
