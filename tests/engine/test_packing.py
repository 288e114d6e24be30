"""The packer: nothing lost, nothing twice, nothing starves, and a resumed packer makes the packs of one that was never stopped."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.engine.data.loader import Loader
from smalt.engine.data.packing import BAD_IN_A_ROW, Packer, PackerState, cut_rows, piece_of
from smalt.engine.data.stream import SkippedSample
from smalt.engine.errors import BadRecord
from smalt.model import Document, pack

LENGTH = 32


def _document(segments, record=0):
    """segments: (text tokens, image rows) in turn. Tokens are 1000 x record + position; tile i is filled with i + 1."""
    spans, at = [], 0
    for text, rows in segments:
        at += text
        if rows:
            spans.append((at, at + rows))
            at += rows
    targets = np.ones(at, bool)
    for low, high in spans:
        targets[low : high + 1] = False  # the template has no target in or right after an image
    return Document(
        tokens=1000 * record + np.arange(at),
        targets=targets,
        image_index=np.concatenate([np.arange(low, high) for low, high in spans] or [np.zeros(0, np.int64)]),
        tiles=np.ones((len(spans), 3, 2, 2), np.float32) * np.arange(1, len(spans) + 1)[:, None, None, None],
        spans=np.array(spans, np.int64).reshape(-1, 2),
        source="source",
        record=record,
    )


def _reader(lengths):
    """An endless stream that repeats the lengths; 0 is a bad record."""

    def read(sample):
        length = lengths[sample % len(lengths)]
        return _document([(length, 0)], sample) if length else SkippedSample("source", sample, "bad", "as asked")

    return read


def _packer(lengths, num_packs=2, window=8, long_documents="skip", state=None):
    return Packer(_reader(lengths), LENGTH, num_packs, window, long_documents, state)


def _split(document, length):
    return [piece_of(document, low, high) for low, high in cut_rows(document, length, 0, len(document))]


def _shown(plan):
    """A step in numbers: what each pack holds, what was skipped, the state after it."""
    return [[d.tokens.tolist() for d in p] for p in plan.packs], [s.record for s in plan.skipped], asdict(plan.state)


STREAMS = {
    "lengths": st.lists(st.integers(1, LENGTH), min_size=1, max_size=30),
    "num_packs": st.integers(1, 4),
    "window": st.integers(1, 40),
}
MIXED = {**STREAMS, "lengths": st.lists(st.sampled_from([0, 0, 1, 3, 9, 20, 32, 33, 70]), min_size=1, max_size=20).filter(any)}


@settings(max_examples=60)
@given(**STREAMS)
def test_every_sample_is_packed_exactly_once_or_still_waits(lengths, num_packs, window):
    packer = _packer(lengths, num_packs, window)
    packed = []
    for _ in range(12):
        plan = packer.next()
        assert len(plan.packs) == num_packs
        assert plan.skipped == []
        for documents in plan.packs:
            assert 1 <= sum(map(len, documents)) <= LENGTH
            packed += [d.record for d in documents]
    waiting = [sample for sample, *_ in plan.state.carried]
    assert sorted(packed + waiting) == list(range(plan.state.cursor))


@settings(max_examples=60)
@given(**STREAMS)
def test_no_sample_waits_longer_than_those_before_it_need(lengths, num_packs, window):
    packer, ahead = _packer(lengths, num_packs, window), []
    for _ in range(12):
        plan = packer.next()
        packed = {d.record for documents in plan.packs for d in documents}
        # The num_packs oldest that waited are gone, so a sample with n before it is packed within n / num_packs + 1 steps.
        assert packed.issuperset(ahead[:num_packs])
        ahead = [sample for sample, *_ in plan.state.carried]
        assert ahead == sorted(ahead)


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
    assert len(plan.skipped) == 2 * (BAD_IN_A_ROW - 1)


def test_a_carried_document_that_can_no_longer_be_read_is_reported():
    state = _packer([20, 20], 1, 4).next().state
    lost = [sample for sample, *_ in state.carried]
    resumed = Packer(lambda s: _reader([0 if s in lost else 20])(s), LENGTH, 1, 4, "skip", state)
    assert [s.record for s in resumed.next().skipped] == lost


@pytest.mark.parametrize("seed", range(3))
def test_packs_are_full(seed):
    """Lengths of the digits: short questions, and thoughts up to six times as long."""
    lengths = np.random.default_rng(seed).choice([18, 22, 26, 30, 35, 41, 48, 56], 500).tolist()
    packer = Packer(_reader(lengths), 1024, 2, 256, "skip")
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
    document = _document(segments)
    rows_of = {tuple(range(low, high)): i + 1 for i, (low, high) in enumerate(document.spans)}
    if rows > length:
        with pytest.raises(BadRecord, match="longer than a pack"):
            _split(document, length)
        return
    pieces = _split(document, length)
    learned, seen, images = [], [], []
    for piece in pieces:
        assert 1 <= len(piece) <= length
        assert not piece.targets[0]
        assert (np.diff(piece.tokens) == 1).all()
        learned += piece.tokens[1:][piece.targets[1:]].tolist()
        seen += piece.tokens.tolist()
        spans = [tuple(piece.tokens[low:high].tolist()) for low, high in piece.spans]
        assert piece.tiles[:, 0, 0, 0].tolist() == [rows_of[span] for span in spans]
        assert piece.tokens[piece.image_index].tolist() == [row for span in spans for row in span]
        images += spans
        pack([piece], length, tile=2)
    assert learned == document.tokens[1:][document.targets[1:]].tolist()
    assert sorted(set(seen)) == document.tokens.tolist()
    assert images == list(rows_of)


@pytest.mark.parametrize("rows", [LENGTH - 1, LENGTH])
def test_an_image_as_long_as_a_pack_still_fits(rows):
    pieces = _split(_document([(1, rows), (40, 0)]), LENGTH)
    assert sum(len(piece.tiles) for piece in pieces) == 1


def test_an_image_longer_than_a_pack_costs_the_record():
    long = _document([(5, LENGTH + 1), (5, 0)], 0)
    packer = Packer(lambda i: long if i % 2 else _document([(5, 0)], i), LENGTH, 1, 4, "split")
    plan = packer.next()
    assert {s.cause for s in plan.skipped} == {"longer than a pack"}
    assert "an image of the document does not fit" in plan.skipped[0].detail
    assert {d.record % 2 for documents in plan.packs for d in documents} == {0}


@settings(max_examples=40)
@given(**{**STREAMS, "lengths": st.lists(st.integers(1, 5 * LENGTH), min_size=1, max_size=20)})
def test_split_documents_lose_no_target_in_packs(lengths, num_packs, window):
    packer = _packer(lengths, num_packs, window, "split")
    learned, waiting = Counter(), []
    for _ in range(8):
        plan = packer.next()
        for documents in plan.packs:
            assert sum(map(len, documents)) <= LENGTH
            for d in documents:
                learned.update(d.tokens[1:][d.targets[1:]].tolist())
    for sample, low, high, _ in plan.state.carried:
        waiting.append(piece_of(_reader(lengths)(sample), low, high))
    for d in waiting:
        learned.update(d.tokens[1:][d.targets[1:]].tolist())
    expected = [t for i in range(plan.state.cursor) for t in _reader(lengths)(i).tokens[1:].tolist()]
    assert learned == Counter(expected)


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
        return _document([(1, 0), (length, 9 if images and sample % 2 else 0), (5, 0)], sample)

    learned, state = Counter(), None
    for length in (first, then, again):
        packer = Packer(read, length, 2, 4, "split", state)
        for _ in range(3):
            plan = packer.next()
            assert not plan.skipped
            for d in (d for documents in plan.packs for d in documents):
                assert len(d) <= length
                learned.update(d.tokens[1:][d.targets[1:]].tolist())
        state = PackerState(**json.loads(json.dumps(asdict(plan.state))))
    for sample, low, high, _ in state.carried:
        piece = piece_of(read(sample), low, high)
        learned.update(piece.tokens[1:][piece.targets[1:]].tolist())
    documents = [read(i) for i in range(state.cursor)]
    assert learned == Counter(t for d in documents for t in d.tokens[1:][d.targets[1:]].tolist())


def test_pieces_that_version_02_counted_are_taken_up():
    packer = _packer([70, 5, 20], 1, 4, "split")
    state = packer.next().state
    numbers = {(sample, low): n for sample in range(4) for n, (low, _) in enumerate(cut_rows(_reader([70, 5, 20])(sample), 32, 0, 70))}
    old = [(sample, numbers.get((sample, low), 0)) for sample, low, *_ in state.carried]
    assert {piece for _, piece in old} == {0, 1, 2}
    resumed = _packer([70, 5, 20], 1, 4, "split", PackerState(state.cursor, old))
    assert [_shown(resumed.next()) for _ in range(3)] == [_shown(packer.next()) for _ in range(3)]


def test_a_piece_of_a_document_that_has_changed_is_reported_and_a_whole_one_is_taken_as_it_is():
    state = PackerState(4, [(0, 31, 62, 70), (1, 0, 20, 20)])
    plan = _packer([60, 25], 1, 1, "split", state).next()
    (skipped,) = plan.skipped
    assert (skipped.record, skipped.cause) == (0, "changed since the checkpoint")
    assert skipped.detail == "rows 31 to 62 of 70 were not trained on yet; the document now has 60"
    assert plan.packs[0][0].tokens.tolist() == list(range(1000, 1025))


@settings(max_examples=10, deadline=None)
@given(**MIXED, num_replicas=st.sampled_from([1, 2, 4]), prefetch=st.integers(1, 6), taken=st.integers(0, 3))
def test_loaders_of_any_number_of_replicas_and_steps_ahead_have_the_same_packs(
    lengths, num_packs, window, num_replicas, prefetch, taken
):
    num_packs, lengths = num_packs * num_replicas, [*lengths, 5]
    planner = _packer(lengths, num_packs, window)
    plans = [planner.next() for _ in range(3)]
    loaders = [Loader(_packer(lengths, num_packs, window), rank, num_replicas, "causal", 2, prefetch) for rank in range(num_replicas)]
    for plan in plans[:taken]:
        steps = [next(loader) for loader in loaders]
        dealt = [steps[number % num_replicas].packs[number // num_replicas] for number in range(num_packs)]
        for one, documents in zip(dealt, plan.packs, strict=True):
            assert torch.equal(one.tokens, pack(documents, LENGTH, "causal", 2).tokens)
        # The cursor is that of what was taken, however far ahead the loader is.
        assert [asdict(step.state) for step in steps] == [asdict(plan.state)] * num_replicas
        assert {step.loss_tokens for step in steps} == {float(sum(d.targets[1:].sum() for p in plan.packs for d in p))}
        assert len({step.account.fingerprint for step in steps}) == 1
    for loader in loaders:
        loader.close()
