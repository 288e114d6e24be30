"""Vocabulary projection and cross-entropy as one operation: the logits of all tokens never exist at once.

    nll[t] = lse[t] - z[t, labels[t]] + z_loss lse[t]^2,   z = the logits, lse = logsumexp_v(z)

A small function of linear_statistics.py, where the formulas are. The z-loss is that of Chowdhery et al. 2022 (arXiv 2204.02311,
section 5). Rows whose label is ``IGNORE`` cost nothing in plain torch, which drops them before the product; the kernels, which must
not wait to see how many there are, skip blocks of rows that have none else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import current_backend
from .head import IGNORE, cast_as_autocast_does, check_head, check_labels, head_logits
from .linear_statistics import statistics


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Negative log-likelihood in nats of each row's label, plus z_loss * lse^2; differentiable in hidden and weight.

    hidden_TD: [T, D], cast first where autocast is on; weight_VD: [V, D] of any float dtype, multiplied in hidden's; labels:
    int64 [T], a word or ``IGNORE``. Returns [T] in fp32 (fp64 for fp64 input), 0 where the label is ``IGNORE``; such a row gets
    exactly no gradient. Raises ValueError when the shapes or the dtype of labels do not fit, temperature or softcap is not
    positive, or, on a CPU, a label is out of range; elsewhere the loss of such a row is NaN. Liger has no temperature: with one,
    Smalt's kernels run.
    """
    check_head("linear_cross_entropy", hidden_TD, weight_VD, labels, temperature, softcap)
    checked = check_labels("linear_cross_entropy", labels, weight_VD.shape[0])
    hidden_TD = cast_as_autocast_does(hidden_TD)
    implementation = current_backend(hidden_TD)
    if implementation == "reference":
        return linear_cross_entropy_reference(hidden_TD, weight_VD, labels, temperature, softcap, z_loss)
    if implementation == "liger" and temperature == 1.0:
        return _liger(hidden_TD, weight_VD, labels, softcap, z_loss)
    lse, target, *_ = statistics(hidden_TD, weight_VD, labels, 0, temperature, softcap, True, implementation)
    ignored = labels == IGNORE
    lse = lse.masked_fill(ignored, 0.0)
    nll = lse - target
    if z_loss:
        nll = nll + z_loss * lse.square()
    if not checked:
        nll = nll.masked_fill(~ignored & ((labels < 0) | (labels >= weight_VD.shape[0])), torch.nan)
    return nll


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The definition, with all logits in memory. Arguments as in :func:`linear_cross_entropy`."""
    z = head_logits(hidden_TD, weight_VD.to(hidden_TD.dtype), temperature, softcap)
    nll = F.cross_entropy(z, labels, ignore_index=IGNORE, reduction="none")
    return nll + z_loss * z.logsumexp(-1).square().masked_fill(labels == IGNORE, 0.0)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, z_loss: float) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as Function

    # reduction "none" recomputes the logits in its backward pass, so that upstream gradients count token by token.
    words = weight.to(hidden.dtype)
    return Function.apply(hidden, words, labels, None, None, IGNORE, z_loss, 0.0, "none", softcap, False, torch.float32)[0]
