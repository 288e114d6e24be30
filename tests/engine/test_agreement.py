"""No two ranks train, measure or ask on different data: what one of them alone cannot read ends the run, on all, by name."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalt.engine.config import load_config
from smalt.engine.data.agreement import MOST_RANKS, Account, Entry, describe
from smalt.engine.data.reading import SkippedSample
from smalt.engine.stage import stage_stream
from smalt.engine.trainer import open_data
from smalt.model import Document


def _document(tokens, targets, tiles=0):
    empty = np.zeros(0, np.int64)
    return Document(np.array(tokens), np.array(targets), empty, np.zeros((tiles, 3, 2, 2)), empty.reshape(0, 2), "read", 7)


def test_a_fingerprint_is_of_what_was_read_and_not_of_the_process():
    entries = [Entry.of(_document([1, 2, 3], [False, True, True])), Entry.of(SkippedSample("read", 8, "missing image", "gone"))]
    assert [str(e) for e in entries] == ["read (tokens: 3, tiles: 0, checksum: f7bc28d5)", "skipped for 'missing image' (gone)"]
    one = Account.of(entries).fingerprint
    assert one == 2390880307130395407
    others = [
        Account.of(entries[::-1]),
        *(
            Account.of([Entry.of(document), entries[1]])
            for document in (
                _document([1, 2, 4], [False, True, True]), _document([1, 2, 3], [False, True, False]),
                _document([1, 2, 3], [False, True, True], tiles=1),
            )
        ),
        Account.of([entries[0], Entry.of(SkippedSample("read", 8, "corrupt image", "gone"))]),
    ]  # fmt: skip
    assert len({one, *(other.fingerprint for other in others)}) == len(others) + 1
    # The text of an error may name a machine.
    same = Account.of([entries[0], Entry.of(SkippedSample("read", 8, "missing image", "gone on node 3"))])
    assert same.fingerprint == one


def test_the_few_are_named_before_the_many():
    read, bad = Entry("record 5 of source 'a'", "read (tokens: 4)"), Entry("record 5 of source 'a'", "skipped for 'bad'", "EIO")
    assert (
        describe([read, bad, read]) == "record 5 of source 'a' is skipped for 'bad' (EIO) on rank 1 and read (tokens: 4) on the others"
    )
    other = Entry("record 9 of source 'b'", "read (tokens: 4)")
    assert describe([read, other, None]) == (
        "record 5 of source 'a' is read (tokens: 4) on rank 0 and record 9 of source 'b' is read (tokens: 4) on rank 1 and "
        "nothing more is read on rank 2"
    )
    many = describe([bad] * (MOST_RANKS + 2) + [read] * 50)
    assert many.endswith("(EIO) on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more and read (tokens: 4) on the others")


CASES = """
import json, sys
from smalt.engine.data.agreement import Account, Entry, read_alike
from smalt.parallel import join_world, leave_world

world = join_world("cpu")
rank, said = world.rank, []

def entries(*outcomes):
    return [Entry(f"record {i}", outcome) for i, outcome in enumerate(outcomes)]

def fail():
    raise KeyError(f"of rank {rank}")

def one_fails():
    return fail() if rank == 1 else "made"

cases = [
    (lambda: f"made by {rank}", lambda made: Account.of(entries("read"))),
    (lambda: "made", lambda made: Account.of(entries("read", "skipped" if rank else "read", f"on {rank}"))),
    (one_fails, lambda made: Account.of(entries("read"))),
    (fail, lambda made: Account.of(entries("read"))),
    (lambda: "made", lambda made: Account.of(entries("read", "read")[: 2 - rank])),
]
for read, account in cases:
    try:
        said.append(read_alike(world, "here", read, account))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
with open(f"{sys.argv[1]}-{rank}", "w") as file:
    json.dump(said, file)
leave_world(world)
"""


@pytest.mark.slow
def test_every_rank_hears_of_every_difference(tmp_path):
    (tmp_path / "cases.py").write_text(CASES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, tmp_path / "cases.py", tmp_path / "said"], check=True, timeout=120)
    first, second = (json.loads((tmp_path / f"said-{rank}").read_text()) for rank in (0, 1))
    differ = "UserError: here: the ranks read different data: "
    end = "; give every machine the same files, then --resume"
    assert first == [
        "made by 0", f"{differ}record 1 is read on rank 0 and skipped on rank 1{end}",
        "UserError: here: rank 1 cannot read the data that this rank can: KeyError: 'of rank 1'", "KeyError: 'of rank 0'",
        f"{differ}record 1 is read on rank 0 and nothing more is read on rank 1{end}",
    ]  # fmt: skip
    assert second == ["made by 1", first[1], "KeyError: 'of rank 1'", "KeyError: 'of rank 1'", *first[4:]]


# For one rank alone, as a disk of its machine would: a file that cannot be read, a file that is not there.
FAULTS = """
import errno, os, pathlib
if os.environ.get("RANK") == "1":
    def open(path, *options, whole=pathlib.Path.open, **more):
        if path.name == "fault.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path, *options, **more)

    def listdir(*folder, whole=os.listdir):
        return [name for name in whole(*folder) if name != "fault.parquet"]

    pathlib.Path.open, os.listdir = open, listdir
"""


@pytest.fixture
def faults(tmp_path):
    """The environment in which rank 1 meets them."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FAULTS)
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(tmp_path / "hook") + (os.pathsep + path if path else "")}


def _with_fault(source, number, folder):
    """A copy of a source in which the image of one record is a file, that of the fault."""
    table = pq.read_table(source)
    rows = table.to_pylist()
    (folder / "fault.png").write_bytes(rows[number]["images"][0]["bytes"])
    rows[number]["images"][0] = {"bytes": None, "path": "fault.png"}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / f"faulty-{source.name}")
    return folder / f"faulty-{source.name}"


def _errors(done):
    """What is said on all ranks is printed once; what one rank has to say otherwise begins with "error on rank"."""
    assert done.returncode == 1, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


LAYOUT = {"model.language.num_layers": 2, "model.language.num_kv_heads": 2, "data.packs_per_step": 2, "dtype": "float64"}
ONE_STAGE = {"stages.sft": None, "stages.align.steps": 14, "evaluation": {}, "data.validation": {}, "data.prefetch": 1}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tp", "pp"])
def test_a_record_that_one_rank_cannot_read_ends_the_run_on_all(axis, digits, tiny_config, faults, train, figures, tmp_path):
    config = load_config(tiny_config({**LAYOUT, **ONE_STAGE}))
    late = stage_stream(config, "align", open_data(config))[121].record  # which rank 1 measures
    source = _with_fault(digits / "train" / "read.parquet", late, tmp_path)
    path = tiny_config({**LAYOUT, **ONE_STAGE, "data.sources.read": source, f"parallel.{axis}": 2})
    folder = tmp_path / "run"
    (said,) = _errors(train([path, "--folder", folder], nproc=2, check=False, env=faults))
    step = int(re.match(r"error: step (\d+)", said)[1])
    assert said.startswith(f"error: step {step}: the ranks read different data: record {late} of source 'read' is read (tokens: ")
    assert "on rank 0 and skipped for 'missing image' (" in said
    assert "fault.png': [Errno 5] Input/output error" in said
    assert said.endswith("on rank 1; give every machine the same files, then --resume")
    # Nothing of that step was trained on, and what was saved before it is whole.
    assert [line["step"] for line in figures(folder)] == list(range(1, step))
    assert (folder / "checkpoints" / f"step-{(step - 1) // 2 * 2:08d}").exists()
    if axis == "fsdp":
        train([path, "--folder", folder, "--resume"], nproc=2)
        train([path, "--folder", tmp_path / "whole"], nproc=2)
        assert figures(folder) == figures(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["validation", "evaluation"])
def test_a_held_out_record_that_one_rank_cannot_read_ends_the_run_on_all(kind, digits, tiny_config, faults, train, tmp_path):
    source = _with_fault(digits / "held_out" / "read.parquet", 0, tmp_path)
    changes = {"stages.align": None, "stages.sft.steps": 1, "data.validation": {}, "evaluation": {}}
    if kind == "validation":
        changes["data.validation"] = {"photos": source}
    else:
        changes["evaluation"] = {"sources": {"photos": source}, "questions": 4, "max_tokens": 2}
    (said,) = _errors(train([tiny_config(changes), "--folder", tmp_path / "run"], nproc=2, check=False, env=faults))
    assert said.startswith(f"error: {kind} source 'photos': the ranks read different data: record 0 of source 'photos' is read")


@pytest.mark.slow
def test_a_file_that_one_rank_does_not_have_ends_the_run_before_its_first_step(digits, tiny_config, faults, train, tmp_path):
    table = pq.read_table(digits / "train" / "read.parquet")
    for name, low in (("a.parquet", 0), ("fault.parquet", 100)):
        (tmp_path / "read").mkdir(exist_ok=True)
        pq.write_table(table.slice(low, 100), tmp_path / "read" / name)
    config = tiny_config({**ONE_STAGE, "data.sources.read": tmp_path / "read"})
    said = _errors(train([config, "--folder", tmp_path / "run"], nproc=2, check=False, env=faults))
    assert set(said) == {
        "error: before the first step: the ranks read different data: data.sources.read is 200 records long on rank 0 and 100 records "
        "long on rank 1; give every machine the same files, then --resume"
    }
