"""The decoder as a GGUF file, llama.cpp's form of weights: names, types and keys, written and read one tensor at a time.

Blocks of 32 numbers of a row share a scale (Q8_0: 8 bits a number, Q4_0: 4). Which tensor has which type is as llama.cpp chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from smalt.model import LanguageConfig, ModelConfig, build_model
from smalt.model.transformers_names import HEAD

from ..errors import UserError
from .load import EMBEDDING
from .settings import decoder_family

GgufType = Literal["f16", "q8_0", "q4_0"]
BLOCK = 32
_FILE_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2}  # general.file_type
_OUTSIDE = {EMBEDDING: "token_embd.weight", "language.norm.weight": "output_norm.weight", HEAD: "output.weight"}
_LEAVES = {
    "norm1": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "out": "attn_output", "norm2": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_LARGEST = 65504.0  # of float16, which the scales of blocks are too


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file. own: the parameter that it is; stored: its type, as ggml names it; heads: of a llama's queries or keys,
    whose dims llama.cpp turns in neighbouring pairs, and Smalt in halves; None for all others."""

    own: str
    shape: tuple[int, ...]
    stored: str
    heads: int | None


def gguf_library() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files are written with the library gguf, which is not installed: pip install 'smalt[gguf]'") from error
    return gguf


def gguf_layout(config: ModelConfig, kind: GgufType) -> dict[str, GgufTensor]:
    """The tensors of a decoder's file by their names there, in order. Raises UserError for a decoder that has no name in llama.cpp."""
    language, found = config.language, {}
    heads = {"q": language.num_heads, "k": language.num_kv_heads} if decoder_family(language) == "llama" else {}
    output = EMBEDDING if language.tie_embeddings else HEAD
    for own, p in build_model(config, 0, "meta").named_parameters():
        if own.startswith("language."):
            leaf = own.split(".")[-2]
            found[_gguf_name(own)] = GgufTensor(own, tuple(p.shape), _stored(p.shape, kind, own == output), heads.get(leaf))
    return found


def _gguf_name(own: str) -> str:
    if own in _OUTSIDE:
        return _OUTSIDE[own]
    _, _, number, *_, leaf, kind = own.split(".")
    return f"blk.{number}.{_LEAVES[leaf]}.{kind}"


def _stored(shape: torch.Size, kind: GgufType, output: bool) -> str:
    """Vectors stay in float32. The output matrix of a Q4_0 file has more bits: llama.cpp takes Q6_K, and Q8_0 where that does not fit;
    the library writes no Q6_K. Rows that are no whole number of blocks are float16."""
    if len(shape) == 1:
        return "F32"
    if kind != "f16" and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "q4_0" and output else kind.upper()


def model_keys(config: LanguageConfig, kind: GgufType, name: str, longest: int) -> dict[str, Any]:
    """What the file says of the model, by key. longest: tokens that it was trained on at once. Raises UserError for what llama.cpp
    lacks."""
    family = decoder_family(config)
    own = {
        "context_length": longest, "embedding_length": config.width, "block_count": config.num_layers,
        "feed_forward_length": config.ffn, "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta, "vocab_size": config.vocabulary, **_yarn_keys(config),
    }  # fmt: skip
    return {
        "general.type": "model", "general.name": name, "general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2,
        **{f"{family}.{key}": value for key, value in own.items()},
    }  # fmt: skip


def _yarn_keys(config: LanguageConfig) -> dict[str, Any]:
    yarn = config.yarn
    if yarn is None or yarn.factor == 1:
        return {}
    if not yarn.truncate:
        raise UserError("llama.cpp has no YaRN with truncate = false; export without --format gguf")
    own = {
        "type": "yarn", "factor": yarn.factor, "original_context_length": yarn.original_length,
        "yarn_beta_fast": yarn.beta_fast, "yarn_beta_slow": yarn.beta_slow,
    }  # fmt: skip
    if yarn.attention_factor is not None:  # there a factor beside that of YaRN's paper
        own["attn_factor"] = yarn.attention_factor / (0.1 * math.log(yarn.factor) + 1)
    return {f"rope.scaling.{key}": value for key, value in own.items()}


def write_gguf(path: Path, family: str, keys: dict[str, Any], layout: dict[str, GgufTensor], tensor: Callable[[str], Tensor]) -> None:
    """Write a new file. tensor: gives a parameter, on the CPU, when its turn comes.

    Raises UserError for numbers that float16 does not hold, OSError where the disk fails.
    """
    gguf = gguf_library()
    writer = gguf.GGUFWriter(path, family)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        add[type(value)](key, value)
    for name, one in layout.items():
        kind = gguf.GGMLQuantizationType[one.stored]
        writer.add_tensor_info(name, one.shape, np.dtype(np.float32), _num_bytes(gguf, one, kind), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in layout.values():
            value = tensor(one.own).float()
            if one.stored != "F32" and not value.abs().max() <= _LARGEST:
                raise UserError(f"{one.own} has numbers beyond {_LARGEST:.0f}, which {one.stored} does not hold")
            writer.write_tensor_data(gguf.quantize(_to_pairs(value, one.heads).numpy(), gguf.GGMLQuantizationType[one.stored]))
    finally:
        writer.close()


def read_gguf(path: Path, layout: dict[str, GgufTensor]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of a file of that layout by Smalt's name, dequantised to float32."""
    gguf = gguf_library()
    for stored in gguf.GGUFReader(path).tensors:
        one = layout[stored.name]
        value = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()).view(one.shape)
        yield one.own, _to_halves(value, one.heads)


def _num_bytes(gguf: Any, one: GgufTensor, kind: Any) -> int:
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(one.shape) // per_block * size


def _to_pairs(weight: Tensor, heads: int | None) -> Tensor:
    """Rows (head, half, pair) in the order (head, pair, half)."""
    return weight if heads is None else weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _to_halves(weight: Tensor, heads: int | None) -> Tensor:
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
