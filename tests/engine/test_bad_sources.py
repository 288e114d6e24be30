"""Sources that are damaged, hostile, changed or gone: one record is lost at most, and what is wrong with a file is said by name."""

import errno
import gzip
import io
import json
import os
import pickle
import resource
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalt.engine.data import files, retry
from smalt.engine.data.sources import indices, open_source
from smalt.engine.errors import BadRecord, UserError

from .source_writers import add, put


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def _lines(path, count, first=0):
    put(str(path), b"".join(json.dumps({"text": str(number)}).encode() + b"\n" for number in range(first, first + count)))
    return str(path)


def _tar(path, count):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(count):
            add(tar, f"{number:02}.png", bytes([number]) * 600)
            add(tar, f"{number:02}.txt", str(number).encode())
    put(str(path), buffer.getvalue())
    return str(path)


def _parquet(path, count):
    pq.write_table(pa.table({"text": [str(number) for number in range(count)]}), path, row_group_size=1)
    return str(path)


def _saved(path, count):
    pytest.importorskip("datasets").Dataset.from_list([{"text": str(number)} for number in range(count)]).save_to_disk(path)
    return path


def _texts(records):
    return [records[number].messages[0][1].removeprefix("<image>") for number in range(len(records))]


def _cause(records, number=0):
    with pytest.raises(BadRecord) as caught:
        records[number]
    return caught.value.cause


def test_a_bad_line_costs_its_own_record(tmp_path):
    lines = [b'{"text": "0"}', b'{"text": "1"', b'{"text": "\xff"}', b"[]", b'{"body": "4"}', b'\xef\xbb\xbf{"text": "5"}\r']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    records = open_source("mine", path)
    assert len(records) == 6
    assert [records[number].messages[0][1] for number in (0, 5)] == ["0", "5"]
    causes = ["broken JSON", "unreadable record", "malformed record", "no known form"]
    assert [_cause(records, number) for number in range(1, 5)] == causes
    with pytest.raises(BadRecord, match=r"a\.jsonl, line at byte 14: "):
        records[1]


def test_a_compressed_file_that_is_cut_short_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 500)
    for cut in (1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be unpacked.*cut short"):
            open_source("mine", tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert len(open_source("mine", tmp_path / "a.jsonl.gz")) == 500


def test_a_tar_that_is_cut_short_or_damaged_never_passes_for_a_smaller_one(tmp_path):
    whole = Path(_tar(tmp_path / "whole.tar", 3)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        starts = [member.offset for member in tar]
        end = tar.offset
    path = tmp_path / "a.tar"
    for cut in sorted({*range(1, len(whole), 200), *starts[1:], end, end + 511, end + 512}):
        path.write_bytes(whole[:cut])
        if cut in starts or cut == end or cut >= end + 512:  # as of a writer that left the end away, or some of it
            assert len(open_source("mine", path)) == sum(start < cut for start in starts[::2])
        else:
            with pytest.raises(UserError, match=r"'mine'.*a\.tar is (not a readable tar|damaged)"):
                open_source("mine", path)
    for start in starts:
        path.write_bytes(whole[:start] + b"\xff" * 512 + whole[start + 512 :])
        with pytest.raises(UserError, match=r"a\.tar is (not a readable tar|damaged)"):
            open_source("mine", path)


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("../../out.txt", tarfile.REGTYPE, "leads out of it"),
        ("a/../../out.txt", tarfile.REGTYPE, "leads out of it"),
        ("..", tarfile.DIRTYPE, "leads out of it"),
        ("/etc/passwd.txt", tarfile.REGTYPE, "leads out of it"),
        ("a.txt", tarfile.SYMTYPE, "is neither a file nor a folder"),
        ("a.txt", tarfile.LNKTYPE, "is neither a file nor a folder"),
        ("a.txt", tarfile.CHRTYPE, "is neither a file nor a folder"),
        ("a.txt", tarfile.FIFOTYPE, "is neither a file nor a folder"),
        ("a.txt", tarfile.GNUTYPE_SPARSE, "is neither a file nor a folder"),
    ],
)
def test_a_tar_with_a_member_that_leads_elsewhere_is_refused_by_name(tmp_path, name, kind, wrong):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "fine.txt", b"fine")
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match=rf"a\.tar is refused: its member {name!r} {wrong}"):
        open_source("mine", tmp_path / "a.tar")


def test_samples_that_are_unclear_cost_their_own_record(tmp_path):
    talk = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        tar.addfile(tarfile.TarInfo("a/.hidden"))
        for name, content in [
            ("a/0.txt", b"fine"), ("a/1.json", talk), ("a/1.txt", b"and text"), ("a/2.jpg", b"x"), ("a/3.txt", b"\xff"),
            ("a/4.json", b"{"), ("a/5.txt", b"once"), ("a/5.txt", b"again"), ("a/6.json", b'{"text": "x", "image": "gone.png"}'),
            ("b/0.txt", b"of another folder"),
        ]:  # fmt: skip
            add(tar, name, content)
    records = open_source("mine", tmp_path / "a.tar")
    assert [records[0].messages[0][1], records[7].messages[0][1], len(records)] == ["fine", "of another folder", 8]
    assert [_cause(records, number) for number in range(1, 7)] == [
        "several forms", "no known form", "unreadable record", "broken JSON", "malformed sample", "missing image",
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize(("write", "ending"), [(_lines, "jsonl"), (_tar, "tar"), (_parquet, "parquet")])
def test_a_source_that_vanishes_costs_records_and_not_the_process(tmp_path, place, write, ending):
    path = f"{tmp_path}/a.{ending}" if place == "disk" else f"memory://gone/a.{ending}"
    if place == "memory" and ending == "parquet":
        put(path, Path(_parquet(tmp_path / "b.parquet", 3)).read_bytes())
    else:
        write(path, 3)
    records = open_source("mine", path)
    unopened = pickle.loads(pickle.dumps(records))
    record = records[0]
    system, inner = fsspec.core.url_to_fs(path)
    system.rm(inner)
    assert _cause(records, 1) == "unreadable record"
    assert [_cause(unopened, number) for number in range(3)] == ["unreadable record"] * 3
    for image in record.images:
        with pytest.raises(OSError, match=r"a\.tar"):
            image.open()


def test_a_saved_dataset_that_vanishes_costs_records_and_not_the_process(tmp_path):
    records = open_source("mine", _saved(f"{tmp_path}/saved", 3))
    os.rename(tmp_path / "saved", tmp_path / "elsewhere")
    assert [_cause(records, number) for number in range(3)] == ["unreadable record"] * 3
    (tmp_path / "elsewhere" / "data-00000-of-00001.arrow").write_bytes(b"junk")
    with pytest.raises(UserError, match="is not a readable dataset of Hugging Face"):
        open_source("mine", tmp_path / "elsewhere")


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(("write", "ending"), [(_lines, "jsonl"), (_tar, "tar"), (_parquet, "parquet")])
def test_a_source_that_has_changed_ends_the_run(tmp_path, write, ending, loaded):
    path = write(tmp_path / f"a.{ending}", 3)
    records = open_source("mine", path)
    if loaded:
        records[0]
    write(path, 4)
    with pytest.raises(UserError, match=rf"a\.{ending} has changed since this run opened it"):
        records[1]
    assert _texts(open_source("mine", path)) == ["0", "1", "2", "3"]


def test_a_file_of_the_same_size_is_another_by_its_time(tmp_path):
    path = _lines(tmp_path / "a.jsonl", 3)
    records = open_source("mine", path)
    _lines(path, 3, first=5)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="has changed"):
        records[0]
    assert _texts(open_source("mine", path)) == ["5", "6", "7"]


@pytest.mark.parametrize(("write", "ending"), [(_lines, "jsonl"), (_tar, "tar")])
def test_an_index_is_made_once_and_made_again_when_it_is_damaged(tmp_path, cache, monkeypatch, write, ending):
    made = []
    written = indices._write

    def count(file, *rest):
        made.append(file)
        written(file, *rest)

    monkeypatch.setattr(indices, "_write", count)
    path = write(tmp_path / f"a.{ending}", 30)
    want = [str(number) for number in range(30)]
    assert _texts(open_source("mine", path)) == _texts(open_source("mine", path)) == want
    assert len(made) == 1
    (index,) = cache.glob("*.index")
    whole = index.read_bytes()
    damaged = [b"", b"junk", whole[:-1], whole[: len(whole) // 2], bytes(len(whole)), whole + b"more"]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1)]
    for content in damaged:
        index.unlink()
        index.write_bytes(content)
        assert _texts(open_source("mine", path)) == want
    assert len(made) == 1 + len(damaged)
    records = open_source("mine", path)
    index.unlink()
    assert _texts(pickle.loads(pickle.dumps(records))) == want


def test_the_copies_of_a_compressed_file_do_not_pile_up(tmp_path, cache):
    for count in (2, 3, 4):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * count))
        records = open_source("mine", tmp_path / "a.jsonl.gz")
        assert len(records) == count
        (copy,) = cache.glob("unpacked-*")
        copy.unlink()
        assert _texts(pickle.loads(pickle.dumps(records))) == ["a"] * count


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SMALT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"'mine'.*the cache folder .*file cannot be written.*set SMALT_CACHE"):
        open_source("mine", _lines(tmp_path / "a.jsonl", 3))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json"])
def test_a_cache_that_is_full_is_not_taken_for_a_bad_source(tmp_path, cache, ending):
    rows = [{"text": str(number)} for number in range(5000)]
    content = json.dumps(rows) if ending == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(content.encode()) if ending.endswith("gz") else content.encode())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"the cache folder .* cannot be written: File too large; set SMALT_CACHE"):
            open_source("mine", tmp_path / f"a.{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(open_source("mine", tmp_path / f"a.{ending}")) == 5000


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("SMALT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert indices.cache_folder() == tmp_path / "smalt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert indices.cache_folder() == tmp_path / "home" / ".cache" / "smalt"


@pytest.mark.parametrize(("number", "passes"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)])
@pytest.mark.parametrize(("write", "ending"), [(_lines, "jsonl"), (_tar, "tar")])
def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch, write, ending, number, passes):
    records = open_source("mine", write(tmp_path / f"a.{ending}", 3))
    found, failed = files.open_file, []

    def fail(path):
        if len(failed) < 3:
            failed.append(path)
            raise OSError(number, os.strerror(number))
        return found(path)

    monkeypatch.setattr(files, "open_file", fail)
    if passes:
        assert records[0].messages[0][1].endswith("0")
    else:
        assert _cause(records) == "unreadable record"
    assert len(failed) == (3 if passes else 1)


def test_what_a_library_behind_a_url_raises_is_tried_again_and_costs_the_record(monkeypatch):
    records = open_source("mine", _lines("memory://flaky/a.jsonl", 3))
    system, tries = fsspec.filesystem("memory"), []

    def fail(*_, **__):
        tries.append(1)
        raise RuntimeError("503 slow down")

    monkeypatch.setattr(system, "cat_file", fail)
    with pytest.raises(BadRecord, match="503 slow down") as caught:
        records[0]
    assert (caught.value.cause, len(tries)) == ("unreadable record", 4)
