"""The operations of the model and its training, each a plain function of tensors. Needs torch and triton; knows no process group."""

from .adamw import AdamW
from .attention import AttentionPlan, attention, attention_plan, merge_attention
from .decode_attention import decode_attention
from .dispatch import BACKENDS, backend, current_backend
from .gelu import geglu, geglu_packed, gelu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy
from .linear_distillation import linear_distillation
from .linear_statistics import IGNORE, HeadStatistics, linear_statistics, merge_statistics
from .matmul import matmul
from .policy_loss import (
    FORCED,
    SAMPLED,
    PolicyLossOptions,
    PolicyMetrics,
    loss_denominator,
    policy_loss,
    sequence_log_ratio_sums,
    sequence_tokens,
    token_weights,
)
from .rms_norm import rms_norm
from .rotary import rotary
from .rotary_tables import YarnScaling, mrope_table, rotary_table, rotary_table_2d
from .swiglu import swiglu, swiglu_packed

__all__ = [
    "BACKENDS",
    "FORCED",
    "IGNORE",
    "SAMPLED",
    "AdamW",
    "AttentionPlan",
    "HeadStatistics",
    "PolicyLossOptions",
    "PolicyMetrics",
    "YarnScaling",
    "attention",
    "attention_plan",
    "backend",
    "current_backend",
    "decode_attention",
    "geglu",
    "geglu_packed",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_statistics",
    "loss_denominator",
    "matmul",
    "merge_attention",
    "merge_statistics",
    "mrope_table",
    "policy_loss",
    "rms_norm",
    "rotary",
    "rotary_table",
    "rotary_table_2d",
    "sequence_log_ratio_sums",
    "sequence_tokens",
    "swiglu",
    "swiglu_packed",
    "token_weights",
]
