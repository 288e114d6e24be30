"""Models of transformers as exact as Smalt's are in float64. Imports nothing of Smalt: it is run where there is none, too."""

from unittest.mock import patch

import torch


def randomised(model, seed=0):
    """Large weights: norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.7)
    return model.double().eval()


def exactly(model):
    """transformers computes norms and angles in float32 whatever the dtype; here in float64, by the same formulas."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = lambda x, m=module: m.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.variance_epsilon)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = _angles(module.config)
    return model


def _angles(config):
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies, magnitude = config.rope_parameters["rope_theta"] ** -half, 1.0
    if config.rope_parameters["rope_type"] == "yarn":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        with patch.object(torch, "float", torch.float64), patch.object(torch, "float32", torch.float64):
            frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
        assert frequencies.dtype == torch.float64

    def forward(x, position_ids):
        once = position_ids[..., None].double() * frequencies
        both = torch.cat([once, once], -1)
        return both.cos() * magnitude, both.sin() * magnitude

    return forward
