"""The parity matrix: every layout gives the numbers of one process.

A row: processes, axes, and what else is special. Errors of tensors are max|a - b| / max(max|b|, s) with s 1e-3 times the RMS of all
of their kind, for some true gradients are zero.
"""

import math

import pytest
import torch

pytestmark = pytest.mark.slow

EXACT = 1e-10
ROWS = [
    # Every axis alone.
    (1, {}, {}),
    (8, {"fsdp": 8}, {}),
    (2, {"dp": 2}, {}),
    (2, {"tp": 2}, {}),
    (2, {"cp": 2}, {}),
    (2, {"cp": 2, "context": "scatter"}, {}),
    (2, {"pp": 2}, {}),
    (2, {"pp": 2, "schedule": "interleaved"}, {}),
    (2, {"pp": 2, "schedule": "zero_bubble"}, {}),
    # Products.
    (4, {"dp": 2, "fsdp": 2}, {}),
    (4, {"fsdp": 2, "tp": 2}, {}),
    (4, {"fsdp": 2, "cp": 2}, {}),
    (4, {"cp": 2, "tp": 2}, {}),
    (4, {"cp": 2, "tp": 2, "context": "scatter"}, {}),  # one key and value head for two ranks
    (4, {"cp": 4, "context_chunks": 2}, {}),
    (4, {"pp": 2, "fsdp": 2}, {}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "interleaved"}, {}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble"}, {}),
    (4, {"pp": 2, "tp": 2}, {}),
    (8, {"fsdp": 2, "tp": 2, "cp": 2}, {}),
    (8, {"pp": 2, "tp": 2, "fsdp": 2}, {}),
    (8, {"pp": 2, "cp": 2, "fsdp": 2}, {}),
    (4, {"pp": 2, "cp": 2, "schedule": "zero_bubble"}, {}),
    (8, {"pp": 2, "cp": 2, "fsdp": 2, "schedule": "zero_bubble", "context": "scatter"}, {}),
    # What is computed again, and compiled.
    (2, {"fsdp": 2, "checkpointing": "full"}, {}),
    (4, {"fsdp": 2, "tp": 2, "checkpointing": "selective"}, {}),
    (4, {"pp": 2, "cp": 2, "schedule": "interleaved", "checkpointing": "full"}, {}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble", "checkpointing": "full"}, {}),
    (2, {"fsdp": 2, "reshard_after_forward": False, "prefetch": False}, {}),
    (4, {"dp": 2, "fsdp": 2, "reduce_every_pack": True}, {}),
    (4, {"pp": 2, "fsdp": 2, "reshard_after_forward": True}, {}),
    (1, {"compile": True, "checkpointing": "full"}, {}),
    (2, {"fsdp": 2, "compile": True, "memory_budget": 0.5}, {}),
    (2, {"cp": 2, "compile": True}, {}),
    (2, {"tp": 2, "compile": True, "checkpointing": "selective"}, {}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble", "compile": True, "checkpointing": "full"}, {}),
    # Other models, other data, frozen parts.
    (4, {"pp": 2, "tp": 2}, {"variant": "untied"}),
    (4, {"cp": 2, "tp": 2}, {"variant": "untied text"}),
    (4, {"pp": 2, "cp": 2}, {"variant": "yarn"}),
    (4, {"cp": 2, "tp": 2, "tiles": "replicated"}, {}),
    (4, {"fsdp": 2, "cp": 2}, {"trainable": "frozen tower"}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble"}, {"trainable": "projector only"}),
    # In fp32, whose sums differ by their order.
    (4, {"fsdp": 2, "tp": 2}, {"dtype": "float32"}),
    (4, {"pp": 2, "cp": 2}, {"dtype": "float32"}),
]
# Of fp32: a few hundred roundings of 2^-24 in a chain of products and sums. AdamW divides the gradient of a key bias, zero but for
# rounding, by its epsilon: 3 steps of 1e-2 x 1e-9 / 1e-5 are up to 1e-2 of the floor.
LIMITS = {
    "float64": {},
    "float32": {"loss": 1e-5, "evaluated": 1e-5, "norm": 1e-4, "clipped": 1e-5, "gradients": 3e-4, "parameters": 1e-2},
}


def name_of(row):
    size, parallel, special = row
    special = special if isinstance(special, dict) else {}
    axes = "x".join(f"{k}{v}" for k, v in parallel.items() if isinstance(v, int) and not isinstance(v, bool))
    rest = [str(k if v is True else v) for k, v in parallel.items() if isinstance(v, str) or v is True]
    return "-".join([axes or f"{size}-process", *rest, *special.values()]).replace(" ", "_")


def relative(got, want):
    return max(abs(g - w) / abs(w) for g, w in zip(got, want, strict=True))


def errors_by_name(got, want, error, floor=1e-3):
    """Of tensors; infinite where one side has none. floor: in units of the RMS of all."""
    assert got.keys() == want.keys()
    present = [w.double() for w in want.values() if w is not None]
    floor *= math.sqrt(sum(w.square().sum().item() for w in present) / sum(w.numel() for w in present))
    errors = {}
    for name, tensor in want.items():
        one_sided = (tensor is None) != (got[name] is None)
        errors[name] = math.inf if one_sided else 0.0 if tensor is None else error(got[name], tensor, floor)
    return errors


def largest_error(got, want, error, floor=1e-3):
    return max(errors_by_name(got, want, error, floor).items(), key=lambda item: (math.isnan(item[1]), item[1]))


def differences(got, want, error):
    figures = {key: relative(got[key], want[key]) for key in ("loss", "norm", "clipped")}
    figures["evaluated"] = relative([got["evaluated"]], [want["evaluated"]])
    return figures | {key: largest_error(got[key], want[key], error)[1] for key in ("initial", "gradients", "parameters")}


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_layout(row, workers, reference, error):
    size, parallel, special = row
    got, want = workers.run(size, parallel, **special), reference(**special)
    assert min(want["norm"]) > 0.5, "nothing would be clipped"
    found, limits = differences(got, want, error), LIMITS[special.get("dtype", "float64")]
    assert found["initial"] == 0
    assert (got["graphs"] > 0) == parallel.get("compile", False)  # numbers do not show whether anything was compiled
    beyond = {key: value for key, value in found.items() if not value <= limits.get(key, EXACT)}
    assert not beyond, f"{beyond}; of gradients: {largest_error(got['gradients'], want['gradients'], error)}"


# The layout, and whether products are cut as in one process: then the loss has its bits, for weights are rounded before they are
# gathered, and sums are wide.
IN_BFLOAT16 = [
    (1, {}, True),
    (4, {"dp": 2, "fsdp": 2}, True),
    (4, {"pp": 2, "fsdp": 2, "schedule": "interleaved"}, True),
    (4, {"cp": 2, "tp": 2}, False),
]


@pytest.mark.parametrize("row", IN_BFLOAT16, ids=name_of)
def test_first_step_in_bfloat16(row, workers, reference, error):
    size, parallel, same_products = row
    got, want = workers.run(size, parallel, dtype="bfloat16"), reference(dtype="bfloat16")
    assert got["loss"][0] == pytest.approx(want["loss"][0], rel=1e-12 if same_products else 2e-3)
    assert got["evaluated"] == pytest.approx(want["loss"][0], rel=1e-6 if same_products else 2e-3)
    assert got["norm"][0] == pytest.approx(want["norm"][0], rel=1e-3 if same_products else 2e-2)
    # A unit of bf16 is 2^-8; a tied weight has the sum of two gradients, each rounded, or rounded together.
    limit = 2**-7 if same_products else 0.1
    assert largest_error(got["gradients"], want["gradients"], error, floor=1.0)[1] < limit


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_gradients_in_bfloat16_are_summed_wide_whatever_the_schedule(schedule, workers):
    first, other = (workers.run(2, {"pp": 2, "schedule": s}, "untied", dtype="bfloat16")["gradients"] for s in ("1f1b", schedule))
    assert first.keys() == other.keys()
    assert [name for name, gradient in first.items() if not torch.equal(other[name], gradient)] == []


def scaled(factor):
    """All gradients but those that are zero, by the same factor; the loss is right."""

    def check(got, want, wrong, loss_is_wrong):
        assert not loss_is_wrong
        assert len(wrong) > 90
        for name in wrong:
            assert (got["gradients"][name] - factor * want["gradients"][name]).abs().max() < 1e-10

    return check


def token_is_counted_twice(got, want, wrong, loss_is_wrong):
    assert loss_is_wrong
    assert len(wrong) > 90


def norms_are_wrong(got, want, wrong, loss_is_wrong):
    assert not loss_is_wrong
    assert len(wrong) > 10
    assert all("norm" in name for name in wrong)


# Each with a layout that would show it, and what is seen: a message, or numbers that are wrong in the way of the fault.
PLANTED = [
    ("gradients divided by the number of microbatches", 2, {"pp": 2}, "", scaled(1 / 8)),
    ("gradients averaged over shards", 2, {"fsdp": 2}, "", scaled(1 / 2)),
    ("a token counted twice at a shard border", 2, {"cp": 2}, "", token_is_counted_twice),
    ("a replicated parameter not reduced", 2, {"tp": 2}, "", norms_are_wrong),
    ("a tied gradient not summed", 2, {"pp": 2}, "", "copies of language.embedding.weight differ"),
    ("a blank tile not connected to the loss", 2, {"fsdp": 2}, "text", "no gradient reached vision."),
    ("a parameter without a gradient", 2, {"fsdp": 2}, "", "no gradient reached language.blocks.0.norm1.weight"),
]


@pytest.mark.parametrize(("fault", "size", "parallel", "variant", "seen"), PLANTED, ids=lambda v: v if isinstance(v, str) else None)
def test_planted_fault_is_found(fault, size, parallel, variant, seen, workers, reference, error, row_failed):
    if isinstance(seen, str):
        with pytest.raises(row_failed, match=seen):
            workers.run(size, parallel, variant, fault=fault)
        return
    got, want = workers.run(size, parallel, variant, fault=fault), reference(variant)
    errors = errors_by_name(got["gradients"], want["gradients"], error)
    wrong = {name for name, value in errors.items() if not value <= EXACT}
    seen(got, want, wrong, loss_is_wrong=not relative(got["loss"][:1], want["loss"][:1]) <= EXACT)


def test_a_rank_that_dies_in_native_code_says_where(workers, row_failed):
    with pytest.warns(UserWarning, match="the row is run once more"), pytest.raises(row_failed, match="killed by signal 11") as failed:
        workers.run(2, {"tp": 2}, fault="a crash in native code")
    assert "Segmentation fault" in str(failed.value)
    assert "in _crash" in str(failed.value)
