"""The operations of the model, each a plain function of tensors. Needs only torch; knows no process group."""

from .activations import gelu, swiglu
from .attention import AttentionPlan, attention, attention_plan, decode_attention
from .dispatch import BACKENDS, backend, current_backend
from .layer_norm import layer_norm
from .linear_cross_entropy import IGNORE, linear_cross_entropy
from .rms_norm import rms_norm
from .rotary import rotary, rotary_table

__all__ = [
    "BACKENDS",
    "IGNORE",
    "AttentionPlan",
    "attention",
    "attention_plan",
    "backend",
    "current_backend",
    "decode_attention",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_table",
    "swiglu",
]
