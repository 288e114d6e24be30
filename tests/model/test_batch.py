"""pack() and intervals(): what every reader of a batch relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalt.kernels import IGNORE
from smalt.model import pack
from smalt.model.batch import intervals

runs = st.lists(st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 3)), max_size=4)


@given(shapes=st.lists(runs, max_size=5), tail=st.integers(0, 5), image_attention=st.sampled_from(["bidirectional", "causal"]))
def test_invariants(make_document, shapes, tail, image_attention):
    documents = [make_document(shape, seed) for seed, shape in enumerate(shapes)]
    total = sum(map(len, documents))
    batch = pack(documents, total + tail, image_attention, tile=6)
    kv_start, kv_end = batch.kv_start.numpy(), batch.kv_end.numpy()
    assert (np.diff(kv_start) >= 0).all()
    assert (np.diff(kv_end) >= 0).all()
    assert int((batch.kv_end > batch.kv_start).sum()) == total
    assert (kv_start[total:] == total + tail).all()
    assert (kv_end[total:] == total + tail).all()
    assert (batch.labels[total:] == IGNORE).all()

    labels, image_rows, at = [], [], 0
    for document in documents:
        n = len(document)
        rows = np.arange(n)
        image = np.full(n, -1)
        for i, (low, high) in enumerate(document.spans):
            image[low:high] = i
        # The definition of what a row sees, from DESIGN: its document, causally, and all of its own image.
        sees = rows[None, :] <= rows[:, None]
        if image_attention == "bidirectional":
            sees |= (image[:, None] == image[None, :]) & (image[:, None] >= 0)
        keys = np.arange(total + tail)
        seen = (keys >= kv_start[at : at + n, None]) & (keys < kv_end[at : at + n, None])
        assert np.array_equal(seen[:, at : at + n], sees)
        assert seen.sum() == sees.sum()
        assert np.array_equal(batch.positions[at : at + n].numpy(), rows)
        assert np.array_equal(batch.tokens[at : at + n].numpy(), document.tokens)
        labels += [document.tokens[i] if document.targets[i] else IGNORE for i in range(1, n)] + [IGNORE] * (n > 0)
        image_rows += [at + i for i in rows if image[i] >= 0]
        at += n
    assert batch.labels.tolist() == labels + [IGNORE] * tail
    assert torch.equal(batch.loss_weight, (batch.labels != IGNORE).float())
    assert batch.image_index.tolist() == image_rows
    assert np.array_equal(batch.tiles.numpy(), np.concatenate([d.tiles for d in documents] or [np.zeros((0, 3, 6, 6))]))


def test_types(make_document):
    batch = pack([make_document([("text", 1), ("image", 1)])], 8)
    integers = {name: getattr(batch, name).dtype for name in ("tokens", "labels", "image_index")}
    assert set(integers.values()) == {torch.int64}
    assert {getattr(batch, name).dtype for name in ("positions", "kv_start", "kv_end")} == {torch.int32}
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.tiles.dtype == torch.bfloat16
    assert moved.loss_weight.dtype == torch.float32


def test_intervals_of_an_image():
    spans = np.array([[1, 4]])
    start, end = intervals(5, spans, "bidirectional")
    assert (start.tolist(), end.tolist()) == ([0] * 5, [1, 4, 4, 4, 5])
    start, end = intervals(5, spans, "causal")
    assert (start.tolist(), end.tolist()) == ([0] * 5, [1, 2, 3, 4, 5])


def test_too_many_tokens(make_document):
    documents = [make_document([("text", 3)]), make_document([("text", 4)])]
    assert int((pack(documents, 7).kv_start < 7).sum()) == 7
    with pytest.raises(ValueError, match="2 documents hold 7 tokens, the pack only 6"):
        pack(documents, 6)
