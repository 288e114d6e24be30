"""The decoder of a checkpoint as a GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .checkpoints import Checkpoint
from .errors import UserError
from .export import PARTIAL, read_source
from .stored_weights import open_weights
from .tensor_files import sync_folder
from .weights.beside import CHAT_TEMPLATE
from .weights.gguf_file import BLOCK, GgufTensor, GgufType, gguf_layout, model_keys, write_gguf
from .weights.gguf_tokenizer import tokenizer_keys
from .weights.settings import decoder_family


@dataclass(frozen=True)
class ExportedGguf:
    """What was written. size: bytes of the file."""

    checkpoint: Checkpoint
    kind: GgufType
    layout: dict[str, GgufTensor]
    size: int

    def describe(self) -> str:
        """How many tensors have which type, and which could not have the one that was asked for."""
        counts = Counter(one.stored for one in self.layout.values())
        said = ", ".join(f"{count} in {stored}" for stored, count in counts.most_common())
        kept = [name for name, one in self.layout.items() if one.stored == "F16"] if self.kind != "f16" else []
        return said + (f"; in F16 because their rows are no multiple of {BLOCK}: {', '.join(kept)}" if kept else "")


def export_gguf(run: Path, out: Path, step: int | None = None, kind: GgufType = "f16") -> ExportedGguf:
    """Write the decoder of a run's checkpoint to the new file ``out``, with tokenizer and chat template.

    step: of the checkpoint, the newest whole one when None; kind: type of the matrices. One tensor is in memory at a time. ``out``
    appears when all of it is on disk. Raises UserError for an ``out`` that is there, for what :func:`smalt.engine.export.export_run`
    refuses, and for a decoder or a tokenizer that llama.cpp does not have.
    """
    if out.exists():
        raise UserError(f"{out} is there already; choose another file with --out")
    source = read_source(run, step)
    checkpoint, config, tokenizer = source.checkpoint, source.config, source.tokenizer
    end = Tokenizer.from_buffer(tokenizer).token_to_id("<|end|>")
    keys = {
        **model_keys(config.language, kind, source.name, source.longest),
        **tokenizer_keys(tokenizer, config.language.vocabulary),
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.chat_template": CHAT_TEMPLATE.read_text(),
    }
    layout, partial = gguf_layout(config, kind), out.with_name(out.name + PARTIAL)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open_weights(checkpoint) as weights:
            write_gguf(partial, decoder_family(config.language), keys, layout, weights.tensor)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return ExportedGguf(checkpoint, kind, layout, out.stat().st_size)
