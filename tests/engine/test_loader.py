"""The loader: the same steps on any number of ranks, workers and steps ahead; what one rank has otherwise ends all of them."""

import io
import json
import os
import signal
import threading
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PIL_Image
from tokenizers import Tokenizer

from smalt.engine.data import chat
from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.images import decode_tiles
from smalt.engine.data.loader import Loader, Packing, Place
from smalt.engine.data.packing import PackerState
from smalt.engine.data.reading import Reader
from smalt.engine.data.records import Image, Record
from smalt.engine.data.sources import open_sources
from smalt.engine.data.stream import Mix, Presentation, SampleStream
from smalt.engine.errors import BadRecord, UserError
from smalt.model import TilingConfig
from smalt.model.cost import Cost
from smalt.model.tiling import ImageShape

LENGTH = 96


def _png(width, height, grey):
    buffer = io.BytesIO()
    PIL_Image.new("L", (width, height), grey).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [_png(8, 8, 10), _png(24, 8, 99), _png(16, 16, 200)]
TRUNCATED = PICTURES[2][:-30]


class Records:
    """In memory. Record i has i % 4 images and a text as long as i % 7; ``broken`` ones have a picture that ends too soon."""

    name, path = "made", None

    def __init__(self, count=24, broken=(), unreadable=(), texts=None):
        self.count, self.broken, self.unreadable, self.texts = count, broken, unreadable, texts or {}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise BadRecord("unreadable record", "no disk")
        images = [Image(TRUNCATED if index in self.broken else PICTURES[k], None) for k in range(index % 4)]
        if index in self.broken:
            images = [Image(TRUNCATED, None)]
        text = self.texts.get(index, "1" * (1 + index % 7))
        messages = (("user", "<image>" * len(images) + text), ("assistant", f"{index}"))
        return Record(messages, tuple(images), self.name, index)


class Meeting:
    """An exchange between threads of this process."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size), [None] * size

    def of(self, rank):
        meeting = self

        class Exchange:
            def gather(self, value):
                meeting.values[rank] = value
                meeting.barrier.wait(20)
                values = list(meeting.values)
                meeting.barrier.wait(20)
                return values

            def close(self):
                pass

        return Exchange()


@pytest.fixture(scope="module")
def encoder(digits):
    shape = ImageShape(8, 4, TilingConfig(max_rows=2, max_columns=3))
    return ChatEncoder(Tokenizer.from_file(str(digits / "tokenizer.json")), shape)


@pytest.fixture(scope="module")
def start(encoder):
    """start(records of each rank, replicas=None, num_packs=4, **options of Loader): a loader a rank."""

    def make(records, replicas=None, num_packs=4, state=None, window=8, **options):
        size, num_replicas = len(records), replicas or len(records)
        meeting = Meeting(size)
        packing = Packing(LENGTH, num_packs, window, "skip", "bidirectional", 8, Cost(1.0, 0.01, 0.0, 9.0, 1))

        def stream():
            made = SampleStream({"made": len(records[0])}, Presentation(1.0, 0.0), 3, state.log if state else [])
            made.change(0, Mix({"made": 1}))
            return made

        places = [Place(rank, size, rank * num_replicas // size, num_replicas) for rank in range(size)]
        return [
            Loader(stream(), Reader({"made": one}, encoder), packing, place, meeting.of(place.rank), state, **options)
            for one, place in zip(records, places, strict=True)
        ]

    return make


def _close(loaders):
    threads = [threading.Thread(target=loader.close) for loader in loaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(loader.thread.is_alive() for loader in loaders)


def _whole(batches):
    """What all replicas train on in one step, as a set of documents, and everything that is said of it."""
    documents = set()
    for batch in batches:
        for one in batch.packs:
            starts = (one.positions == 0).nonzero().flatten().tolist()
            for low in starts:
                rows = (one.kv_start == low).nonzero().flatten().tolist()
                if rows:
                    documents.add(tuple(one.tokens[rows].tolist()))
    first = batches[0]
    said = first.loss_tokens, first.tokens, first.documents, first.samples, first.fill, first.skipped, first.state
    for batch in batches[1:]:
        assert said == (batch.loss_tokens, batch.tokens, batch.documents, batch.samples, batch.fill, batch.skipped, batch.state)
    return documents, said, sum(int((one.labels >= 0).sum()) for batch in batches for one in batch.packs)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    prefetch=st.integers(1, 3),
    broken=st.sets(st.integers(0, 23), max_size=5),
    unreadable=st.sets(st.integers(0, 23), max_size=5),
    taken=st.integers(1, 4),
)
def test_any_number_of_ranks_and_steps_ahead_makes_the_same_steps(start, size, prefetch, broken, unreadable, taken):
    records = Records(broken=broken, unreadable=unreadable)
    (alone,) = start([records])
    together = start([records] * size, prefetch=prefetch)
    for _ in range(taken):
        batches = [next(loader) for loader in together]
        documents, said, targets = _whole(batches)
        assert (documents, said, targets) == _whole([next(alone)])
        assert said[0] == targets
        assert {sample.record for sample in said[3]}.isdisjoint(unreadable | broken)
        causes = {s.record: s.cause for s in said[5]}
        assert all(causes[record] == "unreadable record" for record in causes.keys() & unreadable)
        assert all(causes[record] == "corrupt image" for record in causes.keys() & (broken - unreadable))
    (resumed,) = start([records], state=PackerState(**json.loads(json.dumps(asdict(batches[0].state)))))
    assert _whole([next(resumed)]) == _whole([next(alone)])
    _close([alone, resumed, *together])


def test_ranks_of_one_replica_have_the_same_packs(start):
    loaders = start([Records()] * 4, replicas=2)
    for _ in range(3):
        batches = [next(loader) for loader in loaders]
        for one, other in ((0, 1), (2, 3)):
            for a, b in zip(batches[one].packs, batches[other].packs, strict=True):
                assert torch.equal(a.tokens, b.tokens)
                assert torch.equal(a.tiles, b.tiles)
        assert not torch.equal(batches[0].packs[0].tokens, batches[2].packs[0].tokens)
    _close(loaders)


def _errors(loaders, steps=200):
    """What each rank raises in the end, and at which step."""
    raised = {}

    def run(rank, loader):
        for step in range(steps):
            try:
                next(loader)
            except Exception as error:
                raised[rank] = step, error
                return

    threads = [threading.Thread(target=run, args=item) for item in enumerate(loaders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    _close(loaders)
    return [raised[rank] for rank in range(len(loaders))]


@pytest.mark.parametrize("size", [2, 3])
def test_what_one_rank_alone_cannot_read_ends_all_of_them(start, size):
    others = [Records()] * (size - 1)
    found = _errors(start([*others, Records(unreadable=(5,))], num_packs=2 * size))
    assert len({(step, str(error)) for step, error in found}) == 1
    _, error = found[0]
    assert isinstance(error, UserError)
    assert "the ranks read different data: record 5 of source 'made' is read (tokens: " in str(error)
    assert f"skipped for 'unreadable record' (no disk) on rank {size - 1}; give every machine the same files" in str(error)


def test_what_one_rank_reads_otherwise_ends_all_of_them(start):
    # Either rank may be the one that measures it; the one that builds it sees that it differs. Both are tried.
    found = _errors(start([Records(texts=dict.fromkeys(range(24), "2")), Records()]))
    assert len({(step, str(error)) for step, error in found}) == 1
    assert "where it was measured and read (tokens: " in str(found[0][1])


def test_an_image_that_one_rank_of_a_replica_alone_decodes_ends_all_of_them(start, monkeypatch):
    of_another_version = []

    def decode(image, grid, side, limits):
        if threading.current_thread() in of_another_version:
            raise BadRecord("corrupt image", "of another version")
        return decode_tiles(image, grid, side, limits)

    monkeypatch.setattr(chat, "decode_tiles", decode)
    loaders = start([Records()] * 2, replicas=1, prefetch=1)
    of_another_version.append(loaders[1].thread)
    found = _errors(loaders)
    assert {str(error) for _, error in found} == {str(found[0][1])}
    assert "rank 1 has decoded other images than the ranks that share its packs" in str(found[0][1])


class Failing(Records):
    def __getitem__(self, index):
        raise KeyError("a fault of the code")


def test_a_fault_of_one_rank_is_heard_by_all(start):
    found = _errors(start([Records(), Failing()]))
    assert {str(error) for _, error in found} == {"reading data failed on rank 1: KeyError: 'a fault of the code'"}


def test_a_rank_that_stops_ends_the_threads_of_the_others(start):
    loaders = start([Records()] * 3, num_packs=3, prefetch=2)
    next(loaders[0])
    closing = threading.Thread(target=loaders[0].close)
    closing.start()
    with pytest.raises(UserError, match="another rank has ended"):
        list(loaders[1])
    _close(loaders[1:])
    closing.join(30)
    assert not loaders[0].thread.is_alive()


@pytest.mark.slow
def test_a_source_without_a_usable_record_ends_all_alike(start):
    found = _errors(start([Records(unreadable=range(24))] * 2))
    assert len({str(error) for _, error in found}) == 1
    assert "no usable record" in str(found[0][1])


@pytest.fixture
def parquet(tmp_path):
    """A source on disk whose images are files."""
    rows = []
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(PICTURES[i % 3])
        messages = [{"role": "user", "content": "<image>" + "1" * (i % 7)}, {"role": "assistant", "content": str(i)}]
        rows.append({"messages": messages, "images": [f"{i}.png"]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet", row_group_size=16)
    return tmp_path


@pytest.mark.slow
def test_workers_make_the_same_steps_and_end_with_the_loader(start, parquet):
    sources = open_sources({"made": parquet / "made.parquet"})["made"]
    (here,), (there,) = start([sources]), start([sources], num_workers=2, prefetch=3)
    for _ in range(12):
        ours, theirs = next(here), next(there)
        assert _whole([ours]) == _whole([theirs])
        for a, b in zip(ours.packs, theirs.packs, strict=True):
            assert torch.equal(a.tiles, b.tiles)
    processes = list(there.workers.pool._processes.values())
    assert len(processes) == 2
    _close([here])
    _close([there])
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
def test_a_source_that_vanishes_in_mid_run_ends_it_by_name(start, parquet):
    sources = open_sources({"made": parquet / "made.parquet"})["made"]
    (loader,) = start([sources], num_workers=1)
    next(loader)
    for picture in parquet.glob("*.png"):
        picture.unlink()
    ((_, error),) = _errors([loader])
    assert "missing image" in str(error)
    assert "made" in str(error) or "no usable record" in str(error)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_with_what_to_do(start, parquet):
    sources = open_sources({"made": parquet / "made.parquet"})["made"]
    (loader,) = start([sources], num_workers=2)
    next(loader)
    os.kill(next(iter(loader.workers.pool._processes)), signal.SIGKILL)
    ((_, error),) = _errors([loader])
    assert isinstance(error, UserError)
    assert "a worker process that reads data died" in str(error)
    assert "data.workers" in str(error)
