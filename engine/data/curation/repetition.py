"""Text that repeats itself, by the rules of Gopher (Rae et al. 2021, arXiv 2112.11446, section A.1.1 and table A1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from ...errors import BadRecord
from ..records import Record
from .config import Repetition
from .text import ngrams, part_text, words


def repetition(settings: Repetition) -> Callable[[Record], Record]:
    def apply(record: Record) -> Record:
        for cause, share, limit in _shares(part_text(record, settings.part), settings):
            if share > limit:
                raise BadRecord(cause, f"{share:.3f}; the limit is {limit}")
        return record

    return apply


def _shares(text: str, settings: Repetition) -> Iterator[tuple[str, float, float]]:
    """Each rule as (cause, share that the text has, limit), for texts that are long enough."""
    spelled = words(text)
    if len(spelled) < settings.min_words:
        return
    lines = _pieces(text.split("\n"))
    paragraphs = _pieces(text.split("\n\n"))
    yield "repeated lines", duplicate_share(lines), settings.lines
    yield "characters in repeated lines", duplicate_character_share(lines), settings.line_characters
    yield "repeated paragraphs", duplicate_share(paragraphs), settings.paragraphs
    yield "characters in repeated paragraphs", duplicate_character_share(paragraphs), settings.paragraph_characters
    for n, limit in settings.top_ngrams.items():
        yield f"most frequent {n}-gram", top_ngram_share(spelled, n), limit
    for n, limit in settings.duplicate_ngrams.items():
        yield f"repeated {n}-grams", duplicate_ngram_share(spelled, n), limit


def _pieces(parts: list[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


def duplicate_share(pieces: list[str]) -> float:
    """Share of the pieces that stood before."""
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def duplicate_character_share(pieces: list[str]) -> float:
    """Share of the characters that are in pieces which stood before."""
    total = sum(map(len, pieces))
    return 1 - sum(map(len, set(pieces))) / total if total else 0.0


def top_ngram_share(spelled: list[str], n: int) -> float:
    """Share of the characters (of words, without what is between them) that are in occurrences of the most frequent n-gram; of those
    that are equally frequent, of the longest. 0 where no n-gram occurs twice. Characters in two occurrences count once."""
    found = ngrams(spelled, n)
    counts = Counter(found)
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    top = max((gram for gram, count in counts.items() if count == most), key=lambda gram: (sum(map(len, gram)), gram))
    return _covered([i for i, gram in enumerate(found) if gram == top], spelled, n)


def duplicate_ngram_share(spelled: list[str], n: int) -> float:
    """Share of the characters that are in n-grams which stood before; characters in several of them count once."""
    seen: set[tuple[str, ...]] = set()
    again = []
    for i, gram in enumerate(ngrams(spelled, n)):
        if gram in seen:
            again.append(i)
        seen.add(gram)
    return _covered(again, spelled, n)


def _covered(starts: list[int], spelled: list[str], n: int) -> float:
    """Share of the characters that are in the n words from each of these places on."""
    places = {i for start in starts for i in range(start, start + n)}
    return sum(len(spelled[i]) for i in places) / sum(map(len, spelled)) if places else 0.0
