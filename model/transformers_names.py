"""The names that transformers gives to the parameters of Smalt's parts: of a SigLIP tower, and of a Llama, Qwen2 or Qwen3 decoder."""

from __future__ import annotations

_PROJECTIONS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_VISION_BLOCK = {
    **_PROJECTIONS,
    "norm1": "layer_norm1",
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_DECODER_BLOCK = {
    **_PROJECTIONS,
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "norm1": "input_layernorm",
    "out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_VISION = {
    "vision.patch_embed": "embeddings.patch_embedding",
    "vision.position": "embeddings.position_embedding.weight",
    "vision.norm": "post_layernorm",
}
_DECODER = {"language.embedding": "embed_tokens", "language.norm": "norm"}
HEAD, TRANSFORMERS_HEAD = "language.head.weight", "lm_head.weight"


def vision_name(name: str) -> str:
    """In the tower; of vision.blocks.0.up.bias, encoder.layers.0.mlp.fc1.bias."""
    return _in_block(name, "vision", "encoder.layers", _VISION_BLOCK) or _outside(name, _VISION)


def decoder_name(name: str) -> str:
    """In the decoder, the head apart; of language.blocks.0.attention.q.bias, layers.0.self_attn.q_proj.bias."""
    return _in_block(name, "language", "layers", _DECODER_BLOCK) or _outside(name, _DECODER)


def _in_block(name: str, part: str, blocks: str, leaves: dict[str, str]) -> str | None:
    if not name.startswith(f"{part}.blocks."):
        return None
    _, _, number, *_, leaf, kind = name.split(".")
    return f"{blocks}.{number}.{leaves[leaf]}.{kind}"


def _outside(name: str, names: dict[str, str]) -> str:
    own = next(own for own in names if name.startswith(own))
    return names[own] + name.removeprefix(own)
