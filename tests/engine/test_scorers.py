"""Scorers: what is taken for the answer, hard cases one by one, and properties that hold for any text."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.evaluation.scorers import SCORERS, Truth, boxed, chosen_letter, stated_number

PURE = sorted(set(SCORERS) - {"math"})
LETTER_FORMS = ["{}", "({})", "{}.", "The answer is {}", "answer: ({})", "**{}**", "{}. {text}", r"\boxed{{{}}}", "{text}"]
NUMBER_FORMS = [
    "{}", "{:,}", "{:,} apples", "It is 3 + 4, so {}", "#### {:,}", r"\boxed{{{}}}", "The answer is {:,}.", "{}.0",
]  # fmt: skip
CITIES = {"A": "Paris", "B": "York", "C": "New York", "D": "a dog in a park"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("b", "B"), (" b) ", "B"), ("[C]", "C"), ("**B**", "B"), ("$B$", "B"),
        (r"\text{B}", "B"),
        ("B. York", "B"), ("(B) York", "B"), ("B: York, because it is old", "B"), ("B\nIt is old.", "B"), ("B - York", "B"),
        ("The answer is B", "B"), ("The answer is (b).", "B"), ("the correct option is: **C**", "C"), ("Answer: D", "D"),
        ("Final answer = A", "A"), (r"So \boxed{C}", "C"), (r"The answer is $\boxed{\text{(A)}}$.", "A"),
        ("The answer is A. No, wait: the answer is B.", "B"), ("The answer to the question is option D, as said", "D"),
        ("Not A, so it must be (C).", "C"), ("I think it's B", "B"), ("Option A looks right", "A"), ("It can be B or C.", None),
        ("Paris", "A"), ("It is Paris.", "A"), ("new york", "C"), ("I would go to New York!", "C"), ("The answer is york", "B"),
        ("A dog in a park", "D"), ("The answer is a dog in a park.", "D"), ("A dog sits there", None), ("I do not know", None),
        ("The answer is not B", None), ("It isn't (B)", None), ("Paris or York", None), ("E", None), ("The answer is E", None),
        ("", None), ("   ", None), ("B. London", "B"), ("A", "A"), ("It is A.", "A"), ("A or B?", None),
        ("Because of D, the answer is A", "A"),
        ("The answer is A or B", None), ("Answer: A or B", None), ("The answer is (A) or (B)", None), ("The answer is A and C.", None),
        ("The answer is A/B", None), ("The answer is B, C", None), ("(A) or (B)", None), ("The answer is B, and it is old", "B"),
        ("The answer is C, I think", "C"), ("Neither A nor B", None), ("Neither A, (B) nor C, so D", "D"), ("A is correct.", "A"),
        ("A seems right", "A"), ("A or B; I say: the answer is B", "B"),
        ("答案是B。", "B"), ("正确答案为选项C", "C"), ("选B", "B"), ("The answer is 'B'.", "B"),
    ],
)  # fmt: skip
def test_the_letter_of_an_answer(answer, letter):
    assert chosen_letter(answer, CITIES) == letter


@pytest.mark.parametrize("answer", ["B", "(B)", "Answer: B", "The answer is (B).", r"\boxed{B}", "答案是B"])
def test_a_letter_is_that_of_an_option_and_not_the_text_of_another(answer):
    assert chosen_letter(answer, {"A": "C", "B": "A", "C": "B", "D": "D"}) == "B"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("18", 18), ("$18.", 18), ("18 dollars", 18), ("She has 3 + 4 = 7 apples.", 7), ("1,234,567", 1234567), ("$1,080.50", 1080.5),
        ("-5", -5), ("\N{MINUS SIGN}5", -5), ("x = -5", -5), ("10-5", 5), ("10 - 5 = 5", 5), ("1/2", 0.5),
        ("2 1/2 cups", 2.5), ("-1/4", -0.25),
        (r"\frac{3}{4}", 0.75), (r"$-\frac{1}{2}$", -0.5), (r"\frac12", 0.5), ("50%", 50), ("1.5e3", 1500), ("2E-2", 0.02),
        (".5", 0.5),
        ("3 km/h", 3), ("#### 42", 42), ("5 apples\n#### 1,000\n", 1000), (r"\boxed{12} is what 3 and 4 give", 12),
        (r"\boxed{1{,}000}", 1000),
        ("The answer is 18. That is 2 more than 16.", 18), ("Answer: 7 (not 8)", 7), ("To answer this, 3 + 4 = 7", 7),
        ("The final answer for all of them is $18.50 a day", 18.5), ("1, 2, 3", 3), ("v2 of H2O", None), ("none", None), ("", None),
        ("So:\n- 42", 42), ("**Total** - 42 apples", 42), ("- 42", -42), ("x = - 42", -42), ("10 - 3 = 7", 7), ("10 - 3", 3),
        ("The answer is 3 + 4 = 7", 7), ("The answer is 10 - 3 = 7.", 7), ("answer: x = 3", 3),
        ("The answer is 5 \N{MULTIPLICATION SIGN} 3 = 15 km", 15),
        ("The answer is 7, and 7 - 3 = 4", 7),
        ("1/0", 1), ("in 2020 it was 7", 7), ("9" * 5000, None), ("3.", 3), ("(4)", 4), ("**4**", 4), ("100th", 100), (r"\$5", 5),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(answer, number):
    found = stated_number(answer)
    assert (None if found is None else float(found)) == number


@pytest.mark.parametrize(
    ("scorer", "answer", "truths", "score", "parsed"),
    [
        ("exact", " 7 ", ["7"], 1, True), ("exact", "7.", ["7"], 0, True), ("exact", "", [""], 0, False),
        ("text", "The Eiffel-Tower!", ["eiffel tower"], 1, True), ("text", "a", ["A"], 1, True),
        ("text", "1,000", ["1,000."], 1, True),
        ("text", "Noël", ["noël"], 1, True), ("text", "no", ["yes", "No"], 1, True), ("text", "-5", ["5"], 0, True),
        ("text", "?!", ["x"], 0, False),
        ("contains", "It says STOP here", ["stop"], 1, True), ("contains", "unstoppable", ["stop"], 0, True),
        ("contains", "stop", [""], 0, True),
        ("number", "7 km", ["7.0"], 1, True), ("number", "0.3333", ["1/3"], 0, True), ("number", "seven", ["7"], 0, False),
        ("number", "1,800", ["1800"], 1, True), ("number", "答案是-15。", ["-15"], 1, True),
        ("relaxed", "102 people", ["100"], 1, True), ("relaxed", "106", ["100"], 0, True),
        ("relaxed", "-100", ["100"], 0, True), ("relaxed", "Red", ["red"], 1, True), ("relaxed", "2 dogs", ["2 cats"], 0, True),
        ("anls", "Hello World", ["hello  world"], 1, True), ("anls", "hello wurld", ["hello world"], 10 / 11, True),
        ("anls", "xyz", ["hello"], 0, True), ("anls", "", ["hello"], 0, False),
    ],
)  # fmt: skip
def test_hard_cases(scorer, answer, truths, score, parsed):
    outcome = SCORERS[scorer](answer, Truth(tuple(truths)))
    assert outcome.score == pytest.approx(score)
    assert (outcome.found is not None) == parsed


def test_numbers_may_be_as_far_off_as_the_task_says():
    assert SCORERS["number"]("0.333", Truth(("1/3",), tolerance=0.01)).score == 1
    assert SCORERS["relaxed"]("102", Truth(("100",), tolerance=0.01)).score == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "truth", "score", "parsed"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac12", 1, True), ("0.5", r"\frac{1}{2}", 1, True), (r"x^2 + 1", "1+x^2", 1, True),
        ("x^2 + 1", "1", 0, True), (r"The answer is $2\sqrt{3}$.", r"\sqrt{12}", 1, True), (r"\boxed{(1,2)}", "(1, 2)", 1, True),
        (r"\boxed{(2,1)}", "(1,2)", 0, True), (r"$\{2,1\}$", r"\{1,2\}", 1, True), (r"\text{Monday}", r"\text{Monday}", 1, True),
        ("I do not know", "3", 0, False), ("", "3", 0, False), (r"\boxed{", "3", 0, False), ("$x=5$", "5", 1, True),
        ("12", "12", 1, True),
    ],
)  # fmt: skip
def test_formulas(answer, truth, score, parsed):
    outcome = SCORERS["math"](answer, Truth((truth,)))
    assert outcome.score == score
    assert (outcome.found is not None) == parsed


def test_boxes():
    assert boxed(r"\boxed{1} and \boxed{\frac{2}{3}}.") == r"\frac{2}{3}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


@given(
    st.text(max_size=60),
    st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from(sorted(set(SCORERS) - {"math"})),
)
def test_any_text_has_a_score_and_what_is_not_found_has_none(answer, options, name):
    truth = Truth(("A" if name == "choice" else options[0],), dict(zip(string.ascii_uppercase, options, strict=False)))
    outcome = SCORERS[name](answer, truth)
    assert 0 <= outcome.score <= 1
    assert outcome.found is not None or outcome.score == 0
    assert SCORERS[name](answer, truth) == outcome


@given(
    st.sampled_from("ABCD"),
    st.sampled_from(["{}", "({})", "{}.", "The answer is {}", "answer: ({})", "**{}**", "{}. {text}", r"\boxed{{{}}}", "{text}"]),
)
def test_a_letter_is_found_however_it_is_said(letter, form):
    assert chosen_letter(form.format(letter, text=CITIES[letter]), CITIES) == letter


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{:,}", "{:,} apples", "It is 3 + 4, so {}", "#### {:,}", r"\boxed{{{}}}", "The answer is {:,}.", "{}.0"]),
)
def test_a_number_is_found_however_it_is_said(number, form):
    assert stated_number(form.format(number)) == number
    assert SCORERS["number"](form.format(number), Truth((str(number),))).score == 1
    assert SCORERS["number"](form.format(number), Truth((str(number + 1),))).score == 0


@given(st.text(alphabet="abc ", max_size=12), st.text(alphabet="abc ", min_size=1, max_size=12))
def test_similarity_is_symmetrical_and_that_of_the_definition(one, other):
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    a, b = " ".join(one.split())[:5], " ".join(other.split())[:5]
    if not a or not b:
        return
    similarity = 1 - distance(a, b) / max(len(a), len(b))
    wanted = similarity if similarity >= 0.5 else 0
    assert SCORERS["anls"](a, Truth((b,))).score == pytest.approx(wanted)
    assert SCORERS["anls"](b, Truth((a,))).score == pytest.approx(wanted)
