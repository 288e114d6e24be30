"""Smalt's model as transformers has it, to measure against: the same sizes, the same parameters, the same loss.

InternVL is an architecture of transformers that merges 2 x 2 patches by pixel shuffle in front of a two-layer projector. Given
a SigLIP tower and a Llama decoder of Smalt's sizes, and without its projector's LayerNorm, which Smalt lacks, its parameters
are Smalt's to the last one.
"""

from __future__ import annotations

import torch
from torch import nn

from smalt.model import ModelConfig, MultimodalModel
from smalt.model.transformers_names import HEAD, TRANSFORMERS_HEAD, decoder_name, vision_name


def check_comparable(config: ModelConfig) -> None:
    """Raises ValueError for a model that transformers cannot build alike."""
    language, vision = config.language, config.vision
    if language.qkv_bias or language.qk_norm or config.projector_width not in (None, language.width) or vision.merge != 2:
        raise ValueError("the model to compare with has no qkv_bias or qk_norm, a projector of the language width, and merge 2")
    if vision.grid % 2:
        raise ValueError(f"the model to compare with merges patches of an even grid; this one has {vision.grid} x {vision.grid}")


def build_internvl(smalt: MultimodalModel, image_token: int) -> nn.Module:
    """InternVL of Smalt's sizes with a copy of its weights, in its own dtype, fp32, and with SDPA attention.

    image_token: the id that stands in the image rows of ``input_ids``. Raises ImportError without transformers.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

    v, t = smalt.config.vision, smalt.config.language
    vision = SiglipVisionConfig(
        hidden_size=v.width, intermediate_size=v.ffn, num_hidden_layers=v.num_layers, num_attention_heads=v.num_heads,
        image_size=v.tile, patch_size=v.patch, layer_norm_eps=v.norm_eps, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=t.vocabulary, hidden_size=t.width, intermediate_size=t.ffn, num_hidden_layers=t.num_layers,
        num_attention_heads=t.num_heads, num_key_value_heads=t.num_kv_heads, head_dim=t.head_dim, rms_norm_eps=t.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": t.rope_theta}, tie_word_embeddings=t.tie_embeddings,
        use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = InternVLConfig(  # type: ignore[call-arg]
        vision_config=vision, text_config=text, image_token_id=image_token, image_seq_length=v.tokens_per_tile,
        downsample_ratio=0.5, vision_feature_select_strategy="full", projector_hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=t.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config)
    model.model.multi_modal_projector.layer_norm = nn.Identity()
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in smalt.named_parameters():
            target = theirs[internvl_name(name)]
            target.copy_(parameter.view_as(target))
    return model.train()


_PROJECTOR = {"projector.up": "linear_1", "projector.down": "linear_2"}


def internvl_name(name: str) -> str:
    """InternVL's name of Smalt's parameter: of vision.blocks.0.up.bias, model.vision_tower.encoder.layers.0.mlp.fc1.bias."""
    if name == HEAD:
        return TRANSFORMERS_HEAD
    part, _, kind = name.rpartition(".")
    if part in _PROJECTOR:
        return f"model.multi_modal_projector.{_PROJECTOR[part]}.{kind}"
    if name.startswith("vision."):
        return f"model.vision_tower.{vision_name(name)}"
    return f"model.language_model.{decoder_name(name)}"
