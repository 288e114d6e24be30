"""The forms that a record has in the wild, found by its keys, and what they have in common.

    messages        [{"role", "content"}], a content being a text with <image> in it or a list of parts (OpenAI, Hugging Face)
    conversations   [{"from": "human" | "gpt" | "system", "value"}] (ShareGPT, LLaVA)
    text            a text, all of which is learned
    caption         the text of an image, all of which is learned

``images`` or ``image`` stands beside each of them: one image or a list of them, as bytes, {bytes, path}, path, URL or data: URL.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from ..errors import BadRecord
from .chat import PLACEHOLDER
from .files import follow
from .records import Image, Record

CONVERSATIONS = ("messages", "conversations")
FORMS = (*CONVERSATIONS, "text", "caption")
_IMAGES = ("images", "image")
NAMES = (*FORMS, *_IMAGES)  # of columns, by which a record is known
_ROLES = ("system", "user", "assistant", "text")
_SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_OWN_IMAGE = ("image", "image_url", "url", "path")

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Form:
    """kind: one of FORMS; column: under which it stands; images: where its images stand, None where it has none beside it; extra:
    (name, column) of what else its records carry."""

    kind: str
    column: str
    images: str | None
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def columns(self) -> list[str]:
        beside = [] if self.images is None else [self.images]
        return list(dict.fromkeys([self.column, *beside, *(column for _, column in self.extra)]))


@dataclass(frozen=True)
class Place:
    """Where the paths of a record lead. folder: of the file that they stand in; members: the images of a sample in a tar, in order,
    which are then all that can be meant."""

    folder: str
    members: tuple[Image, ...] | None = None


def find_form(present: Collection[str], columns: Mapping[str, str]) -> Form:
    """The form of a record that has these keys. columns: names of columns by what is in them (one of FORMS, or images), of which those
    that name a form leave no other. Raises BadRecord where there is no form, or more than one."""
    known = {form: columns[form] for form in FORMS if form in columns} or {form: form for form in FORMS}
    found = {form: column for form, column in known.items() if column in present}
    beside = [column for column in ([columns["images"]] if "images" in columns else _IMAGES) if column in present]
    there = ", ".join(present) or "nothing"
    if len(found) != 1:
        cause = "several forms" if found else "no known form"
        raise BadRecord(cause, f"there are {there}; needed is exactly one of {', '.join(known.values())}")
    if len(beside) > 1:
        raise BadRecord("several forms", f"there are {there}, of which {' and '.join(beside)} are images")
    ((kind, column),) = found.items()
    return Form(kind, column, beside[0] if beside else None, tuple(extra_columns(columns).items()))


def extra_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """Those of the columns that are neither the form nor its images: records carry them as text under their name."""
    return {name: column for name, column in columns.items() if name not in (*FORMS, "images")}


def find_form_of_object(row: Mapping[str, Any], columns: Mapping[str, str]) -> Form:
    """:func:`find_form` by the keys that are not null."""
    return find_form([key for key, value in row.items() if value is not None], columns)


def read_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from its UTF-8. where: begins the detail of the BadRecord."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord("unreadable record", f"{where}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken JSON", f"{where}: {error}") from error
    if not isinstance(found, dict):
        raise BadRecord("malformed record", f"{where}: {found!r:.200}; needed is an object")
    return found


def read_record(row: Mapping[str, Any], form: Form, place: Place) -> Record:
    """The record of a row of that form. Raises BadRecord for what is malformed."""
    beside = _images(row.get(form.images), place) if form.images is not None else None
    raw = row.get(form.column)
    extra = tuple((name, _as_text(row[column])) for name, column in form.extra if row.get(column) is not None)
    if form.kind in CONVERSATIONS:
        return Record(*_conversation(raw, beside, place), extra=extra)
    images = _placed([], beside, place)
    if not isinstance(raw, str) or not raw:
        raise BadRecord("no text", f"{raw!r:.200}; needed is a text")
    if form.kind == "caption" and not images:
        raise BadRecord("no image", f"the caption {raw!r:.200} has no image")
    text = encodable(raw)
    return Record((("text", text if PLACEHOLDER in text else PLACEHOLDER * len(images) + text),), images, extra=extra)


def _conversation(raw: Any, beside: tuple[Image, ...] | None, place: Place) -> tuple[Messages, tuple[Image, ...]]:
    if not isinstance(raw, list) or not raw:
        raise BadRecord("no messages", "the list of messages is empty or missing")
    messages, slots = [], list[Image | None]()
    for message in raw:
        role, content = _said(message)
        if role == "text" and len(raw) > 1:
            raise BadRecord("malformed message", "a message of the role text stands alone in its record")
        messages.append((role, _content(content, slots, place, role)))
    return tuple(messages), _placed(slots, beside, place)


def _said(message: Any) -> tuple[str, Any]:
    """Role and content of a message in either pair of keys."""
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        speaker = message.get("from")
        if role is None and content is None and isinstance(speaker, str):
            role, content = _SPEAKERS.get(speaker), message.get("value")
        if role in _ROLES and isinstance(content, str | list):
            return role, content
    raise BadRecord(
        "malformed message",
        f"{message!r:.200}; needed are a role (system, user, assistant) and a content, or from (system, human, gpt) and a value",
    )


def _content(raw: str | list[Any], slots: list[Image | None], place: Place, role: str) -> str:
    """A content as one text. ``slots`` gets an entry for each placeholder: the image of its part, or None for the next beside; in the
    assistant's text the word is none."""
    if isinstance(raw, str):
        slots += [None] * (raw.count(PLACEHOLDER) if role != "assistant" else 0)
        return encodable(raw)
    texts = []
    for part in raw:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(_content(part["text"], slots, place, role))
        elif kind in ("image", "image_url"):
            slots.append(_image_of_part(part, slots.count(None), place))
            texts.append(PLACEHOLDER)
        else:
            raise BadRecord("malformed message", f"{part!r:.200}; needed is a part of type text, image or image_url")
    return "".join(texts)


def _image_of_part(part: Mapping[str, Any], num_before: int, place: Place) -> Image | None:
    """num_before: placeholders without an image of their own that came before, and so the index that this one may give."""
    if (encoded := part.get("base64")) is not None:
        return Image(_from_base64(encoded), None)
    own = next((part[key] for key in _OWN_IMAGE if part.get(key) is not None), None)
    if own is not None:
        return _image(own, place)
    if part.get("index") not in (None, num_before):
        raise BadRecord("malformed message", f"{part!r:.200}; images beside stand in their order, so that its index is {num_before}")
    return None


def _placed(slots: list[Image | None], beside: tuple[Image, ...] | None, place: Place) -> tuple[Image, ...]:
    """The images in the order of their placeholders. beside: those beside the messages, None where no key names any: it is then the
    members of a sample in a tar."""
    own = any(slot is not None for slot in slots)
    if beside is None:
        beside = () if own else place.members or ()
    if not own:
        return beside  # the template compares their number with that of the placeholders
    if slots.count(None) != len(beside):
        raise BadRecord(
            "placeholder mismatch",
            f"{slots.count(None)} places without an image of their own, {len(beside)} images beside the messages",
        )
    rest = iter(beside)
    return tuple(next(rest) if slot is None else slot for slot in slots)


def _images(raw: Any, place: Place) -> tuple[Image, ...]:
    if raw is None:
        return ()
    return tuple(_image(entry, place) for entry in (raw if isinstance(raw, list) else [raw]))


def _image(entry: Any, place: Place) -> Image:
    data, path = None, entry
    if isinstance(entry, dict):
        data, path = entry.get("bytes"), next((entry[key] for key in ("path", "url") if entry.get(key) is not None), None)
    elif isinstance(entry, bytes):
        data, path = entry, None
    if isinstance(data, bytes) and isinstance(path, str | None):
        return Image(data, path)
    if data is not None or not isinstance(path, str):
        raise BadRecord("malformed image", f"{entry!r:.200}; needed are bytes or a path")
    if path.startswith("data:"):
        return Image(_from_data_url(path), None)
    if place.members is not None:
        return _member(path, place.members)
    try:
        return Image(None, follow(place.folder, path))
    except ValueError as error:
        raise BadRecord("refused image", f"{path!r:.200}: {error}") from error


def _member(path: str, members: Iterable[Image]) -> Image:
    """The image of a sample by its whole name, its name without folders, or its ending."""
    names = []
    for image in members:
        name = image.part.name if image.part is not None else ""
        file = name.rpartition("/")[2]
        if path in (name, name.removeprefix("./"), file, file.partition(".")[2]):
            return image
        names.append(name)
    raise BadRecord("missing image", f"{path!r:.200} is no image of its sample, which has {', '.join(names) or 'none'}")


def _from_data_url(url: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma:
        raise BadRecord("malformed image", f"{url!r:.80} is a data: URL without data")
    return _from_base64(content) if header.endswith(";base64") else unquote_to_bytes(content)


def _from_base64(encoded: Any) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadRecord("malformed image", f"{encoded!r:.80} is not base64: {error}") from error


def _as_text(value: Any) -> str:
    return encodable(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))


def encodable(text: str) -> str:
    """The text, where it has a UTF-8: JSON can spell half of a pair of surrogates, of which no tokenizer makes a token."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("malformed text", f"{text!r:.200}: {error}") from error
    return text
