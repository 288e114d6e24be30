"""The packer: nothing lost, nothing twice, nothing starves, and a resumed packer makes the packs of one that was never stopped."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.engine.data.chat import Draft
from smalt.engine.data.loader import Packing
from smalt.engine.data.packing import BAD_IN_A_ROW, POOL, PackerState, cut_rows
from smalt.engine.data.reading import SkippedSample, measure
from smalt.engine.data.records import Image
from smalt.engine.errors import BadRecord
from smalt.model import Document, pack
from smalt.model.cost import Cost
from smalt.model.tiling import Grid

LENGTH = 32


def _draft(segments, record=0):
    """segments: (text tokens, image rows) in turn. Tokens are 1000 x record + position; image i is the byte i."""
    spans, at = [], 0
    for text, rows in segments:
        at += text
        if rows:
            spans.append((at, at + rows))
            at += rows
    targets = np.ones(at, bool)
    for low, high in spans:
        targets[low:high] = False
    document = Document(
        tokens=1000 * record + np.arange(at),
        targets=targets,
        image_index=np.concatenate([np.arange(low, high) for low, high in spans] or [np.zeros(0, np.int64)]),
        tiles=np.zeros((0, 3, 2, 2), np.uint8),
        spans=np.array(spans, np.int64).reshape(-1, 2),
        source="source",
        record=record,
    )
    return Draft(document, tuple(Image(bytes([i]), None) for i in range(len(spans))), (Grid(1, 1),) * len(spans))


def _reader(lengths):
    """An endless stream that repeats the lengths; 0 is a bad record."""

    def read(sample):
        length = lengths[sample % len(lengths)]
        return _draft([(length, 0)], sample) if length else SkippedSample("source", sample, "bad", "as asked")

    return read


def _packing(num_packs=2, window=8, long_documents="skip", length=LENGTH):
    return Packing(length, num_packs, window, long_documents, "causal", 2, Cost(1.0, 0.1, 0.0, 5.0, 1))


def _planner(read, packing, state=None):
    def measured(samples):
        found = map(read, samples)
        return [measure(one) if isinstance(one, Draft) else one for one in found]

    return packing.packer(measured, state)


def _packer(lengths, num_packs=2, window=8, long_documents="skip", state=None):
    return _planner(_reader(lengths), _packing(num_packs, window, long_documents), state)


def _split(draft, length):
    return [draft.piece(low, high) for low, high in cut_rows(measure(draft), length, 0, len(draft.document))]


def _learned(document):
    return document.tokens[1:][document.targets[1:]].tolist()


def _documents(plan, read):
    """What each pack of a plan holds, built."""
    return [[read(piece.sample).piece(piece.low, piece.high).document for piece in pack] for pack in plan.packs]


def _shown(plan):
    """A step in numbers: what each pack holds, what was skipped, the state after it."""
    return [[(p.sample, p.low, p.high) for p in one] for one in plan.packs], [s.record for s in plan.skipped], asdict(plan.state)


STREAMS = {
    "lengths": st.lists(st.integers(1, LENGTH), min_size=1, max_size=30),
    "num_packs": st.integers(1, 4),
    "window": st.integers(1, 40),
}
MIXED = {**STREAMS, "lengths": st.lists(st.sampled_from([0, 0, 1, 3, 9, 20, 32, 33, 70]), min_size=1, max_size=20).filter(any)}


@pytest.mark.slow
@settings(max_examples=60)
@given(**STREAMS)
def test_every_sample_is_packed_exactly_once_or_still_waits(lengths, num_packs, window):
    packer = _packer(lengths, num_packs, window)
    packed = []
    for _ in range(12):
        plan = packer.next()
        assert len(plan.packs) == num_packs
        assert plan.skipped == []
        for pieces in plan.packs:
            assert 1 <= sum(map(len, pieces)) <= LENGTH
            packed += [piece.sample for piece in pieces]
    waiting = [sample for sample, *_ in plan.state.carried]
    assert sorted(packed + waiting) == list(range(plan.state.cursor))


@pytest.mark.slow
@settings(max_examples=60)
@given(**STREAMS)
def test_no_sample_waits_longer_than_those_before_it_need(lengths, num_packs, window):
    packer, ahead = _packer(lengths, num_packs, window), []
    for _ in range(12):
        plan = packer.next()
        packed = {piece.sample for pieces in plan.packs for piece in pieces}
        # The oldest that waited is gone, so a sample with n before it is packed within n + 1 steps.
        assert packed.issuperset(ahead[:1])
        ahead = [sample for sample, *_ in plan.state.carried]
        assert ahead == sorted(ahead)


@pytest.mark.slow
@settings(max_examples=60)
@given(**MIXED, long_documents=st.sampled_from(["skip", "split"]), stop=st.integers(0, 6))
def test_a_resumed_packer_goes_on_as_if_never_stopped(lengths, num_packs, window, long_documents, stop):
    if long_documents == "skip" and max(n for n in lengths if n) > LENGTH:
        lengths = [*lengths, 5]
    whole = _packer(lengths, num_packs, window, long_documents)
    state = PackerState()
    for _ in range(stop):
        state = whole.next().state
    resumed = _packer(lengths, num_packs, window, long_documents, PackerState(**json.loads(json.dumps(asdict(state)))))
    for _ in range(4):
        assert _shown(resumed.next()) == _shown(whole.next())


@pytest.mark.slow
@settings(max_examples=60)
@given(**MIXED)
def test_what_cannot_be_packed_is_reported_exactly_once(lengths, num_packs, window):
    packer = _packer([*lengths, 5], num_packs, window)
    lengths = [*lengths, 5]
    reported = Counter()
    for _ in range(8):
        plan = packer.next()
        reported.update((s.record, s.cause) for s in plan.skipped)
    expected = {
        (i, "bad" if lengths[i % len(lengths)] == 0 else "longer than a pack")
        for i in range(plan.state.cursor)
        if not 0 < lengths[i % len(lengths)] <= LENGTH
    }
    assert reported == Counter(expected)


def test_a_long_document_is_skipped_with_its_length_and_what_to_do():
    plan = _packer([40, 5], 1, 2).next()
    assert {(s.source, s.cause) for s in plan.skipped} == {("source", "longer than a pack")}
    assert "40 tokens do not fit in a pack of 32" in plan.skipped[0].detail
    assert "data.long_documents" in plan.skipped[0].detail


@pytest.mark.parametrize("window", [1, 7, 300])
def test_a_stream_without_a_usable_record_ends_with_the_causes(window):
    with pytest.raises(BadRecord, match=r"no usable record.*in a row.*x bad.*x longer than a pack|x longer than a pack.*x bad"):
        _packer([0, 0, 99], 1, window).next()


def test_a_long_run_of_bad_records_is_not_the_end():
    plan = _packer([0] * (BAD_IN_A_ROW - 1) + [LENGTH], 1, 1).next()
    assert len(plan.packs[0]) == 1
    assert len(plan.skipped) == POOL * (BAD_IN_A_ROW - 1)


def test_a_carried_document_that_can_no_longer_be_read_is_reported():
    state = _packer([20, 20], 1, 4).next().state
    lost = [sample for sample, *_ in state.carried]
    resumed = _planner(lambda s: _reader([0 if s in lost else 20])(s), _packing(1, 4), state)
    assert [s.record for s in resumed.next().skipped] == lost


@pytest.mark.parametrize("seed", range(3))
def test_packs_are_full(seed):
    """Lengths of the digits: short questions, and thoughts up to six times as long."""
    lengths = np.random.default_rng(seed).choice([18, 22, 26, 30, 35, 41, 48, 56], 500).tolist()
    packer = _planner(_reader(lengths), _packing(2, 256, length=1024))
    fills = [sum(len(d) for p in packer.next().packs for d in p) / 2048 for _ in range(40)]
    assert min(fills) > 0.97
    assert np.mean(fills) > 0.99


@settings(max_examples=150)
@given(
    texts=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    rows=st.sampled_from([4, 9, 15]),
    end=st.integers(1, 20),
    length=st.integers(8, 40),
)
def test_pieces_keep_every_target_once_and_every_image_whole(texts, rows, end, length):
    segments = [(1, 0), *((text, rows) for text in texts), (end, 0)]
    draft = _draft(segments)
    document = draft.document
    spans = [tuple(range(low, high)) for low, high in document.spans]
    if rows > length:
        with pytest.raises(BadRecord, match="longer than a pack"):
            _split(draft, length)
        return
    learned, seen, images, rows_of_images = [], [], [], []
    for piece in _split(draft, length):
        d = piece.document
        assert 1 <= len(d) <= length
        assert not d.targets[0]
        assert (np.diff(d.tokens) == 1).all()
        learned += _learned(d)
        seen += d.tokens.tolist()
        found = [tuple(d.tokens[low:high].tolist()) for low, high in d.spans]
        assert d.tokens[d.image_index].tolist() == [row for span in found for row in span]
        rows_of_images += found
        images += [image.data[0] for image in piece.images]
        assert len(piece.grids) == len(piece.images) == len(found)
        pack([d], length, tile=2)
    assert sorted(set(seen)) == document.tokens.tolist()
    assert rows_of_images == spans
    assert images == list(range(len(spans)))
    # Where an image fills a pack alone the token after it is lost; nowhere else.
    lost = {span[-1] + 1 for span in spans} if rows == length else set()
    whole = _learned(document)
    assert [t for t in learned if t not in lost] == [t for t in whole if t not in lost]


@pytest.mark.parametrize("rows", [LENGTH - 1, LENGTH])
def test_an_image_as_long_as_a_pack_still_fits(rows):
    pieces = _split(_draft([(1, rows), (40, 0)]), LENGTH)
    assert sum(piece.num_tiles for piece in pieces) == 1


def test_an_image_longer_than_a_pack_costs_the_record():
    long = _draft([(5, LENGTH + 1), (5, 0)], 0)
    packer = _planner(lambda i: long if i % 2 else _draft([(5, 0)], i), _packing(1, 4, "split"))
    plan = packer.next()
    assert {s.cause for s in plan.skipped} == {"longer than a pack"}
    assert "an image of the document does not fit" in plan.skipped[0].detail
    assert {piece.sample % 2 for pieces in plan.packs for piece in pieces} == {0}


@settings(max_examples=40)
@given(**{**STREAMS, "lengths": st.lists(st.integers(1, 5 * LENGTH), min_size=1, max_size=20)})
def test_split_documents_lose_no_target_in_packs(lengths, num_packs, window):
    packer, read, learned = _packer(lengths, num_packs, window, "split"), _reader(lengths), Counter()
    for _ in range(8):
        plan = packer.next()
        for documents in _documents(plan, read):
            assert sum(map(len, documents)) <= LENGTH
            learned.update(t for d in documents for t in _learned(d))
    for sample, low, high, _ in plan.state.carried:
        learned.update(_learned(read(sample).piece(low, high).document))
    expected = [t for i in range(plan.state.cursor) for t in read(i).document.tokens[1:].tolist()]
    assert learned == Counter(expected)


@pytest.mark.slow
@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 5 * LENGTH), min_size=1, max_size=12),
    images=st.booleans(),
    first=st.sampled_from([LENGTH, 2 * LENGTH, 4 * LENGTH]),
    then=st.sampled_from([16, LENGTH, 2 * LENGTH, 3 * LENGTH]),
    again=st.sampled_from([16, LENGTH, 4 * LENGTH]),
)
def test_split_documents_lose_no_target_when_sequence_length_changes(lengths, images, first, then, again):
    def read(sample):
        length = lengths[sample % len(lengths)]
        return _draft([(1, 0), (length, 9 if images and sample % 2 else 0), (5, 0)], sample)

    learned, state = Counter(), None
    for length in (first, then, again):
        packer = _planner(read, _packing(2, 4, "split", length), state)
        for _ in range(3):
            plan = packer.next()
            assert not plan.skipped
            for d in (d for documents in _documents(plan, read) for d in documents):
                assert len(d) <= length
                learned.update(_learned(d))
        state = PackerState(**json.loads(json.dumps(asdict(plan.state))))
    for sample, low, high, _ in state.carried:
        learned.update(_learned(read(sample).piece(low, high).document))
    assert learned == Counter(t for i in range(state.cursor) for t in _learned(read(i).document))


def test_a_piece_of_a_document_that_has_changed_is_reported_and_a_whole_one_is_taken_as_it_is():
    state = PackerState(4, [(0, 31, 62, 70), (1, 0, 20, 20)])
    plan = _packer([60, 25], 1, 1, "split", state).next()
    (skipped,) = plan.skipped
    assert (skipped.record, skipped.cause) == (0, "changed since the checkpoint")
    assert skipped.detail == "rows 31 to 62 of 70 were not trained on yet; the document now has 60"
    (first, *_), *_ = plan.packs
    assert (first.sample, first.low, first.high) == (1, 0, 25)
