"""Packing changes where documents lie, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

runs = st.lists(st.tuples(st.sampled_from(["text", "image"]), st.integers(1, 3)), min_size=1, max_size=3)
packs = st.lists(runs, min_size=1, max_size=5)
# Shrinking would take minutes with a model in the loop.
few = settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
ONE = [("text", 1)]
IMAGE = [("text", 2), ("image", 2), ("text", 3)]


@pytest.fixture(scope="module", params=["bidirectional", "causal"])
def model(request, make_model):
    return make_model(image_attention=request.param, init_std=0.2, qkv_bias=True, qk_norm=True)


def loss_and_gradients(model, batches):
    """Summed over batches."""
    losses = [(model(batch) * batch.loss_weight).sum() for batch in batches]
    loss = torch.stack(losses).sum()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.slow
@few
@given(shapes=packs, tail=st.sampled_from([0, 1, 35]), seed=st.integers(0, 100))
@example(shapes=[ONE, IMAGE, ONE, [("text", 40)], IMAGE], tail=3, seed=0)
@example(shapes=[ONE, [("text", 5)], ONE], tail=0, seed=0)
def test_a_pack_is_its_documents(model, make_document, make_pack, error, gradient_error, shapes, tail, seed):
    documents = [make_document(shape, seed + i) for i, shape in enumerate(shapes)]
    image_attention = model.config.image_attention
    loss, gradients = loss_and_gradients(model, [make_pack(documents, tail, image_attention)])
    alone, alone_gradients = loss_and_gradients(model, [make_pack([d], 0, image_attention) for d in documents])
    assert error(loss, alone) <= 1e-12
    assert gradient_error(gradients, alone_gradients) <= 1e-12


@few
@given(shapes=packs, data=st.data())
@example(shapes=[IMAGE, ONE, IMAGE], data=None)
def test_documents_do_not_see_each_other(model, make_document, make_pack, shapes, data):
    documents = [make_document(shape, i) for i, shape in enumerate(shapes)]
    changed = data.draw(st.integers(0, len(shapes) - 1)) if data else 0
    other = list(documents)
    other[changed] = make_document(shapes[changed], seed=77)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    mine = torch.from_numpy(owner == changed)
    with torch.no_grad():
        before, after = (model.hidden(make_pack(d, 2, model.config.image_attention))[: len(owner)] for d in (documents, other))
    change = (before - after).abs().amax(1)
    assert (change[~mine] <= 1e-12).all()
    assert (change[mine] > 1e-6).any()


def rows_that_change(model, make_pack, document, other):
    with torch.no_grad():
        before, after = (model.hidden(make_pack([d], 0, model.config.image_attention)) for d in (document, other))
    return ((before - after).abs().amax(1) > 1e-9).tolist()


def test_text_is_causal(model, make_document, make_pack):
    document = make_document([("text", 3), ("image", 1), ("text", 3)])
    tokens = document.tokens.copy()
    tokens[8] = 23 if tokens[8] != 23 else 22
    assert rows_that_change(model, make_pack, document, replace(document, tokens=tokens)) == [False] * 8 + [True] * 2


def test_an_image_is_seen_from(model, make_document, make_pack):
    # Rows 0, 1 are text, 2..5 and 6..9 the two tiles of one image, 10 text. The second tile changes.
    document = make_document([("text", 2), ("image", 2), ("text", 1)])
    tiles = document.tiles.copy()
    tiles[1] += 1
    first = 2 if model.config.image_attention == "bidirectional" else 6
    assert rows_that_change(model, make_pack, document, replace(document, tiles=tiles)) == [False] * first + [True] * (11 - first)


def test_image_rows_ignore_their_token_ids(model, make_document, make_pack):
    document = make_document(IMAGE)
    tokens = document.tokens.copy()
    tokens[document.image_index] = 1
    assert not any(rows_that_change(model, make_pack, document, replace(document, tokens=tokens)))


def test_labels_and_weights_decide_the_loss(model, make_document, make_pack, error):
    document = make_document(IMAGE, seed=3)
    batch = make_pack([document], 2, model.config.image_attention)
    nll = model(batch).detach()
    log_probs = (model.hidden(batch) @ model.language.head_weight.T).log_softmax(-1).detach()
    for row in range(len(document) + 2):
        wanted = row + 1 < len(document) and document.targets[row + 1]
        want = -log_probs[row, document.tokens[row + 1]] if wanted else torch.tensor(0.0)
        assert error(nll[row], want) <= 1e-12


def test_a_pack_without_images_reaches_the_tower(model, make_document, make_pack):
    # On a mesh, a parameter without a gradient on one rank would hang the others.
    batch = make_pack([make_document([("text", 5)])], 1, model.config.image_attention)
    _, gradients = loss_and_gradients(model, [batch])
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        if name.startswith("language"):
            assert gradient.abs().max() > 0, name
        else:
            assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_image_rows_must_fit_the_tiles(model, make_document, make_pack):
    batch = make_pack([make_document(IMAGE)])
    with pytest.raises(ValueError, match="7 image rows for 2 tiles; the tiles make 8 tokens"):
        model(replace(batch, image_index=batch.image_index[1:]))
    with pytest.raises(ValueError, match="8 image rows for 0 tiles"):
        model(replace(batch, tiles=batch.tiles[:0]))
