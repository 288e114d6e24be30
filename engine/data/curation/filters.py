"""Steps that look at one record: cleaning, length, language, images. Their functions raise BadRecord to remove it."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ...errors import BadRecord, UserError
from ..images import ImageLimits, image_size
from ..records import Record
from .config import Images, Language, Length
from .libraries import library
from .text import part_text, words

Apply = Callable[[Record], Record]
# All of Unicode's control characters but tab and line feed, and the byte order mark.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_LINE_ENDS = re.compile(r"[^\S\n]+(?=\n|$)")


def clean(record: Record) -> Record:
    """The record with its text in Unicode NFC, without control characters and spaces at the ends of lines and messages."""
    messages = tuple((role, _cleaned(content)) for role, content in record.messages)
    return record if messages == record.messages else replace(record, messages=messages)


def _cleaned(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Before the composition: a control character between a letter and its accent would keep them apart.
    return _LINE_ENDS.sub("", unicodedata.normalize("NFC", _CONTROL.sub("", text))).strip()


def length(settings: Length) -> Apply:
    measure = _measure(settings)

    def apply(record: Record) -> Record:
        size = measure(part_text(record, settings.part))
        if size < settings.minimum:
            raise BadRecord("too short", f"{size} {settings.unit}; the minimum is {settings.minimum}")
        if settings.maximum is not None and size > settings.maximum:
            raise BadRecord("too long", f"{size} {settings.unit}; the maximum is {settings.maximum}")
        return record

    return apply


def _measure(settings: Length) -> Callable[[str], int]:
    if settings.tokenizer is not None:
        tokenizer = _load_tokenizer(settings.tokenizer)
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return len if settings.unit == "characters" else lambda text: len(words(text))


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer {path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def language(settings: Language) -> Apply:
    """By py3langid, whose model comes with it; its confidence is that of the likeliest language among all that it knows."""
    identifier = _identifier()
    for code in settings.allowed:
        if code not in identifier.labels:
            near = ", ".join(difflib.get_close_matches(code, identifier.labels, cutoff=0.0))
            raise UserError(f"language {code!r} is unknown; near are {near}. Languages go by their ISO 639 code, as en or zh")

    def apply(record: Record) -> Record:
        text = part_text(record, settings.part)
        if len(text) < settings.min_characters:
            return record
        found, confidence = identifier.classify(text)
        if confidence < settings.min_confidence:
            raise BadRecord("unclear language", f"{found}, with a confidence of {confidence:.2f}")
        if found not in settings.allowed:
            raise BadRecord("another language", f"{found}, with a confidence of {confidence:.2f}")
        return record

    return apply


@lru_cache(maxsize=1)
def _identifier() -> Any:
    langid = library("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def images(settings: Images, limits: ImageLimits) -> Apply:
    def apply(record: Record) -> Record:
        count = len(record.images)
        if count < settings.min_count or (settings.max_count is not None and count > settings.max_count):
            raise BadRecord("number of images", f"{count} images")
        for image in record.images:
            low, high = sorted(image_size(image, limits))
            if low < settings.min_side:
                raise BadRecord("small image", f"{image} has a side of {low} pixels")
            if settings.max_side is not None and high > settings.max_side:
                raise BadRecord("large image", f"{image} has a side of {high} pixels")
            if settings.max_aspect is not None and high > settings.max_aspect * low:
                raise BadRecord("extreme aspect ratio", f"{image} has {high} x {low} pixels")
        return record

    return apply
