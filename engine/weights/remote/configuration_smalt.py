"""The config of a model that Smalt trained: a SigLIP tower over tiles, a projector, and a Llama, Qwen2 or Qwen3 decoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class SmaltConfig(PretrainedConfig):
    """text_config, vision_config: of transformers' own classes, or as dicts.

    projector_hidden_size: of the projector's two-layer MLP, the decoder's width when None; spatial_merge_size: as many patches each
    way become one token; image_attention: "bidirectional", where the tokens of one image see each other, or "causal"; the three
    token ids: of <|image|>, <think> and </think>.
    """

    model_type = "smalt"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_hidden_size: int | None = None,
        spatial_merge_size: int = 2,
        image_attention: str = "bidirectional",
        image_token_id: int = 0,
        think_start_token_id: int = 0,
        think_end_token_id: int = 0,
        **kwargs: Any,
    ):
        self.text_config = _config(text_config, "qwen3")
        self.vision_config = _config(vision_config, "siglip_vision_model")
        self.projector_hidden_size = projector_hidden_size or self.text_config.hidden_size
        self.spatial_merge_size = spatial_merge_size
        self.image_attention = image_attention
        self.image_token_id = image_token_id
        self.think_start_token_id, self.think_end_token_id = think_start_token_id, think_end_token_id
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that a tile takes in the decoder; a grid that does not divide is padded."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return (-(-grid // self.spatial_merge_size)) ** 2


def _config(given: PretrainedConfig | dict[str, Any] | None, kind: str) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    return AutoConfig.for_model(**{"model_type": kind, **(given or {})})
