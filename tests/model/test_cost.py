"""The cost function counts what torch counts, and what is cut by it comes out even."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from smalt.kernels import backend
from smalt.model.cost import Cost, Workload, deal_chunks, model_cost, split_blocks


def test_flops_are_those_that_torch_counts(make_model, make_document, make_pack):
    # The definition multiplies every row with every key, and every logit is formed: a pack of one image, all of which sees all.
    model = make_model(vocabulary=24)
    document = make_document([("image", 2)])
    batch = make_pack([document])
    batch = type(batch)(**{**batch.__dict__, "labels": batch.tokens})
    with backend("reference"), FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    tokens, tiles = len(document), len(document.tiles)
    cost = model_cost(model.config)
    grid = model.config.vision.grid**2
    # In the reference the tower's attention is of all tiles with all.
    beyond = 3 * 4 * model.config.vision.width * (tiles**2 - tiles) * grid**2 * model.config.vision.num_layers
    # No gradient of the pixels is formed.
    pixels = 2 * tiles * grid * 3 * model.config.vision.patch**2 * model.config.vision.width
    assert counter.get_total_flops() == cost(Workload(tokens, tokens**2, tiles)) + beyond - pixels


def brute_force(cost, work, parts):
    best = np.inf
    for borders in itertools.combinations(range(1, cost.num_blocks), parts - 1):
        counts = np.diff([0, *borders, cost.num_blocks])
        sums = counts * cost.block(work)
        sums[0] += cost.tile * work.tiles
        sums[-1] += cost.head * work.tokens
        best = min(best, sums.max())
    return best


@given(st.integers(1, 9), st.integers(1, 4), st.floats(0, 20), st.floats(0, 20))
def test_the_dearest_pipeline_stage_is_as_cheap_as_can_be(blocks, parts, tile, head):
    cost, work = Cost(token=1.0, pair=0.0, head=head, tile=tile, num_blocks=blocks), Workload(1, 0, 1)
    if parts > blocks:
        with pytest.raises(ValueError, match="use fewer stages"):
            split_blocks(cost, work, parts)
        return
    ranges = split_blocks(cost, work, parts)
    assert [i for r in ranges for i in r] == list(range(blocks))
    sums = np.array([len(r) * 1.0 for r in ranges])
    sums[0] += tile
    sums[-1] += head
    assert sums.max() == pytest.approx(brute_force(cost, work, parts))


def test_a_dear_tower_leaves_its_stage_few_blocks():
    cost = Cost(token=1.0, pair=0.0, head=0.0, tile=6.0, num_blocks=12)
    first, *rest = [len(r) for r in split_blocks(cost, Workload(1, 0, 1), 3)]
    assert first == 1
    assert sorted(rest) == [5, 6]
    assert [len(r) for r in split_blocks(cost, Workload(1, 0, 0), 3)] == [4, 4, 4]


@given(st.lists(st.integers(0, 1000), min_size=0, max_size=8), st.integers(1, 4))
def test_every_chunk_is_dealt_once(costs, ranks):
    costs = np.array(costs * ranks)
    dealt = deal_chunks(costs, ranks)
    assert sorted(dealt.flatten()) == list(range(len(costs)))
    assert (np.diff(dealt) > 0).all()


def test_chunks_that_do_not_divide():
    with pytest.raises(ValueError, match="5 chunks do not divide over 2 ranks"):
        deal_chunks(np.ones(5), 2)


def test_coefficients_of_the_large_model():
    # 6 FLOPs a parameter and token: 2.9B parameters, of which the tower sees 729 patches a tile.
    from smalt.model import PRESETS, build_model, count_parameters

    config = PRESETS["bluelm_3b"]
    counts, cost = count_parameters(build_model(config, 0, "meta")), model_cost(config)
    assert cost.token * cost.num_blocks + cost.head == pytest.approx(6 * counts["language"], rel=0.001)
    assert cost.tile == pytest.approx(6 * counts["vision"] * 729, rel=0.12)
