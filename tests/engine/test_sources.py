"""Every kind of source gives back what was written, in every form of a record, from a disk and from a URL; what it is follows from the
path and from what is there, and what it cannot be is said."""

import itertools
import json
import pickle
import re
import tarfile
import textwrap
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalt.engine.data.sources import open_source, open_sources
from smalt.engine.errors import UserError

from .source_writers import WRITERS, Written, add, as_read, put

FORMS = ("messages", "parts", "conversations", "text", "caption")
_folders = itertools.count()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@st.composite
def _records(draw, form):
    """One to five records, each with up to twelve images."""
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda t: "<image>" not in t)
    image = st.binary(min_size=1, max_size=8)
    if form == "caption":
        turns = st.tuples(st.tuples(st.just("text"), st.just(""), st.just(1), text))
    elif form == "text":
        turns = st.tuples(st.tuples(st.just("text"), text, st.integers(0, 2), text))
    else:
        turn = st.tuples(st.sampled_from(["system", "user", "assistant"]), text, st.integers(0, 4), text)
        turns = st.lists(turn, min_size=1, max_size=3).map(tuple)
    found = []
    for said in draw(st.lists(turns, min_size=1, max_size=5)):
        count = sum(turn[2] for turn in said)
        found.append(Written(form, said, tuple(draw(st.lists(image, min_size=count, max_size=count)))))
    return found


def _read(record):
    images = []
    for image in record.images:
        with image.open() as file:
            images.append(file.read())
        assert image.size() == len(images[-1])
    return record.messages, tuple(images)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), remote=st.booleans(), order=st.randoms(use_true_random=False))
def test_what_was_written_is_read(tmp_path, kind, form, data, remote, order):
    folder = f"memory://test/{next(_folders)}" if remote else str(tmp_path / str(next(_folders)))
    if not remote:
        (tmp_path / folder).mkdir()
    written = data.draw(_records(form))
    records = open_source("mine", WRITERS[kind](folder, written))
    assert len(records) == len(written)
    unread = pickle.dumps(records)
    numbers = [*range(len(written))] * 2
    order.shuffle(numbers)
    for number in numbers:
        record = records[number]
        assert _read(record) == as_read(written[number])
        assert (record.source, record.number) == ("mine", number)
    assert pickle.dumps(records) == unread  # nothing that was opened goes along
    again = pickle.loads(unread)
    assert [_read(again[number]) for number in range(len(written))] == [as_read(record) for record in written]
    for outside in (-1, len(written)):
        with pytest.raises(IndexError):
            again[outside]


def _lines(path, rows):
    put(str(path), "".join(json.dumps(found) + "\n" for found in rows).encode())
    return path


def _texts(records):
    return [records[number].messages[0][1] for number in range(len(records))]


COLUMNS = {"images": "pics", "text": "content"}


@pytest.mark.parametrize("kind", ["parquet", "json lines", "tar", "saved dataset"])
def test_columns_of_other_names(tmp_path, kind):
    row = {"content": "a cat", "pics": [b"a"], "text": "not this"}
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([row]), path)
    elif kind == "json lines":
        path = _lines(tmp_path / "a.jsonl", [{**row, "pics": ["data:,a"]}])
    elif kind == "tar":
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as tar:
            add(tar, "k.json", json.dumps({**row, "pics": ["png"]}).encode())
            add(tar, "k.png", b"a")
            add(tar, "k.txt", b"not this")
    else:
        path = tmp_path / "saved"
        pytest.importorskip("datasets").Dataset.from_list([row]).save_to_disk(str(path))
    record = open_sources({"mine": path}, {"mine": COLUMNS, "other": {}})["mine"][0]
    assert _read(record) == ((("text", "<image>a cat"),), (b"a",))


def test_tables_say_at_once_what_they_are_not(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "messages": [[{"role": "user", "content": "x"}]]}), path)
    with pytest.raises(UserError, match=r"source 'mine'.*several forms: there are text, messages; .* name them in data\.columns"):
        open_source("mine", path)
    assert _texts(open_source("mine", path, {"text": "text"})) == ["a"]
    with pytest.raises(
        UserError, match=r"has no column dialog, which data\.columns or a curation names; its columns are text, messages"
    ):
        open_source("mine", path, {"messages": "dialog"})


def test_the_kind_of_a_folder_follows_from_what_is_in_it(tmp_path):
    rows = [{"text": str(number)} for number in range(4)]
    _lines(tmp_path / "b.json", rows[2:])
    _lines(tmp_path / "a.json", rows[:2])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "deeper.jsonl").mkdir()
    assert _texts(open_source("mine", f"{tmp_path}/")) == ["0", "1", "2", "3"]
    _lines(tmp_path / "c.jsonl", rows[:1])
    _lines(tmp_path / ".c.jsonl.swp.jsonl", rows)
    assert _texts(open_source("mine", tmp_path)) == ["0"]  # .json beside others is about them
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"files of several kinds: d\.parquet, c\.jsonl|c\.jsonl, d\.parquet"):
        open_source("mine", tmp_path)
    assert _texts(open_source("mine", tmp_path / "*.parquet")) == ["x"]
    assert _texts(open_source("mine", f"file://{tmp_path}/[ab].json")) == ["0", "1", "2", "3"]
    (tmp_path / "e.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "d.parquet").rename(tmp_path / "d.old")
    with pytest.raises(UserError, match=r"e\.jsonl cannot be read|No such file"):
        open_source("mine", tmp_path)
    (tmp_path / "d.old").rename(tmp_path / "d.parquet")
    with pytest.raises(UserError, match="names files of several kinds"):
        open_source("mine", tmp_path / "[cd].*")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.jsonl", None, "gone.jsonl does not exist"),
        ("gone/*.tar", None, "does not exist"),
        ("a.csv", b"x", r"a\.csv ends in none of \.parquet, \.jsonl"),
        ("a.tar.gz", b"x", "unpack it"),
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.jsonl.gz", b"", "holds no records"),
        ("a.json", b"[]", "holds no records"),
        ("a.tar", bytes(10240), "holds no records"),
        ("a.tar", b"", "not a readable tar"),
        ("a.tar", b"no tar" * 1000, "not a readable tar"),
        ("a.json", b'[{"text": "a"},', "begins as a JSON array and is none"),
        ("a.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("a.json.zst", b"no zstd", "cannot be unpacked"),
        ("nothing", "folder", "holds no file that ends in one of"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path, name, content, said):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data source 'mine': {tmp_path}.*{said}"):
        open_source("mine", path)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/a.jsonl", "s3fs"),
        ("nonsense://a.jsonl", "nonsense"),
        ("memory://never/a.jsonl", "does not exist"),
        ("memory://never", "does not exist"),
        ("simplecache::s3://bucket/a.jsonl", "a chain of URLs"),
    ],
)
def test_a_url_that_cannot_be_opened_is_named(url, said):
    with pytest.raises(UserError, match=f"data source 'mine': {url}.*{said}"):
        open_source("mine", url)


def test_the_splits_of_a_saved_dataset_are_sources_of_their_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"several splits; name the folder of one, as .*saved/train"):
        open_source("mine", tmp_path / "saved")
    assert _texts(open_source("mine", tmp_path / "saved" / "train")) == ["a"]


def test_the_images_of_a_sample_stand_in_the_order_of_their_numbers(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for at in [10, 2, 0, 11, *range(3, 10), 1]:
            add(tar, f"k.{at}.png", bytes([at]))
        add(tar, "k.txt", b"<image>" * 12)
    images = [image.open().read() for image in open_source("mine", tmp_path / "a.tar")[0].images]
    assert images == [bytes([at]) for at in range(12)]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:  # digits to Python, but of no number
        for at in ["\N{SUPERSCRIPT TWO}1", "1"]:
            add(tar, f"k.{at}.png", at.encode())
        add(tar, "k.txt", b"<image>" * 2)
    images = [image.open().read().decode() for image in open_source("mine", tmp_path / "b.tar")[0].images]
    assert images == ["\N{SUPERSCRIPT TWO}1", "1"]


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)]
    code, config = "", ""
    for block in "\n".join(blocks).split("\n\n"):
        if block.lstrip().startswith("["):
            config += f"{block}\n"
        else:
            code += f"{block}\n"
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    data = tomllib.loads(config)["data"]
    records = open_sources(data["sources"], data["columns"])
    assert {name: len(source) for name, source in records.items()} == {"talks": 1, "pairs": 1, "books": 1}
    horse = (tmp_path / "data" / "photos" / "horse.jpg").read_bytes()
    assert records["talks"][0].messages[1] == ("assistant", "<think>Four legs, a mane.</think>A horse.")
    assert _read(records["talks"][0])[1] == (horse,)
    assert _read(records["pairs"][0]) == ((("text", "<image>A horse."),), (horse,))
    assert records["books"][0].messages == (("text", "Horses are ..."),)
