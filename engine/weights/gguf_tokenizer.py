"""A tokenizer.json as the keys ``tokenizer.ggml.*`` of a GGUF file, for byte-level BPE: llama.cpp's tokenizer "gpt2".

A GGUF file does not say how text is split before merges are applied; it names one of the ways that are written into llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
_SINGLE_PUNCTUATION = {"type": "Punctuation", "behavior": "Isolated"}
_WORD = re.compile("Ġ?[A-Za-z]+")
_OWN_WAY = [_SINGLE_DIGITS, _SINGLE_PUNCTUATION, _BYTES]


def _by_pattern(number: str) -> list[dict[str, Any]]:
    """Split as Qwen and Llama 3 do, which differ in how they take digits."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES | {"use_regex": False}]


# llama.cpp's name of each way of splitting.
_WAYS = {
    "gpt-2": [_BYTES],
    "smollm": [_SINGLE_DIGITS, _BYTES],
    "qwen2": _by_pattern(r"\p{N}"),
    "llama-bpe": _by_pattern(r"\p{N}{1,3}"),
}


def tokenizer_keys(tokenizer: bytes, vocabulary: int) -> dict[str, Any]:
    """Keys and values for the contents of a tokenizer.json and a model with so many rows of the vocabulary.

    Rows without a token become unused tokens. Raises UserError for a tokenizer that llama.cpp would apply otherwise.
    """
    raw = json.loads(tokenizer)
    model = raw["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges") or ()]
    plain = not (model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model.get("type") != "BPE" or not plain or not merges:
        raise UserError(
            f"data.tokenizer is {model.get('type')} in a form that is not written to GGUF; only byte-level BPE with merges is. "
            "Export without --format gguf"
        )
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [_UNUSED] * vocabulary
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, _NORMAL
    for added in raw.get("added_tokens") or ():
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _way_of_splitting(raw, merges),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _way_of_splitting(raw: Mapping[str, Any], merges: Sequence[tuple[str, ...]]) -> str:
    way = _steps(raw.get("pre_tokenizer") or {})
    ignores_merges = bool(raw["model"].get("ignore_merges"))  # of words that are one token whole, as llama.cpp does for Llama 3 alone
    if (raw.get("normalizer") or {"type": "NFC"})["type"] == "NFC":
        for name, steps in _WAYS.items():
            if way == steps and ignores_merges == (name == "llama-bpe"):
                return name
        # Where merges make words of ASCII letters alone, with or without a space before them, the tokens are the same however text is
        # split, as long as no such word is cut. This way of llama.cpp cuts none, not even at an apostrophe.
        if way == _OWN_WAY and not ignores_merges and all(_WORD.fullmatch("".join(merge)) for merge in merges):
            return "deepseek-coder"
    raise UserError(
        "data.tokenizer splits text in a way that llama.cpp does not have; those of GPT-2, SmolLM, Qwen2, Llama 3 and of "
        "`smalt data digits` are written to GGUF. Export without --format gguf"
    )


def _steps(pre_tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of splitting, without what changes no token."""
    own = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in own]
