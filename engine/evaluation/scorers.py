"""What makes an answer right: pure functions of the answer's text and the truth."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType
from typing import Any

from ..errors import UserError

# "The answer is", "Final answer:", "the correct option to this is"; what follows is the answer.
_ANSWER_IS = re.compile(
    r"\b(?:answer|option|choice)\b[^.:=\n]{0,40}?(?:\b(?:is|are|would\s+be|should\s+be)\b\s*[:=]?|[:=])\s*(?:option\s+|choice\s+)?"
    r"|答案[^。:=\n]{0,10}?[是为:=]\s*:?\s*(?:选项?)?",
    re.IGNORECASE,
)
_OPTION = r"(?:option\s+|choice\s+)?\(?[A-Z]\)?(?![\w'])"
_NEGATED = re.compile(rf"(?:\bnot|n't)\s+{_OPTION}|\b[Nn]either\s+{_OPTION}(?:\s*,\s*{_OPTION}|,?\s+nor\s+{_OPTION})+")
# What after a letter says that another one is meant as well: "or B", "/B", ", (C)".
_AS_WELL = re.compile(r"\)?\s*(?:(?:or|and)\b|/|,)\s*(?:option\s+|choice\s+)?\(?([A-Z])(?![\w'])")
_LEADING_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Z])(?![\w'])|([a-z])(?=[).:]|\s*$)")
# Chinese text has no space before a number.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])(?P<sign>[-+]?)\s*[$€£¥]?\s*"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?"
    r"(?:\s*/\s*(?P<below>\d+)(?![\d/.]))?"
)
_MIXED = re.compile(r"(?<![A-Za-z0-9_.,])(?P<sign>[-+]?)(?P<whole>\d+)\s+(?P<above>\d+)\s*/\s*(?P<below>\d+)(?![\d/.])")
# The dash of a list, or between words: no sign of a number.
_DASH = re.compile(r"(?m)(?:^|(?<=[\w)]))[^\S\n]*(?<!\S)-[^\S\n]+")
_EQUATION = re.compile(r"^[\s\d.,;()+*/\u00d7\u00f7x^$=-]*=")  # the left sides of "3 + 4 = 7"
_LONGEST_NUMBER = 300  # characters; longer ones are no answers, and Python refuses to read them
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True)
class Truth:
    """What is right. answers: any of these; options: text by letter, of a question that has some, whose answers are letters;
    tolerance: relative error that numbers may have, the scorer's own when None."""

    answers: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | None = None


@dataclass(frozen=True)
class Outcome:
    """score: from 0 to 1; found: what was taken for the answer, None where nothing could be: such a text has no score."""

    score: float
    found: str | None


Scorer = Callable[[str, Truth], Outcome]
UNPARSED = Outcome(0.0, None)
MINUS = "\N{MINUS SIGN}"


def exact(answer: str, truth: Truth) -> Outcome:
    """The same text, white space around it aside."""
    found = answer.strip()
    return _outcome(found, found in {a.strip() for a in truth.answers})


def text(answer: str, truth: Truth) -> Outcome:
    """The same words, whatever their case, punctuation, articles and white space (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    found = words(answer)
    return _outcome(found, found in {words(a) for a in truth.answers})


def contains(answer: str, truth: Truth) -> Outcome:
    """A right answer stands in the text, as whole words."""
    found = words(answer)
    return _outcome(found, any(_has_words(found, words(a)) for a in truth.answers))


def choice(answer: str, truth: Truth) -> Outcome:
    """The letter of a right option, or the text of one."""
    found = chosen_letter(answer, truth.options)
    return UNPARSED if found is None else Outcome(float(found in truth.answers), found)


def number(answer: str, truth: Truth) -> Outcome:
    """The same number; units, currency and thousands separators are passed over, fractions and decimals are the same."""
    found = stated_number(answer)
    if found is None:
        return UNPARSED
    return Outcome(float(any(_near(found, stated_number(a), truth.tolerance or 0.0) for a in truth.answers)), str(found))


def relaxed(answer: str, truth: Truth) -> Outcome:
    """Of a number, within 5% of it; of other answers, the same words (Masry et al. 2022, arXiv 2203.10244, section 5.1)."""
    tolerance = 0.05 if truth.tolerance is None else truth.tolerance
    numbers = [_only_number(a) for a in truth.answers]
    if (found := stated_number(answer)) is not None and any(_near(found, n, tolerance) for n in numbers):
        return Outcome(1.0, str(found))
    return text(answer, truth)


def anls(answer: str, truth: Truth) -> Outcome:
    """Average normalised Levenshtein similarity, 0 below one half (Biten et al. 2019, arXiv 1905.13648)."""
    found = " ".join(answer.lower().split())
    if not found:
        return UNPARSED
    best = max((_similarity(found, " ".join(a.lower().split())) for a in truth.answers), default=0.0)
    return Outcome(best if best >= 0.5 else 0.0, found)


def math(answer: str, truth: Truth) -> Outcome:
    """The same expression, as math-verify sees it: the last box of the text, else its last formula or number."""
    verifier = load_math_verify()
    found = _formula(answer, verifier)
    if not found:
        return UNPARSED
    right = any(verifier.verify(verifier.parse(f"${a}$"), found) for a in truth.answers)
    return Outcome(float(right), str(found[-1]))


SCORERS: dict[str, Scorer] = {
    "exact": exact, "text": text, "contains": contains, "choice": choice, "number": number, "math": math, "anls": anls,
    "relaxed": relaxed,
}  # fmt: skip


def is_readable(scorer: str, truth: Truth) -> bool:
    """Whether the scorer finds something in a right answer: no answer could be like one in which it finds nothing."""
    # math-verify gives up on a clock: what it finds here would not be the same on every rank.
    found = text if scorer == "math" else SCORERS[scorer]
    return any(found(answer, truth).found is not None for answer in truth.answers)


def load_math_verify() -> ModuleType:
    """The library of the scorer math. Raises UserError where it is not installed."""
    try:
        import math_verify
    except ImportError as error:
        raise UserError("the scorer math needs math-verify: pip install 'smalt[evaluation]'") from error
    return math_verify


def boxed(answer: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, braces balanced; None without one."""
    start = max(answer.rfind(r"\boxed{"), answer.rfind(r"\fbox{"))
    if start < 0:
        return None
    first = answer.index("{", start) + 1
    depth = 1
    for end in range(first, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[first:end].strip()
    return None


def words(answer: str) -> str:
    """Lower-case words without punctuation and English articles, one space between them. A sign or a point inside a number stays."""
    plain = unicodedata.normalize("NFKC", answer).lower()
    kept = "".join(c if _is_word(plain, i) else " " for i, c in enumerate(plain))
    return " ".join(_ARTICLES.sub(" ", kept).split()) or " ".join(kept.split())


def _is_word(plain: str, at: int) -> bool:
    c = plain[at]
    before, after = plain[at - 1 : at], plain[at + 1 : at + 2]
    in_number = c in ".," and before.isdigit() and after.isdigit()
    sign = c == "-" and after.isdigit() and not before.isalnum()
    return in_number or sign or c.isalnum() or unicodedata.category(c) in ("Mn", "Mc", "Sm", "Sc")


def _has_words(found: str, wanted: str) -> bool:
    return bool(wanted) and f" {wanted} " in f" {found} "


def _outcome(found: str, right: bool) -> Outcome:
    return Outcome(float(right), found) if found else UNPARSED


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that a text chooses; None where it names none, or several and does not say which it means.

    In this order: what stands in the last box, or follows the last "answer is" (option, choice; : or = for is); the whole text; its
    first letter with a mark after it; the one letter in brackets; the one option whose text it holds; the one capital on its own.
    """
    plain = _NEGATED.sub(" ", _without_marks(answer)).strip()
    box = boxed(plain)
    statements = ([box] if box else []) + [plain[m.end() :] for m in reversed(list(_ANSWER_IS.finditer(plain)))]
    for said in statements:
        line = said.split("\n")[0]
        if letter := _whole_letter(line, options) or _option_said(line, options) or _leading_letter(said, options):
            return letter
    if letter := _whole_letter(plain, options) or _option_said(plain, options) or _marked_letter(plain, options):
        return letter
    bracketed = {c.upper() for c in re.findall(r"\(([A-Za-z])\)", plain)} & set(options)
    if len(bracketed) == 1:
        return bracketed.pop()
    return _option_inside(plain, options) or _lone_capital(plain, options)


def _without_marks(answer: str) -> str:
    """Without what Markdown and LaTeX put around words."""
    return re.sub(r"\\text(?:bf)?\{([^{}]*)\}|[*_`$]", lambda m: m[1] or "", unicodedata.normalize("NFKC", answer))


def _leading_letter(said: str, options: Mapping[str, str]) -> str | None:
    return _alone(_LEADING_LETTER.match(said.strip()), options)


def _alone(match: re.Match[str] | None, options: Mapping[str, str]) -> str | None:
    """The letter of a match, where it names an option and no other one is named with it."""
    letter = next(filter(None, match.groups()), "").upper() if match else ""
    more = _AS_WELL.match(match.string, match.end()) if match else None
    return letter if letter in options and (more is None or more[1] == letter or more[1] not in options) else None


def _whole_letter(plain: str, options: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"[\s(\['\"]*([A-Za-z])[\s)\]'\".:,;!。]*", plain)
    return match[1].upper() if match and match[1].upper() in options else None


def _marked_letter(plain: str, options: Mapping[str, str]) -> str | None:
    """The letter of "B. Paris", "(B) Paris", "B) Paris", "B: Paris", and of a first line that is a letter."""
    match = re.match(r"\(([A-Za-z])\)|([A-Z])(?:[).:]\s|\s*\n|\s+-\s)", plain)
    return _alone(match, options)


def _option_said(plain: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text this is."""
    said = words(plain)
    found = [letter for letter, option in options.items() if said and words(option) == said]
    return found[0] if len(found) == 1 else None


def _option_inside(plain: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in this; "York" in "New York" does not count beside it."""
    said = words(plain)
    inside = {letter: words(option) for letter, option in options.items() if _has_words(said, words(option))}
    largest = [a for a, own in inside.items() if not any(own != other and _has_words(other, own) for other in inside.values())]
    return largest[0] if len(largest) == 1 else None


def _lone_capital(plain: str, options: Mapping[str, str]) -> str | None:
    """The one capital that stands alone and names an option; "A" and "I" before a word are words, unless "option" precedes them
    or the word is as "is"."""
    capitals = (
        r"(?:(?<=[Oo]ption )|(?<=[Cc]hoice ))[A-Z]|(?<![A-Za-z0-9_'])(?:[B-HJ-Z]|[AI](?=\s*(?:[^\w\s]|$)|\s+(?:or|and|is|seems)\b))"
    )
    found = {c for c in re.findall(rf"({capitals})(?![\w'])", plain) if c in options}
    return found.pop() if len(found) == 1 else None


def stated_number(answer: str) -> Fraction | None:
    """The number that a text ends with, or states: in its last box, after its last #### or "answer is", else its last one."""
    plain = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", unicodedata.normalize("NFKC", answer).replace(MINUS, "-"))
    plain = re.sub(r"\\[,!;: ]|\\text\{[^{}]*\}|[*`]", "", plain.replace(r"\$", "$").replace("{,}", ","))
    if not _NUMBER.fullmatch(plain.strip()):
        plain = _DASH.sub(" ; ", plain)
    stated = [boxed(plain)] if boxed(plain) else []
    stated += [plain[plain.rfind("####") + 4 :]] if "####" in plain else []
    stated += [plain[m.end() :] for m in reversed(list(_ANSWER_IS.finditer(plain)))]
    for said in filter(None, stated):
        if numbers := _numbers(_EQUATION.sub("", said.split("\n")[0])):
            return numbers[0]
    numbers = _numbers(plain)
    return numbers[-1] if numbers else None


def _numbers(plain: str) -> list[Fraction]:
    found, at = [], 0
    while single := _NUMBER.search(plain, at):
        mixed = _MIXED.search(plain, at)
        match = mixed if mixed and mixed.start("whole") == single.start("digits") else single
        at = match.end()
        if len(match[0]) <= _LONGEST_NUMBER:
            found.append(_mixed_value(match) if match is mixed else _value(match))
    return found


def _value(match: re.Match[str]) -> Fraction:
    value = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    below = int(match["below"] or 1)
    return (-value if match["sign"] == "-" else value) / (below or 1)


def _mixed_value(match: re.Match[str]) -> Fraction:
    value = int(match["whole"]) + Fraction(int(match["above"]), int(match["below"]) or 1)
    return -value if match["sign"] == "-" else value


def _only_number(answer: str) -> Fraction | None:
    """The number of a text that is nothing but one, with its currency or per cent."""
    match = _NUMBER.fullmatch(answer.strip().rstrip("%").strip())
    return _value(match) if match and len(match[0]) <= _LONGEST_NUMBER else None


def _near(found: Fraction, wanted: Fraction | None, tolerance: float) -> bool:
    return wanted is not None and abs(found - wanted) <= Fraction(tolerance) * abs(wanted)


def _formula(text: str, verifier: Any) -> list[Any]:
    """What math-verify makes of a text. Of bare x^2 + 1 it would take the last number: a text without words is a formula."""
    commands_left_out = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+", "", text)
    bare = not re.search(r"\$|\\[(\[]|\\boxed", text) and not re.search(r"[A-Za-z]{3,}", commands_left_out)
    return verifier.parse(f"${text.strip()}$") if bare and text.strip() else verifier.parse(text)


def _similarity(a: str, b: str) -> float:
    """1 less the Levenshtein distance over the longer length."""
    if not b:
        return float(not a)
    row = list(range(len(b) + 1))
    for i, c in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, d in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (c != d))
    return 1 - row[-1] / max(len(a), len(b))
