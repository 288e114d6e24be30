"""A whole curation: nothing is lost, steps are as if run one after the other, any number of processes has the same result."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.data.curation.config import KINDS, CurationConfig, load_curation
from smalt.engine.data.curation.curate import curate
from smalt.engine.data.curation.filters import _identifier
from smalt.engine.data.curation.job import Job
from smalt.engine.data.curation.workers import workers
from smalt.engine.data.sources import open_sources
from smalt.engine.errors import UserError

from .conftest import ROOT
from .curation import kept, png, record, removed, run_steps, write_source

PNGS = [png(seed, (16, 16)) for seed in range(3)]
LONG = " ".join(f"word{i}" for i in range(30))
ROWS = st.lists(
    st.builds(
        lambda question, answer, images: record(question, answer, [PNGS[i] for i in images]),
        st.sampled_from(["Which?", " which?\r", "Another question", LONG, LONG + " more"]),
        st.sampled_from(["1", "1.0", "2", "<think>1+1=3</think>2", "<think></think>2", "", "{{x}}"]),
        st.sampled_from([(), (0,), (1,), (0, 2)]),
    ),
    min_size=1,
    max_size=25,
)
STEPS = {
    "clean": {},
    "exact_duplicates": {},
    "answers": {"arithmetic": True},
    "near_text": {},
    "majority": {"min_share": 0.4, "min_votes": 1},
    "length": {"minimum": 6},
    "near_images": {"text": False},
}


def messages(folder, *names):
    return [row["messages"] for name in names for row in pq.read_table(folder / f"{name}.parquet").to_pylist()]


@pytest.mark.slow
@given(rows=ROWS, order=st.permutations(list(STEPS)))
def test_nothing_is_lost_and_steps_are_as_if_run_one_after_the_other(tmp_path_factory, rows, order):
    folder = tmp_path_factory.mktemp("curation")
    sources = (
        {"a": write_source(folder / "a.parquet", rows[:9]), "b": write_source(folder / "b.parquet", rows[9:])}
        if len(rows) > 9
        else None
    )
    sources = sources or {"a": write_source(folder / "a.parquet", rows)}
    report = run_steps(folder / "all", sources, {name: STEPS[name] for name in order})
    stay, gone = kept(folder / "all", *sources), removed(folder / "all")
    assert sorted([*stay, *gone]) == sorted(
        (name, i) for name in sources for i in range(len(open_sources({name: sources[name]})[name]))
    )
    assert [step.read - step.removed for step in report.steps] == [*(step.read for step in report.steps[1:]), len(stay)]
    assert sum(step.removed for step in report.steps) == len(gone) == report.read - report.kept

    left = sources
    for name in order:
        left = {n: p for n, p in left.items() if pq.read_metadata(p).num_rows}
        run_steps(folder / name, left, {name: STEPS[name]}) if left else None
        left = {n: folder / name / f"{n}.parquet" for n in left}
    one_by_one = [row["messages"] for path in left.values() for row in pq.read_table(path).to_pylist()]
    assert messages(folder / "all", *sources) == one_by_one


def test_bad_records_and_images_are_counted_by_cause(tmp_path):
    ask = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "this"}]
    huge = png(1, (400, 400))
    rows = [
        record("fine?", "yes", [PNGS[0]]),
        {"messages": [], "images": []},
        {"messages": [{"role": "robot", "content": "x"}], "images": []},
        {"messages": ask, "images": []},
        {"messages": ask, "images": [{"bytes": None, "path": "gone.png"}]},
        {"messages": ask, "images": [{"bytes": b"no image", "path": None}]},
        {"messages": ask, "images": [{"bytes": huge, "path": None}]},
        {"messages": ask, "images": [{"bytes": PNGS[1][:100], "path": None}]},
        {"messages": ask, "images": [{"bytes": None, "path": None}]},
    ]
    source = write_source(tmp_path / "bad.parquet", rows)
    report = run_steps(tmp_path / "out", {"bad": source}, {"images": {}, "near_images": {}}, max_image_pixels=300 * 300)
    causes = {step.name: step.causes for step in report.steps if step.causes}
    assert causes == {
        "read": {"no messages": 1, "malformed message": 1, "placeholder mismatch": 1, "malformed image": 1},
        "images": {"missing image": 1, "not an image": 1, "huge image": 1},
        "near_images": {"corrupt image": 1},
    }
    assert kept(tmp_path / "out", "bad") == [("bad", 0)]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["records"] == {"read": 9, "kept": 1, "removed": 8}
    assert written["steps"][0]["examples"]["no messages"] == [
        {"source": "bad", "record": 1, "detail": "the list of messages is empty or missing"}
    ]


def test_an_image_that_only_the_output_needs_costs_its_record_too(tmp_path):
    ask = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "this"}]
    source = write_source(tmp_path / "bad.parquet", [{"messages": ask, "images": [{"bytes": None, "path": "gone.png"}]}])
    report = run_steps(tmp_path / "out", {"bad": source}, {})
    assert (report.steps[-1].name, report.steps[-1].causes) == ("write", {"missing image": 1})
    assert removed(tmp_path / "out") == {("bad", 0): ("write", "missing image")}


def test_sources_of_every_form_become_one_and_texts_stay_texts(tmp_path):
    lines = [
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}], "licence": "free", "score": 3},
        {"text": "a text", "score": {"a": [1]}},
        {"image": "picture.png", "caption": "a picture"},
    ]
    (tmp_path / "picture.png").write_bytes(PNGS[0])
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for name, data in {"1.png": PNGS[1], "1.txt": b"in a tar", "1.json": b'{"licence": "own"}'}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sources = {"lines": tmp_path / "lines.jsonl", "pairs": tmp_path / "pairs.tar"}
    run_steps(tmp_path / "out", sources, {"exact_duplicates": {}}, keep_columns=["licence", "score"], images="keep")
    rows = [row for name in sources for row in pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist()]
    assert [(row["licence"], row["score"]) for row in rows] == [("free", "3"), (None, '{"a": [1]}'), (None, None), ("own", None)]
    assert [image for row in rows for image in row["images"]] == [
        {"bytes": None, "path": str(tmp_path / "picture.png")}, {"bytes": PNGS[1], "path": None}
    ]  # fmt: skip
    again = open_sources({name: tmp_path / "out" / f"{name}.parquet" for name in sources})
    read = [records[i].messages for records in again.values() for i in range(len(records))]
    assert read == [records[i].messages for records in open_sources(sources).values() for i in range(len(records))]
    assert read[1:] == [(("text", text),) for text in ("a text", "<image>a picture", "<image>in a tar")]


def test_what_a_step_changes_is_written_and_counted(tmp_path):
    source = write_source(tmp_path / "source.parquet", [record("which? \r\n", "this"), record("which?", "that"), record("x", "\x00")])
    report = run_steps(tmp_path / "out", {"a": source}, {"clean": {}, "length": {"minimum": 4}})
    assert [message["content"] for row in messages(tmp_path / "out", "a") for message in row] == ["which?", "this", "which?", "that"]
    assert [(step.name, step.changed, step.removed) for step in report.steps[1:3]] == [("clean", 1, 0), ("length", 0, 1)]


def test_examples_are_few_and_name_what_a_record_is_too_like(tmp_path):
    source = write_source(tmp_path / "source.parquet", [record("new", str(i)) for i in range(3)] + [record("same", "x")] * 9)
    report = run_steps(tmp_path / "out", {"a": source}, {"duplicates": {"kind": "exact_duplicates"}}, examples=2)
    (step,) = (s for s in report.steps if s.kind == "exact_duplicates")
    assert step.causes == {"exact duplicate": 8}
    like = {"source": "a", "record": 3}
    assert step.examples == {"exact duplicate": [{"source": "a", "record": i, "detail": "", "like": like} for i in (4, 5)]}


def test_the_output_is_a_source_with_its_lineage(tmp_path):
    (tmp_path / "picture.png").write_bytes(PNGS[0])
    rows = [record(f"question {i}", "x" * 50, [PNGS[1]], licence="free") for i in range(20)]
    named = {"messages": [{"role": "user", "content": "<image>"}], "images": [{"bytes": None, "path": "picture.png"}]}
    source = write_source(tmp_path / "source.parquet", [*rows, named], ("licence",))
    values = {"keep_columns": ["licence"], "row_group_records": 6, "row_group_bytes": 4 * (len(PNGS[1]) + 67)}
    run_steps(tmp_path / "out", {"a": source}, {"length": {"part": "record", "maximum": 61}}, **values)
    table = pq.read_table(tmp_path / "out" / "a.parquet")
    assert table.column("licence").to_pylist() == ["free"] * 10 + [None]
    metadata = pq.read_metadata(tmp_path / "out" / "a.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 3]
    (again,) = open_sources({"a": tmp_path / "out" / "a.parquet"}).values()
    assert [again[i].images[0].data for i in range(11)] == [PNGS[1]] * 10 + [PNGS[0]]
    assert table.column("record").to_pylist() == [*range(10), 20]

    run_steps(tmp_path / "kept", {"a": source}, {}, images="keep")
    last = pq.read_table(tmp_path / "kept" / "a.parquet").to_pylist()[-1]
    assert last["images"] == [{"bytes": None, "path": str(tmp_path / "picture.png")}]
    (again,) = open_sources({"a": tmp_path / "kept" / "a.parquet"}).values()
    assert again[20].images[0].open().read() == PNGS[0]


def test_steps_over_questions_and_answers_pass_plain_texts_over(tmp_path):
    texts = write_source(tmp_path / "texts.parquet", [{"messages": [{"role": "text", "content": "A horse."}], "images": []}] * 2)
    talks = write_source(tmp_path / "talks.parquet", [record("What is it?", "A horse."), record("What is it?", "A cow.")])
    steps = {
        "length": {"part": "answer", "maximum": 7}, "exact_duplicates": {"part": "prompt"}, "answers": {"matches": "A .*"},
        "majority": {"min_votes": 1},
    }  # fmt: skip
    run_steps(tmp_path / "out", {"texts": texts, "talks": talks}, steps)
    assert pq.read_table(tmp_path / "out" / "texts.parquet").num_rows == 2
    assert pq.read_table(tmp_path / "out" / "talks.parquet").column("record").to_pylist() == [1]


def test_an_output_is_replaced_only_where_that_is_asked_for(tmp_path):
    source = write_source(tmp_path / "source.parquet", [record("a", "b")])
    run_steps(tmp_path / "out", {"a": source}, {})
    before = (tmp_path / "out" / "a.parquet").read_bytes()
    with pytest.raises(UserError, match="is there already; choose another folder with --out, or replace it with --overwrite"):
        run_steps(tmp_path / "out", {"a": source}, {})
    (tmp_path / "out.partial").mkdir()  # of a run that was killed
    config = load_curation(config_file(tmp_path, tmp_path / "out", source, "[steps.length]\nminimum = 9"))
    assert curate(config, overwrite=True).kept == 0
    assert (tmp_path / "out" / "a.parquet").read_bytes() != before
    for foreign in ("notes.txt", "mine.parquet"):
        (tmp_path / "out" / foreign).touch()
        with pytest.raises(UserError, match=rf"out is not replaced: it holds {foreign}, which no curation has written"):
            curate(config, overwrite=True)
        (tmp_path / "out" / foreign).unlink()
    exam = f'[steps.decontaminate.sources]\nexam = "{tmp_path / "out" / "a.parquet"}"'
    with pytest.raises(UserError, match=r"^source 'exam' .* lies in the output"):
        curate(load_curation(config_file(tmp_path, tmp_path / "out", source, exam)), overwrite=True)
    inside = load_curation(config_file(tmp_path, tmp_path / "out", tmp_path / "out" / "a.parquet", ""))
    with pytest.raises(UserError, match=r"^source 'a' .* lies in the output"):
        curate(inside, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curate.toml", "out", "source.parquet"]


def test_what_lies_beside_an_output_is_lost_only_where_a_curation_has_left_it(tmp_path):
    source = write_source(tmp_path / "source.parquet", [record("a", "b")])
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").touch()
    with pytest.raises(
        UserError, match=r"out\.partial, which a curation of .*out needs, holds notes\.txt, which none has written; rename it"
    ):
        run_steps(tmp_path / "out", {"a": source}, {})
    (tmp_path / "out.partial").rename(tmp_path / "notes")
    run_steps(tmp_path / "out", {"a": source}, {})
    (tmp_path / "out").rename(tmp_path / "out.replaced")  # where a kill between the two renames leaves it
    with pytest.raises(UserError, match=r"out is not there, and .*out\.replaced is: a curation was killed while it replaced"):
        run_steps(tmp_path / "out", {"a": source}, {})
    assert (tmp_path / "out.replaced" / "a.parquet").exists()


def config_file(folder, out, source, steps):
    path = folder / "curate.toml"
    path.write_text(f'output = "{out}"\nprocesses = 1\n[sources]\na = "{source}"\n{steps}\n')
    return path


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("[steps.lenght]", "steps: step lenght is of the unknown kind 'lenght'; did you mean 'length'?"),
        (
            '[steps.short]\nkind = "length"\nminimun = 3',
            "steps.short.minimun: unknown key; did you mean steps.short.minimum?",
        ),
        ("[steps.length]", "steps.length: neither minimum nor maximum is set: nothing would be removed"),
        ('[steps.length]\nunit = "tokens"\nminimum = 1', "steps.length: unit = 'tokens' and tokenizer go together"),
        (
            "[steps.near_text]\nthreshold = 1",
            "steps.near_text.threshold: Input should be less than or equal to 0.95 (given: 1)",
        ),
        ('[steps.answers]\nmatches = "("', "steps.answers.matches: it is no regular expression: missing ), "),
        ("[steps.decontaminate]", "steps.decontaminate.sources: missing"),
        (
            '[steps.answers]\nreference = "caption"',
            "keep_columns, or the reference or group of a step, names caption: a column of this",
        ),
        ("[steps]\nlength = 3", "steps.length: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_config_is_explained(tmp_path, steps, said):
    path = config_file(tmp_path, "out", "gone", steps)
    with pytest.raises(UserError) as caught:
        load_curation(path)
    assert str(caught.value).startswith(f"config {path}: {said}")


def test_the_examples_of_the_docs_are_configs_and_show_every_step():
    whole, steps = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "curation.md").read_text(), re.DOTALL)
    config = CurationConfig.model_validate(tomllib.loads(whole))
    shown = CurationConfig.model_validate({**config.model_dump(), "steps": tomllib.loads(steps)["steps"]})
    assert [step.kind for step in shown.steps.values()] == KINDS
    for section in (CurationConfig, *map(type, shown.steps.values())):
        assert [name for name, info in section.model_fields.items() if not info.description and name != "kind"] == []


@pytest.mark.parametrize(
    ("library", "kind", "values"),
    [("datasketch", "near_text", {}), ("imagehash", "near_images", {}), ("py3langid", "language", {"allowed": ["en"]})],
)
def test_a_missing_library_is_named_before_the_sources_are_read(tmp_path, monkeypatch, library, kind, values):
    _identifier.cache_clear()
    for module in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    source = write_source(tmp_path / "source.parquet", [record("a", "b", [PNGS[0]])])
    with pytest.raises(UserError, match=rf"needs the library {library}.*pip install 'smalt\[curate\]'"):
        run_steps(tmp_path / "out", {"a": source}, {kind: values})
    assert not (tmp_path / "out").exists()


def test_columns_that_steps_ask_for_are_read_and_missing_ones_named(tmp_path):
    rows = [record("q", "4", truth="4"), record("q", "5", truth="4"), record("q", "6")]
    source = write_source(tmp_path / "source.parquet", rows, ("truth",))
    report = run_steps(tmp_path / "out", {"a": source}, {"answers": {"reference": "truth"}})
    assert report.steps[1].causes == {"wrong answer": 1, "no column": 1}
    with pytest.raises(UserError, match=r"has no column other, .*; its columns are messages, images, truth"):
        run_steps(tmp_path / "more", {"a": source}, {"majority": {"group": "other"}})
    with pytest.raises(UserError, match="keep_columns names record, which the output has of its own"):
        run_steps(tmp_path / "more", {"a": source}, {}, keep_columns=["record"])


class Dies:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_curation(tmp_path):
    source = write_source(tmp_path / "source.parquet", [record("a", "b")])
    path = config_file(tmp_path, tmp_path / "out", source, "")
    config = load_curation(path).model_copy(update={"processes": 2})
    with pytest.raises(UserError, match="a process of the curation has died"), workers(Job.open(config, {}), {}) as run:
        list(run("examine", [Dies()]))


@pytest.mark.slow
def test_the_command_curates_the_digits_alike_on_any_number_of_processes(tmp_path, digits, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    # Twice the same file: all of the second source are duplicates.
    text = (ROOT / "configs" / "curate_digits.toml").read_text()
    text = text.replace("[sources]\n", '[sources]\nfirst = "data/digits/train/read.parquet"\n', 1).replace(
        "data/digits/curated", "curated"
    )
    text = text.replace("[steps.clean]", "[steps.clean]\n[steps.near_text]\n[steps.repetition]", 1)
    (tmp_path / "curate.toml").write_text(text)
    command = [sys.executable, "-m", "smalt.engine.cli", "data", "curate", "curate.toml", "--processes", "3", "--out", "by three"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "with 3 processes" in done.stdout
    monkeypatch.chdir(tmp_path)
    curate(load_curation(tmp_path / "curate.toml").model_copy(update={"processes": 1}))
    files = ["first.parquet", "largest.parquet", "read.parquet", "removed.jsonl", "report.json", "sum.parquet"]
    for out in (tmp_path / "by three", tmp_path / "curated"):
        assert sorted(p.name for p in out.iterdir()) == files
        report = json.loads((out / "report.json").read_text())
        assert report["records"]["read"] == 800
        assert report["sources"]["read"]["kept"] == 0
        assert report["evaluation_sets"]["decontaminate"]["unreadable"] == {}
    for name in set(files) - {"report.json"}:
        assert (tmp_path / "by three" / name).read_bytes() == (tmp_path / "curated" / name).read_bytes()
