"""A student with a teacher on the same mesh learns what it learns in one process, from plain logits."""

import math

import pytest

pytestmark = pytest.mark.slow

EXACT = 1e-10
ROWS = [
    (1, {}, "", "cosine"),
    (1, {}, "untied", "mse"),
    (2, {"fsdp": 2}, "", "mse"),
    (2, {"tp": 2}, "", "cosine"),
    (2, {"tp": 2}, "untied", "mse"),
    (2, {"cp": 2}, "", "cosine"),
    (2, {"pp": 2}, "", "cosine"),
    (4, {"dp": 2, "fsdp": 2, "checkpointing": "full"}, "", "cosine"),
    (4, {"fsdp": 2, "tp": 2}, "untied", "cosine"),
    (4, {"cp": 2, "tp": 2}, "", "mse"),
    (4, {"pp": 2, "tp": 2}, "", "cosine"),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble"}, "untied", "cosine"),
    (4, {"pp": 2, "cp": 2, "schedule": "interleaved"}, "", "mse"),
]


@pytest.fixture(scope="module")
def plain(workers):
    """plain(variant, distance): what one process finds with plain models."""
    found = {}

    def get(variant, distance):
        if (variant, distance) not in found:
            found[variant, distance] = workers.distill(0, {}, variant, distance)
        return found[variant, distance]

    return get


def largest_error(got, want, error):
    assert got.keys() == want.keys()
    floor = 1e-3 * math.sqrt(sum(w.square().sum().item() for w in want.values()) / sum(w.numel() for w in want.values()))
    return max((error(got[name], tensor, floor), name) for name, tensor in want.items())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join([*(f"{k}{v}" for k, v in row[1].items()), row[2], row[3]]))
def test_layout(row, workers, plain, error):
    size, parallel, variant, distance = row
    got, want = workers.distill(size, parallel, variant, distance), plain(variant, distance)
    assert got["loss"] == pytest.approx(want["loss"], rel=EXACT)
    assert got["evaluated"] == pytest.approx(want["evaluated"], rel=EXACT)  # the likelihood alone
    assert abs(want["evaluated"] - want["loss"][0]) > 0.01
    assert largest_error(got["gradients"], want["gradients"], error)[0] < EXACT
    assert largest_error(got["parameters"], want["parameters"], error)[0] < EXACT
