"""The config.json of a Hugging Face folder and the sections model.language and model.vision: one made of the other, and compared.

Keys and the values that they have when they are left out are those of transformers' LlamaConfig, Qwen2Config, Qwen3Config,
SiglipVisionConfig and Siglip2VisionConfig, of versions 4 and 5, which differ in where they keep the base of RoPE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from smalt.model import FrozenSection, LanguageConfig, VisionConfig, YarnConfig

from ..errors import UserError

_LANGUAGE_KEYS = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocabulary": "vocab_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_VISION_KEYS = {
    "num_layers": "num_hidden_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "patch": "patch_size",
    "tile": "image_size",
    "norm_eps": "layer_norm_eps",
}
# What tells the kinds of decoder apart.
_FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_LANGUAGE_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 16, "num_patches": 256, "layer_norm_eps": 1e-6,
}  # fmt: skip
_TOWERS = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
_COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
    "patch_size", "image_size", "num_patches",
)  # fmt: skip
_DEFAULT_THETA = 10_000.0
_YARN_KEYS = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
_MSCALE = ("mscale", "mscale_all_dim")
# The values that a key may have where it is there: Smalt's model has no other form of it.
_ONLY_LANGUAGE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
_ONLY_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "quantization_config": (None,),
}
# Roundings of float32 in a config.json, as of files that were converted from GGUF.
_TOLERANCE = 1e-6


def language_config(raw: Mapping[str, Any], where: str) -> LanguageConfig:
    """The section model.language that a config.json describes.

    where: begins the message of the UserError, which lists every key that is missing or asks for what Smalt's decoder cannot do.
    """
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}; a language model is one of {', '.join(_FAMILIES)}")
    _check_counts(raw, where)
    rope, wrong = _rope(raw), list(_unsupported(raw, _ONLY_LANGUAGE))
    yarn = _yarn(raw, rope, wrong)
    if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"layer_types has {', '.join(sorted(other))}; only full_attention is supported")
    values = {**_LANGUAGE_DEFAULTS, **_sizes_left_out(raw, family), **_given(raw), "rope_theta": rope["rope_theta"]}
    return LanguageConfig(**_section(values, _LANGUAGE_KEYS, wrong, where, LanguageConfig), **_FAMILIES[family], yarn=yarn)


def vision_config(raw: Mapping[str, Any], where: str) -> VisionConfig:
    """The section model.vision that a config.json describes, of a tower alone or of a whole SigLIP; its tile is the grid of patches.
    Raises UserError as :func:`language_config` does."""
    kind = raw.get("model_type")
    if kind in _TOWERS:
        raw = {"model_type": _TOWERS[kind], **(raw.get("vision_config") or {})}
        kind = raw["model_type"]
    if kind not in _TOWERS.values():
        known = ", ".join([*_TOWERS, *_TOWERS.values()])
        raise UserError(f"{where}: model_type is {kind!r}; a vision tower is one of {known}")
    _check_counts(raw, where)
    wrong, values = list(_unsupported(raw, _ONLY_VISION)), {**_VISION_DEFAULTS, **_given(raw)}
    grid = values["image_size"] // values["patch_size"]
    if is_naflex(raw):
        grid = math.isqrt(values["num_patches"])
        if grid**2 != values["num_patches"]:
            wrong.append(f"num_patches is {values['num_patches']}, which is no square")
    values["image_size"] = grid * values["patch_size"]
    return VisionConfig(**_section(values, _VISION_KEYS, wrong, where, VisionConfig))


def is_tower(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision tower, or has one."""
    return raw.get("model_type") in (*_TOWERS, *_TOWERS.values())


def is_naflex(raw: Mapping[str, Any]) -> bool:
    """Whether the tower is SigLIP2's for images of any shape, whose patches come with their channels last."""
    return raw.get("model_type") in ("siglip2", "siglip2_vision_model")


def language_differences(own: LanguageConfig, theirs: LanguageConfig) -> list[str]:
    """In what a decoder differs from that of a folder, a line each. A larger vocabulary does not count."""
    wrong = [key for key in _different(own, theirs) if key != "vocabulary" or own.vocabulary < theirs.vocabulary]
    return _lines("model.language", own, theirs, wrong)


def vision_differences(own: VisionConfig, theirs: VisionConfig) -> list[str]:
    """In what a tower differs from that of a folder, a line each. How patches are merged does not count."""
    return _lines("model.vision", own, theirs, [key for key in _different(own, theirs) if key != "merge"])


def language_json(config: LanguageConfig, longest: int, end_token: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of a decoder, for versions 4 and 5 of transformers.

    longest: tokens that it was trained on at once. Raises UserError for a decoder that no class of transformers has.
    """
    family, scaling = decoder_family(config), _scaling(config.yarn)
    return {
        "architectures": [_CLASSES[family]], "model_type": family,
        **{key: getattr(config, field) for field, key in _LANGUAGE_KEYS.items()},
        # Version 4 reads rope_scaling, and rope_theta beside it; version 5 rope_parameters.
        "rope_parameters": {"rope_theta": config.rope_theta, **scaling}, **({"rope_scaling": scaling} if config.yarn else {}),
        "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": longest, "use_cache": True,
        "bos_token_id": None, "eos_token_id": end_token, "pad_token_id": end_token, "torch_dtype": dtype,
    }  # fmt: skip


def decoder_family(config: LanguageConfig) -> str:
    """The family that has a decoder's features: llama, qwen2 or qwen3. Raises UserError for a decoder that is of none."""
    own = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm}
    family = next((name for name, features in _FAMILIES.items() if features == own), None)
    if family is None:
        raise UserError(
            "transformers has no decoder with both model.language.qkv_bias and qk_norm; export the run with --format smalt"
        )
    if family == "llama" and config.width % config.num_heads:
        raise UserError(
            f"transformers' Llama needs a hidden size, here {config.width}, that is a multiple of its heads, here {config.num_heads}; "
            "export the run with --format smalt"
        )
    return family


def _scaling(yarn: YarnConfig | None) -> dict[str, Any]:
    if yarn is None:
        return {"rope_type": "default"}
    return {"rope_type": "yarn", **{_YARN_KEYS[key]: value for key, value in yarn.model_dump(exclude_none=True).items()}}


def vision_json(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a SigLIP tower without a pooling head."""
    return {
        "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
        **{key: getattr(config, field) for field, key in _VISION_KEYS.items()},
        "hidden_act": "gelu_pytorch_tanh", "num_channels": 3, "vision_use_head": False, "torch_dtype": dtype,
    }  # fmt: skip


def spelled(value: Any) -> str:
    """A value of a config as TOML has it; a section is an inline table."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {spelled(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def _check_counts(raw: Mapping[str, Any], where: str) -> None:
    """Raise UserError with every size that is no whole number above 0; those that are null count as left out."""
    given = {key: raw[key] for key in _COUNTS if raw.get(key) is not None}
    if wrong := [f"{key} is {value!r}" for key, value in given.items() if type(value) is not int or value < 1]:
        raise UserError(f"{where}: {', '.join(wrong)}; sizes are whole numbers above 0")


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Base and kind of RoPE, from where versions 4 and 5 of transformers keep them."""
    return {
        "rope_theta": raw.get("rope_theta", _DEFAULT_THETA),
        **(raw.get("rope_scaling") or {}),
        **(raw.get("rope_parameters") or {}),
    }


def _yarn(raw: Mapping[str, Any], rope: Mapping[str, Any], wrong: list[str]) -> YarnConfig | None:
    """The YaRN that rope_scaling or rope_parameters asks for; adds to ``wrong`` what Smalt has no form of, by its key.

    As transformers has it: without original_max_position_embeddings the weights were trained on max_position_embeddings, and of mscale
    and mscale_all_dim together attention_factor is the quotient.
    """
    place = "rope_scaling or rope_parameters"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        wrong.append(f"{place} has partial_rotary_factor {rope['partial_rotary_factor']!r}; only 1.0 is supported")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) == "default":
        return None
    if kind != "yarn":
        wrong.append(f"{place} asks for rope_type {kind!r}; only 'default' and 'yarn' are supported")
        return None
    # Null means left out, but for truncate: there it means false.
    given = {key: value for key, value in rope.items() if value is not None or key == "truncate"}
    trained_on = (
        raw.get(_YARN_KEYS["original_length"]) or rope.get(_YARN_KEYS["original_length"]) or raw.get("max_position_embeddings")
    )
    values = {field: given[key] for field, key in _YARN_KEYS.items() if key in given} | {"original_length": trained_on}
    known = {*_YARN_KEYS.values(), *_MSCALE, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    found = [f"{place} has {key}, which Smalt's YaRN does not know" for key in given if key not in known]
    if "attention_factor" not in given and (scales := [given[key] for key in _MSCALE if key in given]):
        if len(scales) == 2 and all(isinstance(scale, int | float) and scale > 0 for scale in (*scales, given.get("factor"))):
            values["attention_factor"] = _magnitude(given["factor"], scales[0]) / _magnitude(given["factor"], scales[1])
        else:
            found.append(f"{place} has {' or '.join(_MSCALE)}; they are supported together, as numbers above 0")
    try:
        yarn = YarnConfig.model_validate(values, strict=True)
    except ValidationError as error:
        for e in error.errors():
            key = ".".join(_YARN_KEYS[str(field)] for field in e["loc"]) or "yarn"
            found.append(f"{place}: {key}: {e['msg'].removeprefix('Value error, ')}")
        yarn = None
    wrong += found
    return yarn


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


def _sizes_left_out(raw: Mapping[str, Any], family: str) -> dict[str, Any]:
    """How many key and value heads there are, and how large, where a config.json does not say it."""
    heads, width = raw.get("num_attention_heads"), raw.get("hidden_size")
    if heads is None or width is None:
        return {}
    grouped = heads if family == "llama" or "num_key_value_heads" in raw else 32
    return {"num_key_value_heads": grouped, "head_dim": 128 if family == "qwen3" else width // heads}


def _unsupported(raw: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> Iterator[str]:
    for key, allowed in only.items():
        if key in raw and raw[key] not in allowed:
            yield f"{key} is {raw[key]!r}; only {' or '.join(map(repr, allowed))} is supported"


def _section(
    values: Mapping[str, Any], keys: Mapping[str, str], wrong: list[str], where: str, section: Callable[..., Any]
) -> dict[str, Any]:
    """The fields of a section. Raises UserError that lists what is wrong already, what is missing, and what the section refuses."""
    wrong = wrong + [f"{key} is missing" for key in keys.values() if key not in values]
    found = {field: values[key] for field, key in keys.items() if key in values}
    if not wrong:
        try:
            section(**found)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}".lstrip(": ") for e in error.errors()]
    if wrong:
        raise UserError("\n  ".join([f"{where} describes a model that Smalt does not have:", *wrong]))
    return found


def _different(own: Any, theirs: Any) -> list[str]:
    a, b = own.model_dump(), theirs.model_dump()
    return [key for key in a if not (_close(a[key], b[key]) if isinstance(a[key], float) else a[key] == b[key])]


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_TOLERANCE)


def _lines(section: str, own: Any, theirs: Any, keys: list[str]) -> list[str]:
    return [f"{section}.{key} is {_spelled(getattr(own, key))}, the folder's {_spelled(getattr(theirs, key))}" for key in keys]


def _spelled(value: Any) -> str:
    if value is None:
        return "not set"
    return spelled(value.model_dump(exclude_none=True) if isinstance(value, FrozenSection) else value)
