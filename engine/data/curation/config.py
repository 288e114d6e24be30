"""The config of a curation: one TOML file with the sources, where the result goes, and the steps in the order of the file."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from ...config import read_toml, validated
from ...sections import ColumnsConfig, Section
from ..forms import NAMES


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return value


Pattern = Annotated[str, AfterValidator(_pattern)]
Part = Literal["record", "prompt", "response", "thought", "answer"]
Extraction = Literal["whole", "boxed", "last_line", "last_number"]
Share = Annotated[float, Field(ge=0, le=1)]
NGram = Annotated[int, Field(ge=1, le=100)]
Name = Annotated[str, Field(pattern=r"^[^/\x00]+$")]
# Beyond ten of the 64 bits, hashes of images that have nothing in common are near too.
Distance = Annotated[int, Field(ge=0, le=10)]

_PLACEHOLDERS = [r"<image>", r"<\|[^|<>]*\|>", r"\{\{.*?\}\}", r"\[(?:insert|your|placeholder)\b[^\]]*\]"]


class Clean(Section):
    """Changes text, removes nothing: Unicode NFC, no control characters, no spaces at the ends of lines and of messages."""

    kind: Literal["clean"] = "clean"


class ExactDuplicates(Section):
    kind: Literal["exact_duplicates"] = "exact_duplicates"
    part: Part = "record"
    """What is compared, after case, spaces and Unicode forms are made alike."""
    images: bool = True
    """Whether the bytes of the images must be the same too."""


class NearText(Section):
    kind: Literal["near_text"] = "near_text"
    part: Part = "record"
    """What is compared."""
    threshold: float = Field(0.8, ge=0.1, le=0.95)
    """Smallest share of common n-grams (Jaccard similarity, estimated by MinHash) of near duplicates."""
    ngram: NGram = 5
    """Words of an n-gram."""
    permutations: int = Field(128, ge=16, le=1024)
    """Hash functions of MinHash: 4 bytes a record each; the error of the estimate is about one over their square root."""
    images: bool = True
    """Compare only records whose images' bytes are the same."""


class NearImages(Section):
    kind: Literal["near_images"] = "near_images"
    distance: Distance = 4
    """Most bits, of 64, in which the perceptual hashes of near-duplicate images differ."""
    text: bool = True
    """Compare only records with the same text: a picture with two questions is no duplicate."""


class Length(Section):
    kind: Literal["length"] = "length"
    part: Part = "record"
    """What is measured."""
    unit: Literal["characters", "words", "tokens"] = "characters"
    """In what; images do not count."""
    minimum: int = Field(0, ge=0)
    """Shorter ones are removed."""
    maximum: int | None = Field(None, ge=0)
    """Longer ones are removed."""
    tokenizer: Path | None = None
    """tokenizer.json, for tokens."""

    @model_validator(mode="after")
    def _check(self) -> Length:
        if self.minimum == 0 and self.maximum is None:
            raise ValueError("neither minimum nor maximum is set: nothing would be removed")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise ValueError("unit = 'tokens' and tokenizer go together")
        return self


class Language(Section):
    kind: Literal["language"] = "language"
    part: Part = "record"
    """What is judged."""
    allowed: list[str] = Field(min_length=1)
    """Languages by their ISO 639 code, as en or zh."""
    min_confidence: Share = 0.5
    """Records whose likeliest language is less likely than this are removed."""
    min_characters: int = Field(20, ge=1)
    """Shorter texts say too little, and stay."""


class Repetition(Section):
    """The rules for repetition of Gopher (Rae et al. 2021, arXiv 2112.11446, table A1), with its limits as defaults."""

    kind: Literal["repetition"] = "repetition"
    part: Part = "record"
    """What is judged."""
    min_words: int = Field(50, ge=1)
    """Shorter texts repeat themselves by their nature, and stay."""
    lines: Share = 0.30
    """Largest share of lines that stood before."""
    line_characters: Share = 0.20
    """Largest share of characters in such lines."""
    paragraphs: Share = 0.30
    """Largest share of paragraphs that stood before."""
    paragraph_characters: Share = 0.20
    """Largest share of characters in such paragraphs."""
    top_ngrams: dict[NGram, Share] = Field({2: 0.20, 3: 0.18, 4: 0.16})
    """Largest share of characters in the most frequent n-gram, by n."""
    duplicate_ngrams: dict[NGram, Share] = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})
    """Largest share of characters in n-grams that stood before, by n."""


class Images(Section):
    """Number and size of images; sizes are read from headers, no pixel is decoded."""

    kind: Literal["images"] = "images"
    min_count: int = Field(0, ge=0)
    """Fewest images of a record."""
    max_count: int | None = Field(None, ge=0)
    """Most images of a record."""
    min_side: int = Field(1, ge=1)
    """Smallest shorter side in pixels."""
    max_side: int | None = Field(None, ge=1)
    """Largest longer side in pixels."""
    max_aspect: float | None = Field(None, ge=1)
    """Largest ratio of the longer side to the shorter one."""


class Answers(Section):
    """Rules for answers that a model wrote; a record passes all that are set."""

    kind: Literal["answers"] = "answers"
    thought: Literal["any", "required", "forbidden"] = "any"
    """Whether there must be a thought; one that is there must be closed and not empty in any case."""
    extract: Extraction = "whole"
    """What of the answer is compared: all of it, the last \\boxed{}, the last line, the last number."""
    matches: Pattern | None = None
    """Regular expression that the whole extracted answer must match."""
    choices: list[str] = Field([])
    """The extracted answer must be one of these."""
    reference: str | None = None
    """Column of the source with the right answer, which the extracted one must equal."""
    forbidden: list[Pattern] = _PLACEHOLDERS
    """Regular expressions, without regard to case, that the response must not contain: what was left to be filled in."""
    arithmetic: bool = False
    """Whether equations between numbers in the response, as 12+8=20, must hold."""


class Majority(Section):
    """Keeps, of several answers to one question, those that agree with the majority; a question without one is removed."""

    kind: Literal["majority"] = "majority"
    group: str | None = None
    """Column of the source with the name of the question; the same prompt and images when not given."""
    extract: Extraction = "whole"
    """What of the answer is compared: all of it, the last \\boxed{}, the last line, the last number."""
    min_share: Share = 0.5
    """Smallest share of a question's answers that the winner must have."""
    min_votes: int = Field(2, ge=1)
    """Fewest answers that the winner must have."""


class Decontaminate(Section):
    kind: Literal["decontaminate"] = "decontaminate"
    sources: dict[Name, str] = Field(min_length=1)
    """Evaluation sets by name: any source, or a file of questions as evaluations read it."""
    part: Part = "record"
    """What is compared, of records and of evaluation sets."""
    ngram: int = Field(13, ge=0, le=100)
    """Words of an n-gram; texts of fewer words are compared as a whole. 0: text is not compared."""
    min_share: Share = 0.0
    """Share of a record's n-grams that must be in an evaluation set; with 0 one is enough."""
    distance: Distance | None = None
    """Most bits, of 64, in which perceptual hashes of images that are the same differ; images are not compared when not given."""
    match: Literal["any", "all"] = "any"
    """Whether text or an image is enough, or both are needed (of a record without images, the text)."""

    @model_validator(mode="after")
    def _check(self) -> Decontaminate:
        if self.ngram == 0 and self.distance is None:
            raise ValueError("ngram is 0 and distance is not set: nothing would be compared")
        if self.match == "all" and (self.ngram == 0 or self.distance is None):
            raise ValueError("match = 'all' needs both ngram and distance")
        return self


StepConfig = Annotated[
    Clean | ExactDuplicates | NearText | NearImages | Length | Language | Repetition | Images | Answers | Majority | Decontaminate,
    Field(discriminator="kind"),
]
KINDS = [section.model_fields["kind"].default for section in get_args(get_args(StepConfig)[0])]


class CurationConfig(Section):
    output: Path
    """Folder that is written: a Parquet file a source, report.json, removed.jsonl."""
    sources: dict[Name, str] = Field(min_length=1)
    """What is read, by name, in this order: the first of duplicates stays."""
    columns: dict[str, ColumnsConfig] = Field({})
    """Of sources whose columns have other names than the usual ones: those that they have."""
    keep_columns: list[str] = Field([])
    """Other columns of the sources that are kept, as text."""
    images: Literal["embed", "keep"] = "embed"
    """embed: the output holds the bytes of all images. keep: images that were files stay so, and are named by their path."""
    processes: int = Field(0, ge=0, le=4096)
    """Processes; 0: one a core. The result does not depend on it."""
    chunk: int = Field(256, ge=1)
    """Records that a process takes at a time; two chunks a process, with their images, wait in memory to be written."""
    row_group_records: int = Field(1000, ge=1)
    """Most records of a row group of the output."""
    row_group_bytes: int = Field(128 << 20, ge=1)
    """Bytes at which a row group ends."""
    max_image_bytes: int = Field(32 << 20, ge=1)
    """Larger image files cost their record, where a step or the output reads them."""
    max_image_pixels: int = Field(64 << 20, ge=1)
    """Images of more pixels cost their record, where a step looks at them."""
    examples: int = Field(3, ge=0, le=1000)
    """Records that the report names for each cause."""
    steps: dict[str, StepConfig] = Field({})
    """What is done, in this order; the kind of a step is its name when not given."""

    @field_validator("steps", mode="before")
    @classmethod
    def _fill_kinds(cls, steps: Any) -> Any:
        if not isinstance(steps, dict):
            return steps
        filled = {name: {"kind": name, **values} if isinstance(values, dict) else values for name, values in steps.items()}
        for name, values in filled.items():
            kind = values.get("kind") if isinstance(values, dict) else None
            if isinstance(kind, str) and kind not in KINDS:
                near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
                raise ValueError(f"step {name} is of the unknown kind {kind!r}; did you mean {near!r}? There are {', '.join(KINDS)}")
        return filled

    @model_validator(mode="after")
    def _check(self) -> CurationConfig:
        if taken := set(self.all_columns) & set(NAMES):
            raise ValueError(
                f"keep_columns, or the reference or group of a step, names {', '.join(sorted(taken))}: a column of this name says "
                "what a record is, and cannot be carried beside it; give it another name in the source"
            )
        return self

    @property
    def num_processes(self) -> int:
        """As many as are set; 0 stands for one a core that this process may use."""
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return self.processes or len(cores)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns that are kept and those that steps ask for, each once."""
        asked = [column for step in self.steps.values() for column in (getattr(step, "reference", None), getattr(step, "group", None))]
        return tuple(dict.fromkeys([*self.keep_columns, *filter(None, asked)]))


def load_curation(path: Path) -> CurationConfig:
    """Read and check a TOML file. Raises UserError naming the file, the key and what would be right."""
    where = f"config {path}"
    return validated(CurationConfig, read_toml(path), where)
