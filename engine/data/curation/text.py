"""Text of records as the steps compare it: parts of a record, words, n-grams, digests."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TypeVar

from ...errors import BadRecord
from ..chat import PLACEHOLDER, split_thought
from ..records import Record
from .config import Part

DIGEST_BYTES = 16
_MARKS = re.compile(f"{PLACEHOLDER}|</?think>")
# Chinese and Japanese are written without spaces: each of their characters is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
T = TypeVar("T")


def split_response(record: Record) -> tuple[str, str]:
    """Thought and answer of the last message; the thought is empty where there is none. Raises BadRecord if nobody answers."""
    role, content = record.messages[-1]
    if role != "assistant":
        raise BadRecord("no answer", "the last message is not the assistant's")
    thought, answer = split_thought(content)
    return thought or "", answer


def part_text(record: Record, part: Part) -> str:
    """The text of a part of a record, messages on lines of their own, without placeholders of images and marks of thoughts.

    record: all of it; prompt: what stands before the last message; response: the last message, which is the thought and the answer.
    Raises BadRecord for a part that a record without an answer does not have.
    """
    if part == "record":
        text = "\n".join(content for _, content in record.messages)
    else:
        thought, answer = split_response(record)
        prompt = "\n".join(content for _, content in record.messages[:-1])
        text = {"prompt": prompt, "response": record.messages[-1][1], "thought": thought, "answer": answer}[part]
    return _MARKS.sub(" ", text).strip()


def normalise(text: str) -> str:
    """Text without what does not make it another one: forms of Unicode, case, spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a text in its normal form, without punctuation."""
    return _WORD.findall(normalise(text))


def ngrams(items: Sequence[T], n: int) -> list[tuple[T, ...]]:
    """All runs of n items; of fewer items, the one run of them all."""
    return [tuple(items[i : i + n]) for i in range(max(1, len(items) - n + 1))] if items else []


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for a sequence of byte strings."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def encoded(text: str) -> bytes:
    """UTF-8; lone surrogates, which JSON can bring along, have bytes too."""
    return text.encode("utf-8", "surrogatepass")
