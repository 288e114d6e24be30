"""What a config needs in order to begin with the weights of a Hugging Face folder: its section of the model, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from smalt.model import FrozenSection

from ..data.chat import SPECIAL_TOKENS
from ..errors import UserError
from .beside import TOKENIZER
from .folder import CONFIG, read_json
from .load import Part
from .settings import is_tower, language_config, spelled, vision_config


def describe_folder(folder: Path, num_tokens: int = 0) -> str:
    """The sections of a config, in TOML, that fit the folder. num_tokens: of the tokenizer, for which the vocabulary is enlarged.

    Raises UserError for a folder whose model Smalt does not have.
    """
    raw, where = read_json(folder / CONFIG), str(folder / CONFIG)
    if is_tower(raw):
        return _sections(folder, "vision", vision_config(raw, where))
    language = language_config(raw, where)
    return _sections(folder, "language", language.model_copy(update={"vocabulary": max(language.vocabulary, num_tokens)}))


def write_tokenizer(folder: Path, out: Path) -> int:
    """Write the folder's tokenizer with the special tokens of the chat template; returns its size.

    Raises UserError where there is none, or where ``out`` cannot be written."""
    path = folder / TOKENIZER
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} cannot be read: {error}; save it with transformers' AutoTokenizer, as a fast tokenizer") from error
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(tokenizer.to_str())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another file with --tokenizer") from error
    return max(tokenizer.get_vocab().values()) + 1


def _sections(folder: Path, part: Part, section: FrozenSection) -> str:
    lines = [f"[init]\n{part} = {json.dumps(str(folder))}\n\n[model.{part}]"]
    return "\n".join([*lines, *(f"{key} = {spelled(value)}" for key, value in section.model_dump(exclude_none=True).items())])
