"""The files beside the weights of an exported model or part, by which transformers builds its model, tokenizer and processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from smalt.model import ModelConfig

from .folder import CONFIG
from .load import Part
from .settings import language_json, vision_json

TOKENIZER = "tokenizer.json"
_REMOTE = Path(__file__).parent / "remote"
# What ChatEncoder.prompt of data/chat.py makes of conversations.
CHAT_TEMPLATE = _REMOTE / "chat_template.jinja"
_CODE = ("configuration_smalt.py", "modeling_smalt.py", "processing_smalt.py", "tiling_smalt.py")


def files_beside(config: ModelConfig, part: Part | None, tokenizer: bytes, longest: int, dtype: str) -> dict[str, bytes]:
    """Contents by name. part: of the model, all of it when None; tokenizer: a tokenizer.json; longest: tokens that the model was
    trained on at once.

    Raises UserError for a part that no class of transformers has.
    """
    if part == "vision":
        return {CONFIG: _json(vision_json(config.vision, dtype)), "preprocessor_config.json": _json(_processor(config.vision.tile))}
    ids = {token: Tokenizer.from_buffer(tokenizer).token_to_id(token) for token in ("<|end|>", "<|image|>", "<think>", "</think>")}
    end = ids["<|end|>"]
    language = language_json(config.language, longest, end, dtype)
    text = {
        CONFIG: _json(language),
        "generation_config.json": _json({"eos_token_id": end, "pad_token_id": end}),
        TOKENIZER: tokenizer,
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>", "padding_side": "left",
                "model_max_length": longest, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE.read_text(),
            }
        ),
    }  # fmt: skip
    if part == "language":
        return text
    return text | {
        CONFIG: _json(_whole(config, language, ids, dtype)),
        "processor_config.json": _json(
            {
                "processor_class": "SmaltProcessor", "auto_map": {"AutoProcessor": "processing_smalt.SmaltProcessor"},
                "tile": config.vision.tile, "tokens_per_tile": config.vision.tokens_per_tile, **config.tiling.model_dump(),
            }
        ),
        **{path.name: path.read_bytes() for path in (CHAT_TEMPLATE, *(_REMOTE / name for name in _CODE))},
    }  # fmt: skip


def _whole(config: ModelConfig, language: Mapping[str, Any], ids: Mapping[str, int | None], dtype: str) -> dict[str, Any]:
    # Padded rows are masked; with a padding token the end token, which it is, would have no gradient in training.
    text = {key: value for key, value in language.items() if key not in ("architectures", "pad_token_id")}
    return {
        "architectures": ["SmaltForConditionalGeneration"], "model_type": "smalt",
        "auto_map": {
            "AutoConfig": "configuration_smalt.SmaltConfig",
            "AutoModelForImageTextToText": "modeling_smalt.SmaltForConditionalGeneration",
        },
        "text_config": text,
        "vision_config": {key: value for key, value in vision_json(config.vision, dtype).items() if key != "architectures"},
        "projector_hidden_size": config.projector_width or config.language.width, "spatial_merge_size": config.vision.merge,
        "image_attention": config.image_attention, "image_token_id": ids["<|image|>"], "think_start_token_id": ids["<think>"],
        "think_end_token_id": ids["</think>"], "tie_word_embeddings": config.language.tie_embeddings, "torch_dtype": dtype,
    }  # fmt: skip


def _processor(tile: int) -> dict[str, Any]:
    """Images as squares of a tile's side, from -1 to 1."""
    bicubic, half = 3, [0.5, 0.5, 0.5]
    return {
        "image_processor_type": "SiglipImageProcessor", "size": {"height": tile, "width": tile}, "resample": bicubic,
        "do_rescale": True, "do_normalize": True, "image_mean": half, "image_std": half, "do_convert_rgb": True,
    }  # fmt: skip


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
