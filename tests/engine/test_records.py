"""Parquet records: random access is the table itself; what is wrong is named, and one bad row costs one record."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalt.engine.data import retry
from smalt.engine.data.records import Image
from smalt.engine.data.sources import open_source, open_sources, pieces
from smalt.engine.errors import BadRecord, UserError

CONVERSATION = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]


@pytest.fixture
def write(tmp_path):
    """write(columns, name="records.parquet", **what write_table takes): a file in tmp_path."""

    def make(columns, name="records.parquet", **options):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, **options)
        return path

    return make


def _numbered(count, first=0):
    return {"messages": [[{"role": "user", "content": str(i)}] for i in range(first, first + count)]}


def _contents(records):
    return [records[i].messages[0][1] for i in range(len(records))]


def _cause(records, number=0):
    with pytest.raises(BadRecord) as caught:
        records[number]
    return caught.value.cause


def test_a_missing_file_is_named_with_its_source(tmp_path):
    with pytest.raises(UserError, match=r"'sums'.*gone\.parquet does not exist"):
        open_sources({"sums": tmp_path / "gone.parquet"})


def test_a_folder_without_parquet_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"'s'.*holds no file that ends in one of \.parquet, \.jsonl"):
        open_source("s", tmp_path)


def test_a_file_without_records_is_refused(write):
    empty = write({"messages": pa.array([], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))})
    with pytest.raises(UserError, match="holds no records"):
        open_source("s", empty)


@pytest.mark.parametrize("content", [b"", b"{}", b"PAR1" + b"\0" * 64 + b"PAR1"])
def test_what_is_not_parquet_is_named(tmp_path, content):
    path = tmp_path / "records.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"'s'.*records\.parquet is not a readable Parquet file"):
        open_source("s", path)


def test_a_file_of_no_known_form_is_refused_with_the_columns_it_has(write):
    with pytest.raises(UserError, match=r"'s'.*no known form: there are body, url; needed is exactly one of messages, conversations"):
        open_source("s", write({"body": ["a"], "url": ["b"]}))


def test_a_record_is_the_row(write):
    columns = {"id": [7, 8], "messages": [CONVERSATION, CONVERSATION[:1]], "images": [[b"png"], None]}
    records = open_source("s", write(columns))
    assert len(records) == 2
    first, second = records[0], records[1]
    assert first.messages == (("user", "1+1"), ("assistant", "2"))
    assert (first.images, first.source, first.number) == ((Image(b"png", None),), "s", 0)
    assert (second.messages, second.images, second.number) == ((("user", "1+1"),), (), 1)


def test_the_files_of_a_folder_follow_the_order_of_their_names(write, tmp_path):
    write(_numbered(3, 5), "folder/b.parquet")
    write(_numbered(5, 0), "folder/a.parquet", row_group_size=2)
    write({"messages": pa.array([], pa.null())}, "folder/aa.parquet")
    write(_numbered(1, 8), "folder/c.parquet")
    (tmp_path / "folder" / "README.md").write_text("not data")
    assert _contents(open_source("s", tmp_path / "folder")) == [str(i) for i in range(9)]


@pytest.mark.slow
@pytest.mark.parametrize(("cached", "cached_bytes"), [(1, 2**30), (3, 2**30), (64, 2**30), (64, 300)])
@given(rows=st.integers(1, 40), size=st.integers(1, 7), seed=st.randoms(use_true_random=False))
def test_random_access_equals_the_table_whatever_the_cache_holds(tmp_path_factory, cached, cached_bytes, rows, size, seed):
    path = tmp_path_factory.mktemp("groups") / "records.parquet"
    pq.write_table(pa.table(_numbered(rows)), path, row_group_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LOADED_PIECES", cached)
        records = open_source("s", path, cached_bytes=cached_bytes)
        assert len(records) == rows
        for i in seed.choices(range(rows), k=60):
            assert records[i].messages == (("user", str(i)),)
            assert records[i].number == i
        assert len(records._loaded) <= cached
        assert len(records._loaded) == 1 or records._bytes() <= cached_bytes
    with pytest.raises(IndexError):
        records[rows]


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([], "no messages"),
        (None, "no messages"),
        ("hello", "no messages"),
        ([None], "malformed message"),
        ([{"role": "robot", "content": "x"}], "malformed message"),
        ([{"role": "user", "content": None}], "malformed message"),
        ([{"role": "user", "content": 5}], "malformed message"),
        ([{"content": "x"}], "malformed message"),
        ([{"from": "robot", "value": "x"}], "malformed message"),
        (["hello"], "malformed message"),
    ],
    ids=repr,
)
def test_malformed_messages_cost_the_record(write, messages, cause):
    assert _cause(open_source("s", write({"messages": [messages]}))) == cause


@pytest.mark.parametrize(
    ("images", "want"),
    [
        ([b"png", b"jpg"], (Image(b"png", None), Image(b"jpg", None))),
        ([{"bytes": b"png", "path": None}], (Image(b"png", None),)),
        ([{"bytes": b"png", "path": "a.png"}], (Image(b"png", "a.png"),)),
        ([{"bytes": None, "path": "a.png"}], (Image(None, "{folder}/a.png"),)),
        (["deep/a.png", "../b.png"], (Image(None, "{folder}/deep/a.png"), Image(None, "{folder}/../b.png"))),
        (["/absolute/a.png"], (Image(None, "/absolute/a.png"),)),
        ("a.png", (Image(None, "{folder}/a.png"),)),
        ({"bytes": b"png", "path": None}, (Image(b"png", None),)),
        ([], ()),
        (None, ()),
    ],
    ids=repr,
)
def test_the_forms_of_images(write, tmp_path, images, want):
    (record,) = [open_source("s", write({"messages": [CONVERSATION], "images": [images]}))[0]]
    want = tuple(Image(i.data, i.path and i.path.replace("{folder}", str(tmp_path))) for i in want)
    assert record.images == want


def test_paths_of_a_folder_of_files_are_relative_to_the_folder(write, tmp_path):
    write({"messages": [CONVERSATION], "images": [["a.png"]]}, "folder/a.parquet")
    (image,) = open_source("s", tmp_path / "folder")[0].images
    assert Path(image.path) == tmp_path / "folder" / "a.png"


@pytest.mark.parametrize(
    "images",
    [5, [None], [5], [{"bytes": None, "path": None}], [{"bytes": "text"}], [[b"png"]]],
    ids=repr,
)
def test_malformed_images_cost_the_record(write, images):
    assert _cause(open_source("s", write({"messages": [CONVERSATION], "images": [images]}))) == "malformed image"


def test_text_that_is_not_utf8_costs_one_record(write):
    content = pa.array([b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    message = pa.StructArray.from_arrays([pa.array(["user", "user"]), content], ["role", "content"])
    records = open_source("s", write({"messages": pa.ListArray.from_arrays([0, 1, 2], message)}))
    assert _cause(records, 0) == "unreadable record"
    assert records[1].messages == (("user", "fine"),)


def test_a_row_group_that_is_damaged_on_disk_costs_its_own_records(write):
    path = write(_numbered(40), row_group_size=20, compression="zstd", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(0)
    content = bytearray(path.read_bytes())
    start = group.column(1).data_page_offset
    content[start : start + group.column(1).total_compressed_size] = b"\xff" * group.column(1).total_compressed_size
    path.write_bytes(content)
    records = open_source("s", path)
    assert {_cause(records, i) for i in range(20)} == {"unreadable record"}
    assert [records[i].messages[0][1] for i in range(20, 40)] == [str(i) for i in range(20, 40)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
def test_a_read_that_fails_for_a_moment_is_tried_again(write, monkeypatch, number):
    tries = []

    def read(file, group, whole=pq.ParquetFile.read_row_group, **options):
        tries.append(file)
        # A stale file is so until it is opened anew; what is wrong with the others passes.
        if file is tries[0] if number == errno.ESTALE else len(tries) < 4:
            raise OSError(number, os.strerror(number))
        return whole(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.01, 0.02))
    assert _contents(open_source("s", write(_numbered(3)))) == ["0", "1", "2"]
    assert len(tries) == (2 if number == errno.ESTALE else 4)


@pytest.mark.parametrize(("number", "times"), [(errno.EIO, 4), (errno.ENOENT, 1), (errno.EACCES, 1), (errno.EISDIR, 1)])
def test_a_read_that_goes_on_failing_costs_the_record(write, monkeypatch, number, times):
    tries = []

    def fail(*_, **__):
        tries.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0))
    assert _cause(open_source("s", write(_numbered(3)))) == "unreadable record"
    assert len(tries) == times


CUT_SHORT = """
import os, sys
from smalt.engine.data.sources import open_source
from smalt.engine.errors import BadRecord
records = open_source("s", sys.argv[1])
found = os.stat(sys.argv[1])
with open(sys.argv[1], "r+b") as file:
    file.truncate(4096)
    file.truncate(found.st_size)
os.utime(sys.argv[1], ns=(found.st_atime_ns, found.st_mtime_ns))
try:
    records[900]
except BadRecord as error:
    print(error.cause)
"""


@pytest.mark.slow
def test_a_page_of_a_file_that_cannot_be_read_costs_records_and_not_the_process(write):
    path = write(_numbered(1000), row_group_size=10)
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "unreadable record\n"), done.stderr


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    start = readme.index('    {"messages"')
    line = " ".join(readme[start : readme.index("\n`<image>` stands for one image each")].split())
    (tmp_path / "data" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    Path("data/mine/train.jsonl").write_text(line + "\n")
    record = open_source("mine", "data/mine/train.jsonl")[0]
    assert record.messages[1] == ("assistant", "<think>Four legs, a mane.</think>A horse.")
    assert [image.path for image in record.images] == ["data/mine/photos/horse.jpg"]
