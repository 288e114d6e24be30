"""The chat template: conversations to token ids, in think mode or answer mode.

    <|user|> question with <|image|> rows <|end|> <|assistant|> <|think|>  <think> thought </think> answer <|end|>
    <|user|> question with <|image|> rows <|end|> <|assistant|> <|answer|>                          answer <|end|>

The control token after ``<|assistant|>`` is the mode; ``<think>`` is part of the prompt. What stands before it is the same in both
modes. A thought that is cut at a budget is closed by a ``</think>`` that was forced, and a forced token is not learned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from smalt.model import Document
from smalt.model.generate import ControlTokens

from ..errors import BadRecord, UserError
from .images import ImageLimits, decode_tile
from .records import Record

Mode = Literal["think", "answer"]
SPECIAL_TOKENS = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|image|>", "<|think|>", "<|answer|>", "<think>", "</think>",
)  # fmt: skip
PLACEHOLDER = "<image>"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def split_thought(content: str) -> tuple[str | None, str]:
    """An assistant's content as (thought, answer); the thought is None where there is none."""
    match = _THOUGHT.fullmatch(content)
    return (match[1], match[2]) if match else (None, content)


@dataclass(frozen=True)
class ImageShape:
    """How an image enters the model: side of its tile in pixels, and tokens it takes."""

    side: int
    tokens: int


class ChatEncoder:
    """A tokenizer with the special tokens of the template, and the shape of images."""

    def __init__(self, tokenizer: Tokenizer, image: ImageShape, limits: ImageLimits = ImageLimits()):  # noqa: B008 - frozen
        self.tokenizer, self.image, self.limits = tokenizer, image, limits
        self.ids: dict[str, int] = {t: i for t in SPECIAL_TOKENS if (i := tokenizer.token_to_id(t)) is not None}
        if missing := [t for t in SPECIAL_TOKENS if t not in self.ids]:
            raise UserError(f"the tokenizer has no {', '.join(missing)}; add them as special tokens")
        # A text that spells "<|end|>" is text: only the template makes special tokens.
        tokenizer.encode_special_tokens = True
        # Some tokenizer.json files bring these along; both would corrupt documents silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def load(cls, path: Path, image: ImageShape, vocabulary: int, limits: ImageLimits) -> ChatEncoder:
        """Read a ``tokenizer.json``. Raises UserError if it is missing, broken, or larger than the model's vocabulary."""
        if not path.exists():
            raise UserError(f"tokenizer {path} does not exist. `smalt data digits` makes the one of the default run.")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"tokenizer {path} cannot be read: {error}") from error
        size = max(tokenizer.get_vocab().values(), default=-1) + 1  # a pruned vocabulary has gaps
        if size > vocabulary:
            raise UserError(f"tokenizer {path} has {size} tokens; set model.language.vocabulary (now {vocabulary}) to at least that")
        return cls(tokenizer, image, limits)

    @cached_property
    def control(self) -> ControlTokens:
        think_end = self.ids["</think>"]
        return ControlTokens(self.ids["<think>"], think_end, self.ids["<|end|>"], close=(think_end,))

    def sample(self, record: Record, mode: Mode, cut: float | None = None) -> Document:
        """A training document. Think mode needs a thought in the last assistant turn, else the document is in answer mode.

        cut: share of the thought to keep, in [0, 1); the close is then forced. Thoughts of earlier turns are left out, as they are
        at inference. Raises BadRecord.
        """
        builder = _Builder(self, record)
        last = len(record.messages) - 1
        if record.messages[last][0] != "assistant":
            raise BadRecord("no answer", "the last message is not the assistant's")
        for i, (role, content) in enumerate(record.messages):
            if role != "assistant":
                builder.turn(role, content)
                continue
            thought, answer = split_thought(content)
            if i == last and mode == "think" and thought is not None:
                builder.open("think")
                ids = self.text(thought)
                kept = ids if cut is None else ids[: int(cut * len(ids))]
                builder.add(kept, target=True)
                builder.add([self.ids["</think>"]], target=len(kept) == len(ids))
            else:
                builder.open("answer")
            builder.add([*self.text(answer), self.ids["<|end|>"]], target=True)
        return builder.document()

    def prompt(self, record: Record, mode: Mode) -> Document:
        """Everything up to where generation starts; a last assistant message is left out. Raises BadRecord."""
        messages = record.messages[:-1] if record.messages[-1][0] == "assistant" else record.messages
        builder = _Builder(self, record)
        for role, content in messages:
            if role == "assistant":
                builder.open("answer")
                builder.add([*self.text(split_thought(content)[1]), self.ids["<|end|>"]], target=False)
            else:
                builder.turn(role, content)
        builder.open(mode)
        return builder.document()

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def split(self, completion: list[int], thinking: bool) -> tuple[list[int], str]:
        """A completion as (ids of the thought, text of the answer); a thought that was not closed leaves an empty answer."""
        ids = [t for t in completion if t != self.control.end]
        if not thinking:
            return [], self.decode(ids).strip()
        if self.control.think_end not in ids:
            return ids, ""
        at = ids.index(self.control.think_end)
        return ids[:at], self.decode(ids[at + 1 :]).strip()

    def decode(self, ids: list[int]) -> str:
        """Text with its special tokens spelled out."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class _Builder:
    """Appends pieces of one conversation and keeps track of targets and images."""

    def __init__(self, encoder: ChatEncoder, record: Record):
        self.encoder, self.record = encoder, record
        self.ids, self.targets, self.spans = list[int](), list[bool](), list[tuple[int, int]]()

    def add(self, ids: list[int], target: bool) -> None:
        self.ids += ids
        self.targets += [target] * len(ids)

    def open(self, mode: Mode) -> None:
        ids = self.encoder.ids
        start = [ids["<|assistant|>"], ids[f"<|{mode}|>"]]
        self.add([*start, ids["<think>"]] if mode == "think" else start, target=False)

    def turn(self, role: str, content: str) -> None:
        ids = self.encoder.ids
        self.add([ids[f"<|{role}|>"]], target=False)
        for i, text in enumerate(content.split(PLACEHOLDER)):
            if i:
                n = self.encoder.image.tokens
                self.spans.append((len(self.ids), len(self.ids) + n))
                self.add([ids["<|image|>"]] * n, target=False)
            if text:
                self.add(self.encoder.text(text), target=False)
        self.add([ids["<|end|>"]], target=False)

    def document(self) -> Document:
        images = self.record.images
        if len(images) != len(self.spans):
            raise BadRecord("placeholder mismatch", f"{len(self.spans)} {PLACEHOLDER} in the messages, {len(images)} images")
        side = self.encoder.image.side
        tiles = [decode_tile(image, side, self.encoder.limits) for image in images]
        return Document(
            tokens=np.array(self.ids, np.int64),
            targets=np.array(self.targets, bool),
            image_index=np.concatenate([np.arange(low, high) for low, high in self.spans] or [np.zeros(0, np.int64)]),
            tiles=np.stack(tiles) if tiles else np.zeros((0, 3, side, side), np.float32),
            spans=np.array(self.spans, np.int64).reshape(-1, 2),
            source=self.record.source,
            record=self.record.number,
        )
