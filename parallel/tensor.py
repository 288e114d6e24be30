"""Tensor parallel with sequence parallel (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, arXiv 2205.05198).

Between blocks a rank holds its share of the rows; inside, all rows with its share of the heads, hidden units or vocabulary.
Parameters are DTensors, for FSDP and checkpoints; modules read their local part, since the kernels take plain tensors.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from smalt.kernels import IGNORE
from smalt.kernels.dispatch import current_backend
from smalt.kernels.head import cast_as_autocast_does, check_labels
from smalt.kernels.linear_statistics import statistics
from smalt.model.language import DecoderBlock, LanguageModel

from .compat import all_gather, read_parameters, reduce_scatter


def tensor_parallel(language: LanguageModel, mesh: DeviceMesh) -> None:
    """Share the parameters of the decoder over the axis ``tp``, in place, and put the exchanges of rows around its products."""
    for block in language.blocks.values():
        assert isinstance(block, DecoderBlock)
        _block(block, mesh)
    for name in ("embedding", "head"):
        if (module := getattr(language, name, None)) is not None:
            _distribute(module, mesh, Shard(0))
    if language.norm is not None:
        _distribute(language.norm, mesh, Replicate())


def _block(block: DecoderBlock, mesh: DeviceMesh) -> None:
    attention, group = block.attention, mesh.get_group()
    for column in (attention.q, attention.k, attention.v, block.gate, block.up):
        _distribute(column, mesh, Shard(0))
    for row in (attention.out, block.down):
        _distribute(row, mesh, Shard(1))
        row.register_forward_hook(partial(_scatter_rows, group))
    for norm in (block.norm1, block.norm2):
        _distribute(norm, mesh, Replicate())
        norm.register_forward_hook(partial(_gather_rows, group))
    for head_norm in (attention.q_norm, attention.k_norm):
        if head_norm is not None:
            _distribute(head_norm, mesh, Replicate())


def _scatter_rows(group: ProcessGroup, module: nn.Module, args: object, output: Tensor) -> Tensor:
    return reduce_scatter(output, group)


def _gather_rows(group: ProcessGroup, module: nn.Module, args: object, output: Tensor | tuple[Tensor, Tensor]):
    if isinstance(output, tuple):  # of a norm with a residual: the sum stays where it is
        return all_gather(output[0], group), output[1]
    return all_gather(output, group)


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make the module's parameters DTensors, of which the module sees the local part.

    A replicated one meets a part of the rows or heads on every rank, so that its gradients are to be summed.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    gradient: Placement = Partial() if placement.is_replicate() else placement
    _read_local(module, mesh, gradient)


def _read_local(module: nn.Module, mesh: DeviceMesh, gradient: Placement) -> None:
    """Let the module's parameters read as local tensors whose gradients have this placement.

    That is while FSDP has gathered them: a parameter is then on this mesh alone.
    """

    def local(parameter: nn.Parameter) -> Tensor:
        if isinstance(parameter, DTensor) and parameter.device_mesh == mesh:
            return parameter.to_local(grad_placements=[gradient])
        return parameter

    read_parameters(module, local)


def embed_tokens(weight: Tensor, tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """Embeddings of this rank's share of the rows, [T / tp, C], from its words, [V / tp, C], and the tokens of all rows, [T]."""
    own = tokens - mesh.get_local_rank() * weight.shape[0]
    inside = (own >= 0) & (own < weight.shape[0])
    x = F.embedding(own.masked_fill(~inside, 0), weight) * inside[:, None].to(weight.dtype)
    return reduce_scatter(x, mesh.get_group())


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """Negative log-likelihood [T] in nats, 0 where the label is IGNORE, the same on every rank of tp.

    hidden: this rank's rows [T / tp, C]; weight: its words [V / tp, C]; labels: of all rows, [T].
    """
    group, start = mesh.get_group(), mesh.get_local_rank() * weight.shape[0]
    check_labels("head_loss", labels, weight.shape[0] * group.size())
    rows = cast_as_autocast_does(all_gather(hidden, group))
    lse, target, *_ = statistics(rows, weight, labels, start, 1.0, None, True, current_backend(rows))
    # Every rank computes the whole loss of its rows: each takes back the gradient of its own part, and none is added.
    lses, targets = gather_replicated(torch.stack([lse, target]), mesh).unbind(1)
    ignored = labels == IGNORE
    whole = lses.masked_fill(ignored, 0.0).logsumexp(0)
    return (whole - targets.sum(0)).masked_fill(ignored, 0.0)


def gather_replicated(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The x [...] of all ranks, [size, ...], for a computation that every rank does alike."""
    return DTensor.from_local(x[None], mesh, [Shard(0)], run_check=False).redistribute(mesh, [Replicate()]).to_local()
