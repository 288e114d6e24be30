"""Vocabulary projection and cross-entropy as one operation: the logits of all tokens never exist at once.

    nll[t] = logsumexp_v(hidden[t] . weight[v]) - hidden[t] . weight[labels[t]]

Rows whose label is ``IGNORE`` cost nothing: they are dropped before the product. The idea of a head without logits in memory:
Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import current_backend

IGNORE = -100
# Logits in memory at a time, in elements: 16 MiB of fp32.
CHUNK_ELEMENTS = 1 << 22


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each row's label; differentiable in hidden and weight.

    hidden_TD: [T, D]; weight_VD: [V, D]; labels: int64 [T], a class or ``IGNORE``. Returns [T] in fp32 (fp64 for fp64 input),
    0 where the label is ``IGNORE``. Raises ValueError when the shapes do not fit.
    """
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1] or labels.shape != hidden_TD.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)} and labels "
            f"{tuple(labels.shape)} do not fit; expected [T, D], [V, D] and [T]"
        )
    if current_backend() == "reference":
        return linear_cross_entropy_reference(hidden_TD, weight_VD, labels)
    rows = (labels != IGNORE).nonzero().squeeze(1)
    nll = _ChunkedNLL.apply(hidden_TD.index_select(0, rows), weight_VD, labels.index_select(0, rows))
    return nll.new_zeros(labels.shape).index_copy(0, rows, nll)


def linear_cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
    """The definition, with all logits in memory. Shapes as in :func:`linear_cross_entropy`."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits = (hidden_TD @ weight_VD.T).to(wide)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


class _ChunkedNLL(torch.autograd.Function):
    """Gradients are formed chunk by chunk in the backward pass from recomputed logits, summed in order of the chunks."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        weight_c = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(labels.shape, dtype=wide, device=hidden.device)
        lse = torch.empty_like(nll)
        for piece in _chunks(labels.shape[0], weight.shape[0]):
            logits = (hidden[piece] @ weight_c.T).to(wide)
            lse[piece] = logits.logsumexp(-1)
            nll[piece] = lse[piece] - logits.gather(1, labels[piece, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, labels, lse)
        return nll

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        hidden, weight, labels, lse = ctx.saved_tensors
        weight_c = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for piece in _chunks(labels.shape[0], weight.shape[0]):
            d_logits = ((hidden[piece] @ weight_c.T).to(lse.dtype) - lse[piece, None]).exp_()
            d_logits[torch.arange(d_logits.shape[0], device=labels.device), labels[piece]] -= 1.0
            d_logits *= grad[piece, None]
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[piece] = d_logits @ weight_c
            d_weight += (d_logits.T @ hidden[piece]).to(d_weight.dtype)
        return d_hidden, d_weight.to(weight.dtype), None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(low, min(low + size, rows)) for low in range(0, rows, size)]
