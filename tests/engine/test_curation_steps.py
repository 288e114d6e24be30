"""The steps of a curation: what is planted is found, what is clean stays, and what one run leaves a second one leaves too."""

import io
import itertools
import json
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter
from tokenizers import Tokenizer, models

from smalt.engine.data.curation.answers import final_answer, normal_answer
from smalt.engine.data.curation.arithmetic import wrong_equation
from smalt.engine.data.curation.config import Decontaminate, StepConfig
from smalt.engine.data.curation.decontamination import decontaminate, evaluation_index, open_sets
from smalt.engine.data.curation.filters import clean
from smalt.engine.data.curation.job import build_steps
from smalt.engine.data.curation.pictures import NearHashes
from smalt.engine.data.curation.repetition import duplicate_ngram_share, top_ngram_share
from smalt.engine.data.curation.text import words
from smalt.engine.data.images import ImageLimits
from smalt.engine.errors import BadRecord, UserError

from .curation import png, record

LIMITS = ImageLimits()
PNGS = [png(0), png(1)]
TEXT = st.text(st.sampled_from("ab \t\n\r\0\x1b\ufeff\xe9e\u0301"), max_size=20)


class Config:
    """As much of a config as steps are built from."""

    max_image_bytes, max_image_pixels = LIMITS.max_bytes, LIMITS.max_pixels

    def __init__(self, kind, values):
        self.steps = {"step": TypeAdapter(StepConfig).validate_python({"kind": kind, **values})}


def reason(apply, of):
    """Why a function removes a record; None where it returns it."""
    try:
        assert apply(of) is of
    except BadRecord as error:
        return error.cause


def cause(kind, of, **values):
    """Why a step on single records removes a record."""
    (step,) = build_steps(Config(kind, values), {})
    return reason(step.apply, of)


def decide(kind, records, **values):
    """What a step over the source removes: {place in the list: Removed}. What is left is left by a second run."""
    (step,) = build_steps(Config(kind, values), {})
    signed = [(i, step.signature(r)) for i, r in enumerate(records)]
    found = step.decide(signed)
    assert step.decide([(i, s) for i, s in signed if i not in found]) == {}
    return found


def text(seed, count=150):
    """Words of which no n-gram stands twice."""
    return " ".join(random.Random(seed).sample([f"{a}{b}{c}" for a in "bdgklmn" for b in "aeiou" for c in "rstvxz"], count))


@given(st.lists(st.tuples(st.sampled_from(["What is it?", " what  is IT? ", "And this?"]), st.sampled_from([(), (0,), (1,), (0, 1)]))))
def test_of_exact_duplicates_the_first_stays(drawn):
    found = decide("exact_duplicates", [record(question, images=[PNGS[i] for i in images]) for question, images in drawn])
    first = {}
    wanted = {i: kept for i, (q, images) in enumerate(drawn) if (kept := first.setdefault((q.strip()[:3].lower(), images), i)) != i}
    assert {i: gone.like for i, gone in found.items()} == wanted


def test_exact_duplicates_of_a_part_and_without_images():
    records = [record("a", "one", [png(0)]), record("a", "two", [png(0)]), record("a", "one", [png(1)])]
    assert set(decide("exact_duplicates", records)) == set()
    assert set(decide("exact_duplicates", records, part="prompt")) == {1}
    assert set(decide("exact_duplicates", records, images=False)) == {2}


@pytest.mark.slow
def test_text_in_which_few_words_differ_is_a_near_duplicate():
    base = [text(seed) for seed in range(30)]
    copies = [b.replace(b.split()[70], "otherwise").upper() for b in base]
    found = decide("near_text", [record(t) for t in base + copies])
    assert {i: gone.like for i, gone in found.items()} == {30 + i: i for i in range(30)}
    pictured = [record(base[0], images=[png(0)]), record(copies[0], images=[png(1)]), record(copies[0], images=[png(0)])]
    assert set(decide("near_text", pictured)) == {2}
    assert set(decide("near_text", pictured, images=False)) == {1, 2}
    assert decide("near_text", [record("", "?"), record("", "!")]) == {}  # nothing to compare


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.95])
def test_the_threshold_is_the_share_of_common_ngrams(threshold):
    half = text(0, 60).split()[:30] + text(1, 60).split()[:30]
    found = decide(
        "near_text", [record(text(0, 60)), record(" ".join(half)), record(text(0, 60))], threshold=threshold, ngram=1, permutations=256
    )
    assert set(found) == ({1, 2} if threshold < 0.3 else {2})


def test_what_only_the_bands_of_hashes_have_in_common_stays():
    base = text(0, 60).split()
    others = [record(" ".join(random.Random(seed).sample(base, 30) + [f"{word}{seed}" for word in base[:30]])) for seed in range(30)]
    assert decide("near_text", [record(" ".join(base)), *others], threshold=0.5, ngram=1) == {}


def test_a_picture_of_another_size_and_form_is_a_near_duplicate():
    plain = [record("what?", images=[png(seed)]) for seed in range(8)]
    copies = [record("what?", images=[png(seed, form="JPEG", scale=1.5)]) for seed in range(8)]
    asked = record("another question?", images=[png(0, form="JPEG")])
    more = record("what?", images=[png(0), png(1)])
    found = decide("near_images", [*plain, *copies, asked, more, record("no image"), record("no image")])
    assert {i: gone.like for i, gone in found.items()} == {8 + i: i for i in range(8)}
    assert set(decide("near_images", [plain[0], asked], text=False)) == {1}


def test_deep_pictures_are_not_all_white():
    rng, files = np.random.default_rng(0), []
    for _ in range(3):
        files.append(io.BytesIO())
        Image.fromarray(rng.integers(2000, 60000, (16, 16), np.uint16)).save(files[-1], "PNG")
    assert decide("near_images", [record("what?", images=[file.getvalue()]) for file in files]) == {}


@given(st.lists(st.integers(0, 63), max_size=12), st.integers(0, 2**64 - 1), st.integers(0, 10))
def test_near_hashes_are_all_that_differ_in_few_bits(flipped, value, distance):
    index = NearHashes(distance)
    index.add((value,), 5)
    index.add((value,), 3)
    other = value
    for bit in flipped:
        other ^= 1 << bit
    assert index.find((other,)) == (3 if (value ^ other).bit_count() <= distance else None)
    assert index.find((other, other)) is None
    assert index.find((value,), b"another group") is None


@given(TEXT, TEXT)
def test_clean_text_stays_as_it_is(question, answer):
    once = clean(record(question, answer))
    assert clean(once) is once
    assert not any(c in content for _, content in once.messages for c in "\r\0\x1b\ufeff")


def test_what_is_cleaned():
    assert clean(record("\ufeff a\x00 \r\n b e\u0301 ", "x")).messages == (("user", "a\n b \xe9"), ("assistant", "x"))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"minimum": 16}, None),
        ({"minimum": 17}, "too short"),
        ({"maximum": 15}, "too long"),
        ({"part": "thought", "maximum": 2}, None),
        ({"part": "thought", "minimum": 3}, "too short"),
        ({"part": "answer", "unit": "words", "minimum": 2, "maximum": 2}, None),
        ({"part": "answer", "unit": "words", "minimum": 3}, "too short"),
        ({"part": "prompt", "unit": "words", "maximum": 1}, "too long"),
    ],
)
def test_length(values, wanted):
    assert cause("length", record("q: 图", "<think>ab</think>four, 5", [b"x"]), **values) == wanted


def test_length_in_tokens(tmp_path):
    tokenizer = Tokenizer(models.BPE({digit: int(digit) for digit in "1234"}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = {"unit": "tokens", "tokenizer": tmp_path / "tokenizer.json", "part": "answer"}
    assert cause("length", record("?", "1234"), **values, minimum=4, maximum=4) is None
    assert cause("length", record("?", "1234"), **values, minimum=5) == "too short"
    with pytest.raises(UserError, match=r"^tokenizer gone\.json cannot be read"):
        cause("length", record("?", "1"), unit="tokens", tokenizer="gone.json", minimum=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("What can be seen in this picture of a garden?", None),
        ("Was ist auf diesem Bild eines Gartens zu sehen?", "another language"),
        ("这张花园的照片里能看到什么, 请详细描述一下你所看到的一切内容。", None),
        ("7 4 1 8 5 2 9 6 3 0 7 4 1 8 5 2", "unclear language"),
        ("Was ist das?", None),  # too short to tell
    ],
)
def test_language(question, wanted):
    assert cause("language", record(question), allowed=["en", "zh"]) == wanted


@pytest.mark.slow
def test_an_unknown_language_is_named():
    with pytest.raises(UserError, match=r"^language 'eng' is unknown; near are "):
        cause("language", record("x"), allowed=["eng"])


def test_repetition_is_found_and_plain_text_stays():
    plain = text(0, 100)
    assert cause("repetition", record(plain)) is None
    assert cause("repetition", record("\n".join([plain] * 3))) == "repeated lines"
    assert cause("repetition", record("\n\n".join([plain] * 3)), lines=1, line_characters=1) == "repeated paragraphs"
    assert cause("repetition", record(plain + " in of" * 25)) == "most frequent 2-gram"
    some = " ".join(plain.split()[:30])
    assert cause("repetition", record(f"{plain} {some}")) == "repeated 5-grams"
    assert cause("repetition", record("of the " * 20)) is None  # 40 words are too few to judge


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=40), st.integers(1, 6))
def test_shares_of_ngrams_are_those_of_the_definition(spelled, n):
    grams = [tuple(spelled[i : i + n]) for i in range(len(spelled) - n + 1)]
    again = {i + k for i, g in enumerate(grams) if g in grams[:i] for k in range(n)}
    total = sum(map(len, spelled))
    assert duplicate_ngram_share(spelled, n) == pytest.approx(sum(len(spelled[i]) for i in again) / total)
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    longest = max((len("".join(g)) for g, c in counts.items() if c == most), default=0)
    assert top_ngram_share(spelled, n) <= (most * longest / total if most > 1 else 0) + 1e-9
    assert (top_ngram_share(spelled, n) > 0) == (most > 1)


def test_words_of_languages_without_spaces_are_their_characters():
    assert words("It's 3.5: 很好吃 ok") == ["it", "s", "3", "5", "很", "好", "吃", "ok"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"min_count": 2}, "number of images"),
        ({"max_count": 0}, "number of images"),
        ({"min_side": 20}, None),
        ({"min_side": 21}, "small image"),
        ({"max_side": 60}, None),
        ({"max_side": 59}, "large image"),
        ({"max_aspect": 3}, None),
        ({"max_aspect": 2.9}, "extreme aspect ratio"),
    ],
)
def test_images(values, wanted):
    assert cause("images", record("?", images=[png(0, (20, 60))]), **values) == wanted
    assert cause("images", record("?", images=[png(0, (60, 20))]), **values) == wanted


def test_images_are_not_decoded():
    whole = png(0, (300, 300))
    assert cause("images", record("?", images=[whole[: len(whole) // 2]]), min_side=300) is None


@pytest.mark.parametrize(
    ("response", "values", "wanted"),
    [
        ("<think>2+2=4</think>4", {"thought": "required", "arithmetic": True, "matches": r"\d+"}, None),
        ("4", {"thought": "required"}, "no thought"),
        ("<think>a</think>4", {"thought": "forbidden"}, "a thought"),
        ("<think>never closed 4", {}, "broken thought"),
        ("closed</think>4", {}, "broken thought"),
        ("4<think>late</think>", {}, "broken thought"),
        ("<think> \n</think>4", {}, "empty thought"),
        ("<think>a</think> ", {}, "empty answer"),
        ("It is 4.", {"matches": r"\d+"}, "wrong form"),
        ("It is 4.", {"matches": r"\d+", "extract": "last_number"}, None),
        ("It is four.", {"extract": "last_number"}, "no final answer"),
        ("(B).", {"choices": ["A", "B"]}, None),
        ("C", {"choices": ["A", "B"]}, "not a choice"),
        (r"So \boxed{\frac{1}{2}}", {"extract": "boxed", "matches": r"\\frac\{1\}\{2\}"}, None),
        (r"So \boxed{1", {"extract": "boxed"}, "no final answer"),
        ("See {{answer}}", {}, "placeholder left"),
        ("See [insert name]", {}, "placeholder left"),
        ("<think>it is 3 + 4 = 8</think>8", {"arithmetic": True}, "wrong arithmetic"),
        ("<think>it is 3 + 4 = 8</think>8", {}, None),
        ("Thus 1,000.0", {"reference": "truth", "extract": "last_number"}, None),
        ("Thus 999", {"reference": "truth", "extract": "last_number"}, "wrong answer"),
        ("Thus 999", {"reference": "other", "extract": "last_number"}, "no column"),
    ],
)
def test_answers(response, values, wanted):
    assert cause("answers", record("?", response, truth="3 + 997 #### 1000"), **values) == wanted


def test_final_answers():
    assert final_answer(r"\boxed{1} then \boxed{a{b}c} and \boxed{open", "boxed") == "a{b}c"
    assert final_answer("a\n\n b \n", "last_line") == "b"
    assert final_answer("from 1,234.5 to -7.", "last_number") == "-7"
    assert [final_answer(said, "last_number") for said in ("pages 10-15", "答案是-15", "x=-15")] == ["15", "-15", "-15"]
    assert {normal_answer(a) for a in ("1,000", "$1000.0$", "1000.")} == {"1000"}
    assert {normal_answer(a) for a in (".5", "0.5", "0.50")} == {"0.5"}
    assert final_answer("It is .5", "last_number") == ".5"
    assert len({normal_answer(a) for a in ("1267650600228229401496703205376", "1267650600228229401496703205399")}) == 2
    assert {normal_answer(a) for a in ("(B)", "b.", r"\text{B}")} == {"b"}
    assert normal_answer("0.50") == "0.5"


@given(
    st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 99)), min_size=1, max_size=4),
    st.integers(0, 999),
    st.integers(-5, 5),
)
def test_equations_hold_where_their_sides_are_equal(terms, first, off):
    left = f"{first}" + "".join(f" {sign} {n}" for sign, n in terms)
    value = eval("".join(f"Fraction({t})" if t.isdigit() else t for t in left.split()), {"Fraction": Fraction})
    if value.denominator != 1:
        assert wrong_equation(f"so {left} = {float(value):.4f}") is None
        assert wrong_equation(f"so {left} = {float(value) + 0.01:.4f}")
        return
    said = f"({left} = {value + off}, and on)"
    # A division may have been rounded, to the next whole number.
    assert (wrong_equation(said) is None) == (off == 0)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("12,12+8:2+8=10,20", False),
        ("12,12+8:2+8=11,20", True),
        ("- 3+4=8", True),
        ("1) 3+4=8", True),
        ("2+3=5=4+1", False),
        ("2+3=5=4+2", True),
        ("1,000+1=1,001", False),
        ("5+5=10,200 of them", False),
        ("10/3=3.33 and 2/3=0.66", False),
        ("10/3=3.43", True),
        ("3 \xd7 4 \u2212 2 = 11", True),
        ("1/0=7", True),
        ("2x+3=9", False),
        ("2^3+1=9", False),
        ("4*(2+3)=20", False),
        ("1 1/2 + 1/2 = 2", False),
        ("3+4=7k", False),
        ("1/4=25%", False),
        ("x=5, y=6", False),
        ("11 + 2 = 1 (mod 12)", False),
    ],
)
def test_only_clear_equations_are_judged(said, wrong):
    assert (wrong_equation(said) is not None) == wrong


@pytest.mark.parametrize("min_votes", [1, 2])
@pytest.mark.parametrize("min_share", [0.0, 0.6])
def test_the_majority_stays(min_share, min_votes):
    for answers in itertools.chain(*(itertools.combinations_with_replacement(["1", "2.0", "2", "none"], n) for n in range(6))):
        records = [record("other", "it is 2"), *(record("this", f"it is {answer}") for answer in answers), record("other", "it is 2")]
        found = decide("majority", records, extract="last_number", min_share=min_share, min_votes=min_votes)
        ones, twos, nones = answers.count("1"), answers.count("2") + answers.count("2.0"), answers.count("none")
        most = max(ones, twos)
        decided = ones != twos and most >= min_votes and most >= min_share * (ones + twos + nones)
        winners = (["1"] if ones > twos else ["2", "2.0"]) if decided else []
        assert [i - 1 for i in found] == [i for i, answer in enumerate(answers) if answer not in winners]
        if decided:
            assert {gone.cause for gone in found.values()} == {
                "no final answer" if answers[i - 1] == "none" else "outvoted" for i in found
            }


def test_questions_are_known_by_their_images_or_by_a_column():
    pictured = [record("?", answer, [png(i)], group=str(i)) for i, answer in [(0, "a"), (0, "a"), (1, "b"), (1, "b"), (1, "a")]]
    assert {i: gone.cause for i, gone in decide("majority", pictured).items()} == {4: "outvoted"}
    named = [record(f"variant {i}", "a", group="one") for i in range(2)]
    assert decide("majority", named, group="group") == {}
    assert {gone.cause for gone in decide("majority", named).values()} == {"too few votes"}


def contaminated(records, sets, **values):
    settings = Decontaminate(sources={"exam": "exam"}, **values)
    index = evaluation_index({"exam": sets}, settings, LIMITS)
    apply = decontaminate(settings, LIMITS, index)
    return [i for i, of in enumerate(records) if reason(apply, of) == "in an evaluation set"]


def test_what_evaluation_sets_hold_is_found():
    exam = text(0, 40).split()
    sets = [record(" ".join(exam)), record("Short one?", "7", [png(3)])]
    records = [
        record("before " + " ".join(exam[10:23]).upper() + " after"),  # 13 words of it
        record("before " + " ".join(exam[10:22]) + " after"),  # 12 words
        record("short ONE", "7", [png(3, form="JPEG", scale=2)]),  # text and image
        record("what is in this picture?", "", [png(3, form="JPEG", scale=2)]),
        record("short one", "7", [png(4)]),
        record(text(1)),
    ]
    assert contaminated(records, sets) == [0, 2, 4]
    assert contaminated(records, sets, min_share=0.9) == [2, 4]
    assert contaminated(records, sets, ngram=0, distance=4) == [2, 3]
    assert contaminated(records, sets, distance=4) == [0, 2, 3, 4]
    assert contaminated(records, sets, distance=4, match="all") == [0, 2]


def test_evaluation_records_that_cannot_be_read_are_counted():
    sets = [record("fine question", "1"), record("broken", "1", [b"no image"])]
    settings = Decontaminate(sources={"exam": "exam"}, distance=0)
    index = evaluation_index({"exam": sets}, settings, LIMITS)
    assert (index.num_records, dict(index.unreadable)) == (2, {"not an image": 1})


def test_files_of_questions_are_evaluation_sets_and_one_of_nothing_is_refused(tmp_path):
    question = text(0, 20)
    row = {"question": question, "answer": "so it is\n#### 7"}
    (tmp_path / "gsm.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "mmlu.csv").write_text(f"{text(1, 20)},1,2,3,4,B\n")
    settings = Decontaminate(sources={name: str(tmp_path / name) for name in ("gsm.jsonl", "mmlu.csv")}, part="prompt")
    apply = decontaminate(settings, LIMITS, evaluation_index(open_sets(settings), settings, LIMITS))
    found = [reason(apply, record(asked)) for asked in (question, text(1, 20), text(2))]
    assert found == ["in an evaluation set", "in an evaluation set", None]
    (tmp_path / "gsm.jsonl").write_text('{"prompt": "?"}\n' * 2)
    with pytest.raises(UserError, match=r"set 'gsm.jsonl' .*none of its 2 records can be compared with: 2 times 'no known form'"):
        evaluation_index(open_sets(settings), settings, LIMITS)
    pictures = Decontaminate(sources={"exam": "exam"}, ngram=0, distance=4)
    with pytest.raises(UserError, match="none of its 1 records can be compared with: they lack what is compared"):
        evaluation_index({"exam": [record("no image")]}, pictures, LIMITS)
