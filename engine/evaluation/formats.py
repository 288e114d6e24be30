"""The formats that benchmarks come in: one row to one question. docs/evaluation.md has the columns."""

from __future__ import annotations

import ast
import base64
import binascii
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.chat import PLACEHOLDER
from ..data.forms import encodable
from ..data.records import Image
from ..errors import BadRecord
from .scorers import boxed

GROUP_COLUMNS = ("file", "category", "l2-category", "subject", "type", "level")
# A shorter entry in a column of images is the index of the row that has the image.
LONGEST_INDEX = 64
_MARKER = re.compile(r"<image\s*(\d+)>")


@dataclass(frozen=True)
class Asked:
    """What a row asks. text: with a placeholder for each image; answers: any of these is right, a letter where there are options;
    scorer: by which the format is scored; groups: kinds of questions that it is one of, as "subject=algebra"."""

    text: str
    images: tuple[Image, ...]
    answers: tuple[str, ...]
    scorer: str
    options: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """What the rows of a file have in common. folder: to which paths of images are relative; images: column of images by index."""

    folder: Path
    images: Mapping[str, str] = field(default_factory=dict)


def images_by_index(rows: Sequence[Any]) -> dict[str, str]:
    """The images that other rows may have by the index of the row."""
    own = ((str(row.get("index")), row.get("image")) for row in rows if isinstance(row, Mapping))
    return {index: image for index, image in own if isinstance(image, str) and len(image) > LONGEST_INDEX}


def ask_gsm8k(row: Mapping[str, Any], source: Source) -> Asked:
    """question; answer, with the number after ``####`` (Cobbe et al. 2021, arXiv 2110.14168)."""
    answer = _text(row, "answer")
    if "####" not in answer:
        raise BadRecord("no answer", f"no #### in the answer {answer!r:.200}")
    return Asked(_text(row, "question"), (), (answer.rpartition("####")[2].strip(),), "number", groups=_groups(row))


def ask_math(row: Mapping[str, Any], source: Source) -> Asked:
    r"""problem; answer, or a solution whose last ``\boxed{...}`` is it (Hendrycks et al. 2021, arXiv 2103.03874)."""
    answer = _text(row, "answer") if _cell(row.get("answer")) else boxed(_text(row, "solution"))
    if not answer:
        raise BadRecord("no answer", f"no closed \\boxed in the solution {row['solution']!r:.200}")
    return Asked(_text(row, "problem"), (), (answer,), "math", groups=_groups(row))


def ask_table(row: Mapping[str, Any], source: Source) -> Asked:
    """question, hint, options (columns A, B, ... or a list ``choices``), answer, image or image_path: as VLMEvalKit and MMLU."""
    options = _options(row)
    parts = [_cell(row.get("hint")), _text(row, "question"), *(f"{letter}. {option}" for letter, option in options.items())]
    text, images = _placed("\n".join(filter(None, parts)), _images(row, source))
    answers = (_letter(row, options),) if options else _answers(row)
    return Asked(text, images, answers, "choice" if options else "text", options, _groups(row))


FORMATS: dict[str, Callable[[Mapping[str, Any], Source], Asked]] = {"table": ask_table, "gsm8k": ask_gsm8k, "math": ask_math}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = _cell(row.get(column))
    if not value:
        raise BadRecord("no answer" if column in ("answer", "solution") else "no question", f"{column} is {row.get(column)!r:.200}")
    return value


def _cell(value: Any) -> str:
    """A cell as text; "nan" is what tables written by pandas may have where there is nothing."""
    if value is None or value != value or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        return ""
    return encodable(str(value).strip())


def _entry(value: Any) -> str:
    """An entry of a list as text; "nan" is one as any other."""
    return "" if value is None else encodable(str(value).strip())


def _first(row: Mapping[str, Any], *columns: str) -> Any:
    """What stands in the first of the columns that is not null."""
    return next((row[column] for column in columns if row.get(column) is not None), None)


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    listed = _first(row, "choices", "options")
    if isinstance(listed, Mapping):  # as in {"text": [...], "label": [...]}
        listed = listed.get("text")
    if isinstance(listed, str) and _cell(listed):  # a cell of a table can only spell them
        cell, listed = _cell(listed), _spelled(_cell(listed))
        if listed is None:
            raise BadRecord("malformed options", f"{cell!r:.200} is no list")
    if isinstance(listed, list) and listed:
        return dict(zip(string.ascii_uppercase, map(_entry, listed), strict=False))
    return {letter: _cell(row[letter]) for letter in string.ascii_uppercase if _cell(row.get(letter))}


def _letter(row: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """The right option: its label where it has one, its letter, its text, or its place in ``choices`` as an integer from 0."""
    answer = _first(row, "answer", "answerKey")
    given = _entry(answer)
    labelled = {label: letter for label, letter in zip(_labels(row), options, strict=False) if label}
    if given in labelled or given in options:
        return labelled.get(given, given)
    letters = [letter for letter, option in options.items() if given and option == given]
    if isinstance(answer, int):
        letters = list(options)[answer : answer + 1] if answer >= 0 else []
    if len(letters) != 1:
        raise BadRecord("no answer", f"the answer {answer!r:.200} is none of the options {', '.join(options)}")
    return letters[0]


def _labels(row: Mapping[str, Any]) -> list[str]:
    """By what the answer names the options, as in {"text": [...], "label": ["1", ...]}."""
    listed = _first(row, "choices", "options")
    labels = listed.get("label") if isinstance(listed, Mapping) else None
    return [_entry(label) for label in labels] if isinstance(labels, list) else []


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
    raw = _first(row, "answer", "answers")
    if isinstance(raw, Mapping):  # as in {"text": [...], "answer_start": [...]}
        raw = raw.get("text")
    if isinstance(raw, Mapping) or (isinstance(raw, list) and any(isinstance(entry, Mapping) for entry in raw)):
        raise BadRecord("no answer", f"answer is {raw!r:.200}; needed is a text or a list of texts")
    answers = tuple(filter(None, map(_cell, raw if isinstance(raw, list) else _any_of(_cell(raw)))))
    if not answers:
        raise BadRecord("no answer", f"answer is {raw!r:.200}")
    return answers


def _groups(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{column}={_cell(row[column])}" for column in GROUP_COLUMNS if _cell(row.get(column)))


def _listed(cell: str) -> list[str]:
    """The entries of a cell that spells a list, else the cell."""
    found = _spelled(cell)
    return [cell] if found is None else [str(entry) for entry in found]


def _any_of(cell: str) -> list[str]:
    """The right answers that a cell spells: a list of texts is several, one of numbers is one answer."""
    found = _spelled(cell)
    return found if found is not None and all(isinstance(entry, str) for entry in found) else [cell]


def _spelled(cell: str) -> list[Any] | None:
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return found if isinstance(found, list) else None


def _images(row: Mapping[str, Any], source: Source) -> list[Image]:
    raw = next((row[column] for column in ("image", "images") if not _is_nothing(row.get(column))), None)
    if _is_nothing(raw):
        paths = row.get("image_path")
        return [_from_path(p, source) for p in (paths if isinstance(paths, list) else _listed(_cell(paths))) if _cell(p)]
    if isinstance(raw, str) and len(raw) <= LONGEST_INDEX and raw.strip() in source.images:
        raw = source.images[raw.strip()]
    entries = raw if isinstance(raw, list) else _listed(raw.strip()) if isinstance(raw, str) else [raw]
    return [_image(entry, source) for entry in entries]


def _is_nothing(raw: Any) -> bool:
    return raw in (None, []) or (isinstance(raw, str | float) and not _cell(raw))


def _image(entry: Any, source: Source) -> Image:
    """An image as bytes, as {bytes, path} or in base64."""
    if isinstance(entry, Mapping):
        if entry.get("bytes") is None and isinstance(entry.get("path"), str):
            return _from_path(entry["path"], source)
        entry = entry.get("bytes")
    if isinstance(entry, bytes):
        return Image(entry, None)
    if not isinstance(entry, str):
        raise BadRecord("malformed image", f"{entry!r:.200}; needed are bytes, base64 or a path")
    if len(entry) <= LONGEST_INDEX:
        raise BadRecord("missing image", f"{entry!r}: too short for an image, and no row with one has this index")
    try:
        return Image(base64.b64decode(entry.rpartition("base64,")[2], validate=True), None)
    except (binascii.Error, ValueError) as error:
        raise BadRecord("corrupt image", f"{entry!r:.80} is no base64: {error}") from error


def _from_path(path: Any, source: Source) -> Image:
    return Image(None, str(source.folder / str(path).strip()))


def _placed(text: str, images: list[Image]) -> tuple[str, tuple[Image, ...]]:
    """The text with a placeholder for each image: for ``<image 1>`` image 1, as often as it stands there; the others first."""
    marked = [int(n) for n in _MARKER.findall(text)]
    if marked and (wrong := [n for n in marked if not 0 < n <= len(images)]):
        raise BadRecord("placeholder mismatch", f"<image {wrong[0]}> in the question, {len(images)} images")
    if marked:
        first = [image for n, image in enumerate(images, 1) if n not in marked]
        return PLACEHOLDER * len(first) + _MARKER.sub(PLACEHOLDER, text), (*first, *(images[n - 1] for n in marked))
    return PLACEHOLDER * (len(images) - text.count(PLACEHOLDER)) + text, tuple(images)
