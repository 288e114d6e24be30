"""Conversations to what the model reads: token ids, and the tiles of the images."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .tiling_smalt import tiles_of

# Where a text goes in a rendered conversation, by its number; both characters are of a private use area.
_PLACE = re.compile("\ue000([0-9]+)\ue001")
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_KEYS = ("image", "url", "path", "base64")


class SmaltProcessor(ProcessorMixin):
    """The tokenizer, the chat template, and the tiling of images.

    tile: side of a tile in pixels; tokens_per_tile: of the decoder; max_rows, max_columns, alpha: of
    :func:`.tiling_smalt.choose_grid`.
    """

    image_token = "<|image|>"

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tile: int = 378,
        tokens_per_tile: int = 196,
        max_rows: int = 4,
        max_columns: int = 4,
        alpha: float = 0.1,
    ):
        super().__init__(tokenizer, chat_template=chat_template)
        self.tile, self.tokens_per_tile = tile, tokens_per_tile
        self.max_rows, self.max_columns, self.alpha = max_rows, max_columns, alpha
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Prompts with ``<|image|>`` for each image, as the chat template renders them, to the inputs of the model.

        text: a prompt, or a list of them; images: one, a list in order, or a list for each prompt. What else the tokenizer's ``pad``
        takes may be given. Special tokens that a prompt spells are special tokens; :meth:`apply_chat_template` takes those of messages
        for text. Raises ValueError where placeholders and images do not match.
        """
        if text is None:
            raise ValueError("a prompt is needed; for an image alone give '<|image|>'")
        prompts = [text] if isinstance(text, str) else list(text)
        ids = [self._ids(prompt) for prompt in prompts]
        counts = [row.count(self.image_token_id) for row in ids]
        return self._inputs(ids, _by_prompt(images, counts), return_tensors, kwargs)

    def apply_chat_template(  # type: ignore[override]  # versions of transformers differ
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or several, as text, or with ``tokenize`` as the inputs of the model (``return_dict``) or ids alone.

        A message's content is a text or a list of parts, {"type": "text", "text": ...} and {"type": "image", "image": ...}, where an
        image is what :func:`.tiling_smalt.open_image` takes; {"type": "image", "url": ...} is fetched. ``enable_thinking=False`` asks
        for an answer at once. What messages spell like a special token stays text.
        """
        if not tokenize:
            return super().apply_chat_template(conversation, chat_template, tokenize=False, **kwargs)
        one = isinstance(conversation[0], dict)
        texts: list[str] = []
        marked = [_marked(messages, texts) for messages in ([conversation] if one else conversation)]
        padding = {"padding", "max_length", "pad_to_multiple_of", "padding_side"} & kwargs.keys()
        pad = {**{name: kwargs.pop(name) for name in padding}, **(processor_kwargs or {})}
        tensors = pad.pop("return_tensors", return_tensors)
        rendered = super().apply_chat_template([messages for messages, _ in marked], chat_template, tokenize=False, **kwargs)
        ids = [self._ids(prompt, texts) for prompt in rendered]
        inputs = self._inputs(ids, [images for _, images in marked], tensors, pad)
        return inputs if return_dict else inputs["input_ids"]

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "num_tiles"]

    def split(self, completion: Any) -> tuple[str, str]:
        """The ids that a prompt in think mode was continued with, as (thought, answer); no answer where the thought was not closed."""
        end = self.tokenizer.convert_tokens_to_ids("</think>")
        ids = [int(i) for i in completion if int(i) != self.tokenizer.eos_token_id]
        at = ids.index(end) if end in ids else len(ids)
        return self.tokenizer.decode(ids[:at]), self.tokenizer.decode(ids[at + 1 :]).strip()

    def _ids(self, prompt: str, texts: list[str] | None = None) -> list[int]:
        """Of a rendered prompt, with one image token an image. texts: what goes into its places, special tokens in them as text."""
        ids: list[int] = []
        for number, piece in enumerate([prompt] if texts is None else _PLACE.split(prompt)):
            is_text = number % 2 == 1
            piece = texts[int(piece)] if texts is not None and is_text else piece
            if piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=is_text)
        return ids

    def _inputs(
        self, ids: list[list[int]], images: list[list[Any]], return_tensors: str | None, kwargs: dict[str, Any]
    ) -> BatchFeature:
        rows = [[self._tiles(image) for image in of_row] for of_row in images]
        expanded = []
        for row, tiles in zip(ids, rows, strict=True):
            if row.count(self.image_token_id) != len(tiles):
                raise ValueError(f"a prompt has {row.count(self.image_token_id)} {self.image_token}, and {len(tiles)} images")
            lengths = iter([len(t) * self.tokens_per_tile for t in tiles])
            expanded.append([t for i in row for t in ([i] * next(lengths) if i == self.image_token_id else [i])])
        data = dict(self.tokenizer.pad({"input_ids": expanded}, return_tensors=return_tensors, **kwargs))
        if any(rows):
            data |= self._stacked(rows)
        return BatchFeature(data, tensor_type=return_tensors)

    def _stacked(self, rows: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
        """The tiles of a batch, uint8 [B, N, 3, S, S], and how many each image has, int64 [B, M], filled up with zeros."""
        counts = np.zeros((len(rows), max(map(len, rows))), np.int64)
        tiles = np.zeros((len(rows), max(sum(map(len, row)) for row in rows), 3, self.tile, self.tile), np.uint8)
        for number, row in enumerate(rows):
            counts[number, : len(row)] = [len(image) for image in row]
            if row:
                tiles[number, : counts[number].sum()] = np.concatenate(row)
        return {"pixel_values": tiles, "num_tiles": counts}

    def _tiles(self, image: Any) -> np.ndarray:
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            image = load_image(image)
        return tiles_of(image, self.tile, self.max_rows, self.max_columns, self.alpha)


def _marked(messages: list[dict[str, Any]], texts: list[str]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with a mark in the place of each text, which is added to ``texts``; and their images."""
    images: list[Any] = []

    def mark(text: str) -> str:
        texts.append(text)
        return f"\ue000{len(texts) - 1}\ue001"

    def content_of(message: dict[str, Any]) -> Any:
        content = message["content"]
        if message["role"] == "assistant":
            whole = content if isinstance(content, str) else "".join(part["text"] for part in content)
            thought = _THOUGHT.fullmatch(whole)
            return f"<think>{mark(thought[1])}</think>{mark(thought[2])}" if thought else mark(whole)
        if isinstance(content, str):
            return mark(content)
        parts: list[dict[str, str]] = []
        for part in content:
            if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                texts[-1] += part["text"]  # tokens of neighbours as of one text
            elif part["type"] == "text":
                parts.append({"type": "text", "text": mark(part["text"])})
            else:
                images.append(_image(part))
                parts.append({"type": "image"})
        return parts

    return [{**message, "content": content_of(message)} for message in messages], images


def _image(part: dict[str, Any]) -> Any:
    if part["type"] == "image_url":
        url = part["image_url"]
        return url["url"] if isinstance(url, dict) else url
    found = [part[key] for key in _KEYS if part.get(key) is not None]
    if part["type"] != "image" or len(found) != 1:
        raise ValueError(f"a part of a message is a text or an image with one of {', '.join(_KEYS)}, not {sorted(part)}")
    return found[0]


def _by_prompt(images: Any, counts: list[int]) -> list[list[Any]]:
    """The images of each prompt; those of one list are dealt in order. counts: of the placeholders."""
    if images is None:
        return [[] for _ in counts]
    if not isinstance(images, list | tuple):
        images = [images]
    if images and isinstance(images[0], list | tuple):
        return [list(of_prompt) for of_prompt in images]
    if sum(counts) != len(images):
        raise ValueError(f"the prompts have {sum(counts)} placeholders, the images are {len(images)}")
    left = iter(images)
    return [[next(left) for _ in range(count)] for count in counts]
