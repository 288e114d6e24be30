"""Rules for answers that a model wrote, and the majority among several answers to one question."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from decimal import Decimal, localcontext

from ...errors import BadRecord
from ..images import ImageLimits
from ..records import Record
from .arithmetic import wrong_equation
from .config import Answers, Extraction, Majority
from .pictures import images_digest
from .steps import Removed, SourceStep
from .text import DIGEST_BYTES, digest, encoded, normalise, part_text, split_response

_NUMBER = re.compile(r"(?:(?<![A-Za-z0-9_.])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def final_answer(answer: str, extract: Extraction) -> str:
    """What counts of an answer; empty where it is not there."""
    if extract == "boxed":
        return last_boxed(answer)
    if extract == "last_line":
        return answer.strip().rpartition("\n")[2].strip()
    if extract == "last_number":
        return next(iter(reversed(_NUMBER.findall(answer))), "")
    return answer.strip()


def last_boxed(text: str) -> str:
    """The contents of the last ``\\boxed{}`` whose braces are closed; empty where there is none."""
    for piece in reversed(text.split(r"\boxed{")[1:]):
        depth = 1
        for i, character in enumerate(piece):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return piece[:i].strip()
    return ""


def normal_answer(answer: str) -> str:
    """One spelling for answers that are the same: (B). and b, $1,000.0$ and 1000."""
    text = _LATEX_TEXT.sub(r"\1", normalise(answer)).strip("$ ").rstrip(". ")
    text = re.sub(r"^\((\w+)\)$", r"\1", text)
    if not _NUMBER.fullmatch(text):
        return text
    with localcontext(prec=len(text)):  # every digit counts
        return f"{Decimal(text.replace(',', '')).normalize():f}"


def answers(settings: Answers) -> Callable[[Record], Record]:
    forbidden = [re.compile(pattern, re.IGNORECASE) for pattern in settings.forbidden]
    choices = {normal_answer(choice) for choice in settings.choices}

    def apply(record: Record) -> Record:
        thought, answer = split_response(record)
        response = record.messages[-1][1]
        _check_thought(thought, response, settings)
        final = final_answer(answer, settings.extract)
        if not answer.strip():
            raise BadRecord("empty answer", f"{response!r:.200}")
        if not final:
            raise BadRecord("no final answer", f"no {settings.extract} in {answer!r:.200}")
        for pattern in forbidden:
            if found := pattern.search(thought + "\n" + answer):
                raise BadRecord("placeholder left", f"{found[0]!r:.200}")
        if settings.matches is not None and not re.fullmatch(settings.matches, final, re.DOTALL):
            raise BadRecord("wrong form", f"{final!r:.200} does not match {settings.matches}")
        if choices and normal_answer(final) not in choices:
            raise BadRecord("not a choice", f"{final!r:.200}")
        if settings.reference is not None:
            _check_reference(final, _column(record, settings.reference), settings.extract)
        if settings.arithmetic and (wrong := wrong_equation(thought) or wrong_equation(answer)):
            raise BadRecord("wrong arithmetic", wrong)
        return record

    return apply


def _check_thought(thought: str, response: str, settings: Answers) -> None:
    opened, closed = response.count("<think>"), response.count("</think>")
    if opened != closed or opened > 1 or (opened and not response.lstrip().startswith("<think>")):
        raise BadRecord("broken thought", f"{opened} <think>, {closed} </think> in {response!r:.200}")
    if opened and not thought.strip():
        raise BadRecord("empty thought", f"{response!r:.200}")
    if settings.thought == "required" and not opened:
        raise BadRecord("no thought", f"{response!r:.200}")
    if settings.thought == "forbidden" and opened:
        raise BadRecord("a thought", f"{response!r:.200}")


def _check_reference(final: str, reference: str, extract: Extraction) -> None:
    # A reference is a worked solution, or the bare result.
    right = final_answer(reference, extract) or reference
    if normal_answer(final) != normal_answer(right):
        raise BadRecord("wrong answer", f"{final!r:.100}; the reference is {right!r:.100}")


def _column(record: Record, name: str) -> str:
    value = dict(record.extra).get(name)
    if value is None:
        raise BadRecord("no column", f"{name!r} is missing or empty")
    return value


def majority(name: str, settings: Majority, limits: ImageLimits) -> SourceStep:
    """Self-consistency (Wang et al. 2022, arXiv 2203.11171). Answers without a final answer vote for none, and lower
    the winner's share."""

    def signature(record: Record) -> bytes:
        _, answer = split_response(record)
        final = final_answer(answer, settings.extract)
        if settings.group is not None:
            question = digest(encoded(_column(record, settings.group)))
        else:
            question = digest(encoded(normalise(part_text(record, "prompt"))), images_digest(record, limits))
        return question + (digest(encoded(normal_answer(final))) if final else b"")

    def decide(signatures: Iterable[tuple[int, bytes]]) -> dict[int, Removed]:
        questions: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
        for number, value in signatures:
            questions[value[:DIGEST_BYTES]].append((number, value[DIGEST_BYTES:]))
        return {number: removed for votes in questions.values() for number, removed in _losers(votes, settings)}

    return SourceStep(name, signature, decide)


def _losers(votes: list[tuple[int, bytes]], settings: Majority) -> Iterable[tuple[int, Removed]]:
    """Those of the answers to one question that go: (number, digest of the final answer or nothing)."""
    ranked = Counter(answer for _, answer in votes if answer).most_common(2)
    winner, most = ranked[0] if ranked else (b"", 0)
    second = ranked[1][1] if len(ranked) > 1 else 0
    share = f"{most} of {len(votes)} answers agree"
    if most == second or most < settings.min_share * len(votes):
        return [(number, Removed("no majority", share)) for number, _ in votes]
    if most < settings.min_votes:
        return [(number, Removed("too few votes", share)) for number, _ in votes]
    return [(number, Removed("outvoted" if answer else "no final answer", share)) for number, answer in votes if answer != winner]
