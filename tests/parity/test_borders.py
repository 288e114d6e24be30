"""What one stage of a run hands to the next, and what two pipeline stages hold both, with a tied head."""

import pytest
import torch

pytestmark = pytest.mark.slow
LAYOUTS = [
    (2, {"pp": 2}),
    (4, {"pp": 2, "fsdp": 2}),
    (4, {"pp": 2, "tp": 2, "schedule": "interleaved"}),
    (4, {"pp": 4}),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: "x".join(f"{k}{v}" for k, v in layout[1].items()))
def border(request, workers):
    return request.param[1], workers.border(*request.param)


def test_blocks_move_to_where_the_next_stage_has_them(border):
    parallel, found = border
    # As many pipeline stages as blocks leave nothing to move.
    assert (found["blocks"][0] != found["blocks"][1]) == (parallel != {"pp": 4} and "schedule" not in parallel)
    assert found["trained"].keys() == found["taken_over"].keys()
    for name, tensor in found["trained"].items():
        assert torch.equal(found["taken_over"][name], tensor), name


def test_the_state_of_the_optimiser_moves_with_them(border):
    before, after, *_ = border[1]["states"]
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    assert any(key[0].startswith("optimizer.exp_avg_sq.language.blocks.") and tensor.any() for key, tensor in after.items())


def test_what_did_not_learn_before_the_border_begins_anew_after_it(border):
    before, _, frozen, last = border[1]["states"]
    language = {key for key in before if ".language." in key[0]}
    assert frozen.keys() == before.keys() - language
    assert last.keys() == before.keys()
    assert not [key for key in frozen if not torch.equal(before[key], frozen[key]) or not torch.equal(before[key], last[key])]
    assert not [key for key in language if last[key].any()]


def test_copies_of_a_tied_weight_are_rounded_alike(border):
    found = border[1]
    holders = [tied for tied in found["tied"] if tied is not None]
    first, last = holders[: len(holders) // 2], holders[len(holders) // 2 :]
    assert len(first) == len(last) > 0
    for one, other in zip(first, last, strict=True):
        assert torch.equal(one, other)


def test_gathering_the_weights_writes_into_none(border):
    assert border[1]["changed"] == []
