"""Tasks from the files that benchmarks come in: what is asked, what is right, and what is said of bad files."""

import base64
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from smalt.engine.config import load_config
from smalt.engine.data.chat import PLACEHOLDER, ChatEncoder
from smalt.engine.data.images import ImageLimits
from smalt.engine.data.records import Record
from smalt.engine.errors import BadRecord, UserError
from smalt.engine.evaluation import conditions_of, evaluate, open_tasks
from smalt.engine.evaluation.formats import FORMATS, Source
from smalt.engine.sections import EvaluationConfig, TaskConfig
from smalt.engine.trainer import open_data
from smalt.model import build_model
from smalt.model.tiling import ImageShape
from smalt.parallel import alone

ONE, TWO = b"\x89PNG one" * 9, b"\x89PNG two" * 9
LETTER = "\nAnswer with the letter of the right option."


def as_text(data):
    return base64.b64encode(data).decode()


def task(path, **config):
    return open_tasks({"t": TaskConfig(path=str(path), **config)})["t"]


def write_table(path, header, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([*([header] if header else []), *rows])
    return path


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prompt(question):
    return question.record.messages[-1][1]


def images(question):
    return [image.data or image.path for image in question.record.images]


def test_vlmevalkit(tmp_path):
    header = ["index", "image", "question", "hint", "A", "B", "C", "answer", "category"]
    path = write_table(
        tmp_path / "bench.tsv", header,
        ["1", as_text(ONE), "What is it?", "Look\nclosely", "a cat", 'a "dog"', "", "B", "animals"],
        ["2", "1", "And here?", "nan", "red", "blue", "", "A", "colours"],
        ["3", str([as_text(ONE), as_text(TWO)]), "Is <image 2> like <image 1>?", "", "", "", "", "yes", ""],
        ["4", str([as_text(ONE), as_text(TWO)]), "Which?", "", "<image 2>", "none", "", "A", ""],
        ["5", "", "2 + 2?", "", "", "", "", "['4', 'four']", ""],
    )  # fmt: skip
    asked = task(path)
    first, second, third, fourth, fifth = (asked[i] for i in range(5))
    assert prompt(first) == f'{PLACEHOLDER}Look\nclosely\nWhat is it?\nA. a cat\nB. a "dog"{LETTER}'
    assert (first.truth.answers, first.truth.options, first.scorer) == (("B",), {"A": "a cat", "B": 'a "dog"'}, "choice")
    assert first.groups == ("category=animals",)
    assert images(first) == images(second) == [ONE]
    assert prompt(third) == f"Is {PLACEHOLDER} like {PLACEHOLDER}?"
    assert images(third) == [TWO, ONE]
    assert (third.truth.answers, third.scorer) == (("yes",), "text")
    assert prompt(fourth) == f"{PLACEHOLDER}Which?\nA. {PLACEHOLDER}\nB. none{LETTER}"
    assert images(fourth) == [ONE, TWO]
    assert (fifth.truth.answers, images(fifth)) == (("4", "four"), [])


def test_paths_of_images_are_relative_to_the_table(tmp_path):
    rows = [["1", "a.png", "What?", "cat"], ["2", "['a.png', 'b.png']", "What?", "cat"]]
    asked = task(write_table(tmp_path / "bench.tsv", ["index", "image_path", "question", "answer"], *rows))
    assert images(asked[0]) == [str(tmp_path / "a.png")]
    assert images(asked[1]) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_gsm8k(tmp_path):
    row = {"question": "How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,007"}
    for path in (write_lines(tmp_path / "g.jsonl", row), tmp_path / "g.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        question = task(path)[0]
        assert (prompt(question), question.truth.answers, question.scorer) == ("How many?", ("1,007",), "number")
        assert question.score("It is 1007.").score == 1


def test_math(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
        {"problem": "Two?", "answer": "2", "solution": "no box", "subject": "Counting"},
        {"problem": "Three?", "solution": r"no box"},
    ]
    asked = task(write_lines(tmp_path / "m.jsonl", *rows))
    first, second = asked[0], asked[1]
    assert prompt(first) == "Half?\nPut the final answer into \\boxed{}."
    assert (first.truth.answers, first.scorer, first.groups) == ((r"\frac{1}{2}",), "math", ("type=Algebra", "level=Level 1"))
    assert (second.truth.answers, second.groups) == (("2",), ("subject=Counting",))
    with pytest.raises(BadRecord, match="no answer"):
        asked[2]


@pytest.mark.parametrize("header", [None, ["question", "A", "B", "C", "D", "answer"]])
def test_mmlu(header, tmp_path):
    rows = [["Which, then?", "0", "1", "2", "3", "C"], ["Again?", "a", "b", "", "b", "A"]]
    asked = task(write_table(tmp_path / "astronomy_test.csv", header, *rows))
    assert len(asked) == 2
    assert prompt(asked[0]) == f"Which, then?\nA. 0\nB. 1\nC. 2\nD. 3{LETTER}"
    assert asked[0].truth.answers == ("C",)
    assert list(asked[1].truth.options) == ["A", "B", "D"]


def test_mmlu_as_a_folder_of_subjects_and_with_a_list_of_choices(tmp_path):
    for subject in ("law", "art"):
        write_table(tmp_path / f"{subject}_test.csv", None, [f"{subject}?", "1", "2", "3", "4", "D"])
    asked = task(tmp_path)
    assert [(prompt(asked[i]).splitlines()[0], asked[i].groups) for i in (0, 1)] == [("art?", ("file=art",)), ("law?", ("file=law",))]
    row = {"question": "Which?", "choices": ["3", "1", "2"], "answer": 1, "subject": "law"}
    listed = task(write_lines(tmp_path / "c.jsonl", row, {**row, "answer": "2"}, {**row, "answer": 3}))
    assert [listed[i].truth.answers for i in (0, 1)] == [("B",), ("C",)]
    with pytest.raises(BadRecord, match="none of the options A, B, C"):
        listed[2]


def test_a_record_without_a_question_is_a_bad_one(tmp_path):
    said, asked = {"role": "assistant", "content": "7"}, {"role": "user", "content": "3+4"}
    pq.write_table(pa.table({"messages": [[said], [asked], [asked, said]]}), tmp_path / "r.parquet")
    records = task(tmp_path / "r.parquet")
    for index, cause in enumerate(["no question", "no answer"]):
        with pytest.raises(BadRecord, match=cause):
            records[index]
    assert records[2].record.messages == (("user", "3+4"),)


def test_records_template_and_scorer(tmp_path, digits):
    asked = task(digits / "held_out" / "sum.parquet", template="Q: {question} {x}\nA:", scorer="number", tolerance=0.5)
    plain = task(digits / "held_out" / "sum.parquet")
    assert prompt(asked[0]) == f"Q: {prompt(plain[0])} {{x}}\nA:"
    assert (asked[0].scorer, plain[0].scorer, asked[0].truth.tolerance) == ("number", "exact", 0.5)
    assert plain[0].record.messages[-1][0] == "user"
    with pytest.raises(BadRecord, match="no options"):
        task(digits / "held_out" / "sum.parquet", scorer="choice")[0]


@pytest.mark.parametrize(
    ("scorer", "unreadable", "readable"),
    [("number", "seven", "7"), ("text", "?!", "x"), ("relaxed", "?!", "5"), ("exact", "", "?")],
)
def test_a_truth_that_its_scorer_cannot_read_is_no_question(scorer, unreadable, readable, tmp_path):
    said = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}] for answer in (unreadable, readable)]
    pq.write_table(pa.table({"messages": said}), tmp_path / "q.parquet")
    asked = task(tmp_path / "q.parquet", scorer=scorer)
    with pytest.raises(BadRecord, match=f"no answer: the scorer {scorer} finds nothing in"):
        asked[0]
    assert asked[1].truth.answers == (readable,)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "index\tname\n1\tx\n", "t': .*a.tsv has the columns"),
        ("a.tsv", "", "holds no questions"),
        ("a.jsonl", '{"prompt": 1}\n', "has the columns prompt; known are question and answer"),
        ("a.csv", b"question,answer\n\xff\xfe,1\n", "is damaged: 'utf-8' codec"),
        ("a.xlsx", "x", "a.xlsx"),
        ("a.parquet", "no parquet", "a.parquet is damaged"),
    ],
)
def test_files_of_no_known_form(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=said):
        task(tmp_path / name)


def test_a_file_that_is_not_there_and_a_folder_of_many_kinds(tmp_path):
    with pytest.raises(UserError, match=r"'t': .*gone.tsv does not exist"):
        task(tmp_path / "gone.tsv")
    write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    write_table(tmp_path / "b.csv", ["question", "answer"], ["q", "a"])
    with pytest.raises(UserError, match="files of several kinds"):
        task(tmp_path)


def test_a_bad_row_is_one_question_less_and_says_where_it_is(tmp_path):
    good = {"question": "q", "answer": "#### 1"}
    asked = task(write_lines(tmp_path / "g.jsonl", good, "{broken", "[1]", {"question": "q"}, {**good, "answer": "none"}, good))
    causes = {1: r"malformed line: .*g.jsonl, line 2", 2: "malformed line: .*no object", 3: "no answer", 4: "no answer: no ####"}
    for index, cause in causes.items():
        with pytest.raises(BadRecord, match=cause):
            asked[index]
    assert asked[5].truth.answers == ("1",)
    header = ["index", "image", "question", "answer"]
    rows = [["1", "7", "q", "a"], ["2", "!" * 80, "q", "a"], ["3", as_text(ONE), "<image 2>", "a"], ["4", "", "q"], ["5", "", "", "a"]]
    table = task(write_table(tmp_path / "t.tsv", header, *rows))
    wanted = ["missing image", "corrupt image", "placeholder mismatch", "malformed line: .*line 5: 3 fields", "no question"]
    for index, cause in enumerate(wanted):
        with pytest.raises(BadRecord, match=cause):
            table[index]


@pytest.fixture(scope="module")
def encoder(digits):
    return ChatEncoder.load(digits / "tokenizer.json", ImageShape(6, 4), 320, ImageLimits())


@pytest.mark.parametrize(
    ("row", "answers", "options"),
    [
        ({"choices": {"text": ["4", "1"], "label": ["1", "2"]}, "answerKey": "1"}, ("A",), {"A": "4", "B": "1"}),
        ({"choices": {"text": ["x", "y"], "label": ["B", "A"]}, "answer": None, "answerKey": "A"}, ("B",), {"A": "x", "B": "y"}),
        ({"choices": ["nan", "inf"], "answer": "nan"}, ("A",), {"A": "nan", "B": "inf"}),
        ({"answers": {"text": ["Paris", "the city"], "answer_start": [3, 5]}}, ("Paris", "the city"), {}),
        ({"answer": None, "answers": ["7"], "image": None, "images": [{"bytes": ONE}]}, ("7",), {}),
        ({"choices": "['x', 'y']", "answer": "B"}, ("B",), {"A": "x", "B": "y"}),  # a cell of a table
        ({"options": "['x', 'y']", "answer": "y"}, ("B",), {"A": "x", "B": "y"}),
        ({"choices": "[]", "answer": "['x', 'y']"}, ("x", "y"), {}),
        ({"choices": "nan", "answer": "[0, 2, 5]"}, ("[0, 2, 5]",), {}),
        ({"answers": {"spans": ["Paris"]}}, None, {}),
        ({"answers": [{"text": "Paris"}]}, None, {}),
    ],
)
def test_what_rows_of_other_makers_say(row, answers, options, tmp_path):
    ask = lambda: FORMATS["table"]({"question": "q", **row}, Source(tmp_path))  # noqa: E731
    if answers is None:
        with pytest.raises(BadRecord, match="no answer"):
            ask()
        return
    assert (ask().answers, ask().options) == (answers, options)
    assert len(ask().images) == ("images" in row)


def test_options_that_are_no_list_are_no_question_without_options(tmp_path):
    with pytest.raises(BadRecord, match=r"malformed options.*'x, y' is no list"):
        FORMATS["table"]({"question": "q", "answer": "B", "choices": "x, y"}, Source(tmp_path))


def test_the_number_0_is_an_answer(tmp_path):
    assert FORMATS["math"]({"problem": "p", "answer": 0, "solution": "none"}, Source(tmp_path)).answers == ("0",)


LISTS = st.lists(st.text(max_size=5), max_size=3)
CELLS = st.none() | st.text(st.characters(), max_size=20) | st.integers() | st.floats() | LISTS | st.binary(max_size=9)
COLUMNS = ["question", "answer", "problem", "solution", "hint", "A", "B", "choices", "image", "image_path", "images", "level"]


@given(st.sampled_from(sorted(FORMATS)), st.dictionaries(st.sampled_from(COLUMNS), CELLS))
@example("gsm8k", {"question": "\ud83d", "answer": "#### 1"})
def test_any_row_is_a_question_or_a_bad_record(encoder, tmp_path_factory, form, row):
    try:
        asked = FORMATS[form](row, Source(tmp_path_factory.getbasetemp()))
        encoder.prompt(Record((("user", asked.text),), asked.images), "answer")
    except BadRecord:
        return
    assert asked.answers
    assert all(asked.answers)
    assert not asked.options or set(asked.answers) <= set(asked.options)
    assert len(asked.images) <= asked.text.count(PLACEHOLDER)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"samples": 4}, "samples = 4 at temperature 0 are all alike"),
        ({"modes": ["answer"], "budgets": [4]}, "budgets are those of think mode"),
        ({"template": "no place"}, "template has no {question}"),
        ({"modes": []}, "modes"),
        ({"scorer": "llm"}, "scorer"),
    ],
)
def test_a_task_that_makes_no_sense(values, said):
    with pytest.raises(ValidationError, match=said):
        TaskConfig(path="x", **values)


def test_sources_are_short_for_tasks():
    config = EvaluationConfig(sources={"a": "x", "b": "y"}, tasks={"c": {"path": "z"}}, budget_tasks=["b"], budgets=[1, 2])
    tasks = config.all_tasks()
    assert {n: (str(t.path), t.budgets, t.shuffle_images) for n, t in tasks.items()} == {
        "a": ("x", [], False), "b": ("y", [1, 2], True), "c": ("z", [], False),
    }  # fmt: skip
    with pytest.raises(ValidationError, match="sources and tasks both name a"):
        EvaluationConfig(sources={"a": "x"}, tasks={"a": {"path": "z"}})


def test_tasks_of_every_format_are_evaluated_together(tiny_config, digits, tmp_path):
    picture = pq.read_table(digits / "held_out" / "read.parquet")["images"][0].as_py()[0]["bytes"]
    row = ["1", as_text(picture), "Which digit?", "1", "2", "A"]
    paths = {
        "vlm": write_table(tmp_path / "v.tsv", ["index", "image", "question", "A", "B", "answer"], row),
        "gsm": write_lines(tmp_path / "g.jsonl", {"question": "1+1?", "answer": "#### 2"}, "{broken"),
        "mmlu": write_table(tmp_path / "m.csv", None, ["1+1?", "2", "3", "4", "5", "A"]),
    }
    config = load_config(tiny_config({"evaluation.sources": {}, "evaluation.budget_tasks": [], "evaluation.tasks": {
        name: {"path": path, "modes": ["answer"], "max_tokens": 3} for name, path in paths.items()
    }}))  # fmt: skip
    data, model = open_data(config), build_model(config.model, 0).eval()

    world = alone(next(model.parameters()).device)
    found = evaluate(model, data.encoder, data.questions, conditions_of(data.questions), config.evaluation, 9, world)
    assert [(s.task, s.questions) for s in found.scores] == [("vlm", 1), ("gsm", 1), ("mmlu", 1)]
    assert [a.truth for a in found.answers] == [("A",), ("2",), ("A",)]
    assert [(s.source, s.record, s.cause) for s in found.skipped] == [("gsm", 1, "malformed line")]
    assert all(a.score == 0 or a.found is not None for a in found.answers)
