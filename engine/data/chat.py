"""The chat template: conversations to token ids, in think mode or answer mode.

    <|user|> question with <|image|> rows <|end|> <|assistant|> <|think|>  <think> thought </think> answer <|end|>
    <|user|> question with <|image|> rows <|end|> <|assistant|> <|answer|>                          answer <|end|>

The control token after ``<|assistant|>`` is the mode; ``<think>`` is part of the prompt. What stands before it is the same in both
modes. A thought that is cut at a budget is closed by a ``</think>`` that was forced, and a forced token is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from smalt.model import Document
from smalt.model.generate import ControlTokens
from smalt.model.tiling import Grid, ImageShape

from ..errors import BadRecord, UserError
from .images import ImageLimits, decode_tiles, image_size
from .records import Image, Record

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


def num_placeholders(messages: Iterable[tuple[str, str]]) -> int:
    """Places of images. The model makes none: in its own turns the word is text."""
    return sum(content.count(PLACEHOLDER) for role, content in messages if role != "assistant")


@dataclass(frozen=True)
class Draft:
    """A document of whose images only the headers were read, its tiles still to be decoded; grids: of each image."""

    document: Document
    images: tuple[Image, ...]
    grids: tuple[Grid, ...]

    @property
    def num_tiles(self) -> int:
        return sum(grid.num_tiles for grid in self.grids)

    def piece(self, low: int, high: int) -> Draft:
        """Rows low to high as a draft of its own, whose first token is context only. Neither border is inside an image."""
        whole = self.document
        targets = whole.targets[low:high].copy()
        targets[:1] = False
        rows = whole.image_index[(whole.image_index >= low) & (whole.image_index < high)]
        inside = np.flatnonzero((whole.spans[:, 0] >= low) & (whole.spans[:, 1] <= high))
        document = replace(
            whole, tokens=whole.tokens[low:high], targets=targets, image_index=rows - low, spans=whole.spans[inside] - low
        )
        return Draft(document, tuple(self.images[i] for i in inside), tuple(self.grids[i] for i in inside))

    def decode(self, side: int, limits: ImageLimits) -> Document:
        """The document with its tiles, of that side in pixels. Raises BadRecord."""
        tiles = [decode_tiles(image, grid, side, limits) for image, grid in zip(self.images, self.grids, strict=True)]
        return replace(self.document, tiles=np.concatenate(tiles)) if tiles else self.document


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

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled tokenizer forgets what __init__ sets.
        return ChatEncoder, (self.tokenizer, self.image, self.limits)

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
        """:meth:`draft`, decoded."""
        return self.draft(record, mode, cut).decode(self.image.side, self.limits)

    def draft(self, record: Record, mode: Mode, cut: float | None = None) -> Draft:
        """A training document. Think mode needs a thought in the last assistant turn, else the document is in answer mode.

        cut: share of the thought to keep, in [0, 1); the close is then forced. Thoughts of earlier turns are left out, as they are
        at inference. A record that is one message of the role "text" is learned whole. Raises BadRecord.
        """
        builder = _Builder(self, record)
        last = len(record.messages) - 1
        if record.messages[0][0] == "text":
            return self._text(builder, record)
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
        return builder.draft()

    def _text(self, builder: _Builder, record: Record) -> Draft:
        builder.content(record.messages[0][1], target=True)
        builder.add([self.ids["<|end|>"]], target=True)
        return builder.draft()

    def prompt(self, record: Record, mode: Mode) -> Document:
        """Everything up to where generation starts; a last assistant message is left out. Raises BadRecord."""
        if record.messages[0][0] == "text":
            raise BadRecord("no question", "a message of the role text asks nothing")
        messages = record.messages[:-1] if record.messages[-1][0] == "assistant" else record.messages
        builder = _Builder(self, record)
        for role, content in messages:
            if role == "assistant":
                builder.open("answer")
                builder.add([*self.text(split_thought(content)[1]), self.ids["<|end|>"]], target=False)
            else:
                builder.turn(role, content)
        builder.open(mode)
        return builder.draft().decode(self.image.side, self.limits)

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
        if (places := num_placeholders(record.messages)) != len(record.images):
            detail = f"{places} {PLACEHOLDER} in the messages, {len(record.images)} images"
            raise BadRecord("placeholder mismatch", detail)
        self.encoder, self.record = encoder, record
        self.ids, self.targets, self.spans, self.grids = list[int](), list[bool](), list[tuple[int, int]](), list[Grid]()

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
        self.content(content, target=False)
        self.add([ids["<|end|>"]], target=False)

    def content(self, content: str, target: bool) -> None:
        for i, text in enumerate(content.split(PLACEHOLDER)):
            if i:
                self.image(self.record.images[len(self.grids)])
            if text:
                self.add(self.encoder.text(text), target)

    def image(self, image: Image) -> None:
        shape = self.encoder.image
        grid = shape.grid(*image_size(image, self.encoder.limits))
        num_rows = shape.tokens * grid.num_tiles
        self.spans.append((len(self.ids), len(self.ids) + num_rows))
        self.grids.append(grid)
        self.add([self.encoder.ids["<|image|>"]] * num_rows, target=False)

    def draft(self) -> Draft:
        side = self.encoder.image.side
        document = Document(
            tokens=np.array(self.ids, np.int64),
            targets=np.array(self.targets, bool),
            image_index=np.concatenate([np.arange(low, high) for low, high in self.spans] or [np.zeros(0, np.int64)]),
            tiles=np.zeros((0, 3, side, side), np.uint8),
            spans=np.array(self.spans, np.int64).reshape(-1, 2),
            source=self.record.source,
            record=self.record.number,
        )
        return Draft(document, self.record.images, tuple(self.grids))
