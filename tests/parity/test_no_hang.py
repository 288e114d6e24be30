"""Collectives are a function of the configuration, never of the data: no batch can make ranks wait for each other in vain.

Real processes train on drawn packs. Each records what it launches (recording.py); gloo's own record says that nothing is missed.
"""

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

LENGTH, TOKENS_PER_TILE = 64, 4
NUM_STEPS, PACKS = 4, 4
LAYOUTS = [
    (2, {"fsdp": 2}),
    (4, {"cp": 2, "tp": 2}),
    (2, {"cp": 2, "context": "scatter"}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "zero_bubble"}),
    (4, {"pp": 2, "fsdp": 2, "schedule": "interleaved"}),
    (4, {"dp": 2, "cp": 2}),
]
# What a pack is made of: nothing, text, tokens that nobody learns, tiles, and mixtures.
MIXES = [(), ("text",), ("silent",), ("image",), ("text", "image"), ("silent", "image"), ("text", "silent", "image")]
TEXT, SILENT, EMPTY = [[["text", 64]]], [[["silent", 40]]], []
ONE_TILE, FULL = [[["text", 9], ["image", 1], ["text", 5]]], [[["image", 16]]]
MIXED = [[["image", 3], ["text", 7]], [["silent", 6], ["image", 2], ["text", 20]]]


@st.composite
def packs(draw):
    """Documents as runs of tokens and tiles, 64 rows at most."""
    mix, left, documents = draw(st.sampled_from(MIXES)), LENGTH, []
    for _ in range(draw(st.integers(1, 3)) if mix else 0):
        runs = []
        for kind in draw(st.lists(st.sampled_from(mix), min_size=1, max_size=3)):
            rows = TOKENS_PER_TILE if kind == "image" else 1
            if left >= rows:
                runs.append([kind, draw(st.integers(1, left // rows))])
                left -= runs[-1][1] * rows
        documents += [runs] if runs else []
    return documents


steps = st.lists(packs(), min_size=PACKS, max_size=PACKS)
known = {}  # by layout: what each rank launches in a step


def name_of(layout):
    return "x".join(f"{key}{value}" if isinstance(value, int) else f"-{value}" for key, value in layout[1].items()).replace("x-", "-")


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@example([[FULL, EMPTY, MIXED, TEXT], [EMPTY, ONE_TILE, SILENT, FULL], [TEXT, SILENT, ONE_TILE, EMPTY], [FULL] * 4])
@given(st.lists(steps, min_size=NUM_STEPS, max_size=NUM_STEPS))
def test_collectives_are_a_function_of_the_configuration(layout, workers, drawn):
    size, parallel = layout
    records, errors = run(workers, size, parallel, drawn)
    assert not differences(records, known.setdefault(name_of(layout), {}))
    assert not errors
    kinds = {"allgather", "reducescatter", "allreduce"}
    kinds |= {"send", "recv"} if "pp" in parallel else set()
    kinds |= {"alltoall"} if "cp" in parallel else set()
    for record in records:
        assert len(record["steps"]) == NUM_STEPS
        for step in record["steps"]:
            assert {e["kind"] for e in step["entries"]} == kinds
            seen = [[e["kind"], e["group"]] for e in step["entries"] if e["kind"] not in ("send", "recv")]
            # gloo reduces and scatters by an all-reduce, and does not record sends.
            assert [["allreduce" if kind == "reducescatter" else kind, group] for kind, group in seen] == step["launched"]


REDUCED = [(2, {"fsdp": 2}), (4, {"pp": 2, "fsdp": 2, "schedule": "interleaved"}), (2, {"fsdp": 2, "reduce_every_pack": True})]


@pytest.mark.parametrize("layout", REDUCED, ids=name_of)
def test_gradients_are_reduced_once_a_step_or_once_a_pack(layout, workers):
    size, parallel = layout
    counts = []
    for num_packs in (4, 8):
        records, errors = workers.record(size, parallel, [[MIXED] * num_packs])
        assert not errors
        counts.append([sum(e["kind"] == "reducescatter" for e in record["steps"][0]["entries"]) for record in records])
    assert counts[1] == [count * (2 if "reduce_every_pack" in parallel else 1) for count in counts[0]]
    assert min(counts[0]) > 2  # one for each block that a rank holds, at least


def test_weights_that_are_given_up_are_gathered_again(workers):
    gathers = []
    for given_up in (True, False):
        records, errors = workers.record(2, {"fsdp": 2, "reshard_after_forward": given_up}, [[MIXED] * 4])
        assert not errors
        gathers.append([sum(e["kind"] == "allgather" for e in record["steps"][0]["entries"]) for record in records])
    again, kept = gathers
    blocks, packs = 6, 2
    assert all(more - fewer >= blocks * packs for more, fewer in zip(again, kept, strict=True))


def run(workers, size, parallel, drawn, **options):
    """As many of the drawn packs of each step as two for every replica."""
    replicas = parallel.get("fsdp", 1) * parallel.get("dp", 1)
    return workers.record(size, parallel, [step[: 2 * replicas] for step in drawn], **options)


def differences(records, first):
    """What is not the same: from step to step, between the ranks of a group, between sender and receiver. first: of an earlier run."""
    found = []
    for rank, record in enumerate(records):
        for number, step in enumerate(record["steps"]):
            launched = [{**e, "splits": []} for e in step["entries"]]
            found += unequal(f"rank {rank}, step {number}", launched, first.setdefault(rank, launched))
    groups = {name: ranks for record in records for name, ranks in record["groups"].items()}
    for number in range(min(len(record["steps"]) for record in records)):
        for group, ranks in groups.items():
            inside = {r: [e for e in records[r]["steps"][number]["entries"] if e["group"] == group] for r in ranks}
            where = f"step {number}, group {group}"
            found += between_ranks(where, inside) + between_neighbours(where, inside, ranks)
    return found


def unequal(where, got, want):
    """The first place where two sequences differ, or where one ends."""
    for i in range(max(len(got), len(want))):
        one, other = ([*x[i : i + 1], None][0] for x in (got, want))
        if one != other:
            return [f"{where}, collective {i}: {shown(one)}, not {shown(other)}"]
    return []


def shown(entry):
    return f"{entry['kind']} over {entry['group']} of {entry['sizes']}" if entry else "nothing"


def between_ranks(where, inside):
    common = {rank: [{**e, "splits": []} for e in entries if e["kind"] not in ("send", "recv")] for rank, entries in inside.items()}
    first, *others = common
    return [line for rank in others for line in unequal(f"{where}, rank {rank}", common[rank], common[first])]


def between_neighbours(where, inside, ranks):
    """Of every pair: what one sends, the other receives, one after the other; and as many rows of each exchange."""
    found = []
    for a, sender in enumerate(ranks):
        for b, receiver in enumerate(ranks):
            sent = [e["sizes"] for e in inside[sender] if e["kind"] == "send" and e["peer"] == b]
            received = [e["sizes"] for e in inside[receiver] if e["kind"] == "recv" and e["peer"] == a]
            gone, come = ([e["splits"] for e in inside[r] if e["kind"] == "alltoall"] for r in (sender, receiver))
            rows = [x[0][b] for x in gone], [x[1][a] for x in come]
            for what, x, y in (("sends", sent, received), ("rows of exchanges", *rows)):
                if x != y:
                    found.append(f"{where}: {what} of rank {sender} to rank {receiver} are {x}, and {y} arrive")
    return found


# Each with the steps that show it, what is seen, and whether ranks hang: in the last one all ranks of a group skip alike.
PLANTED = [
    (
        "a rank without a tile skips the tower", 2, {"fsdp": 2}, [[FULL] * 4, [FULL, EMPTY, ONE_TILE, TEXT]],
        "step 1, group vision/fsdp_cp_tp [0, 1], rank 1, collective 0: nothing, not allgather", True,
    ),
    (
        "a rank that sends no tile skips the exchange", 4, {"cp": 2, "tp": 2}, [[FULL] * 2, [ONE_TILE] * 2],
        "step 1, group tiles/cp_tp [0, 1, 2, 3], rank 3, collective 0: alltoall", True,
    ),
    (
        "a pack without a tile skips the exchange", 4, {"cp": 2, "tp": 2}, [[FULL] * 2, [FULL, EMPTY]],
        "of [[1016], [508]], not alltoall over tiles/cp_tp [0, 1, 2, 3] of [['rows of tiles', 16]]", False,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "size", "parallel", "drawn", "seen", "hangs"), PLANTED, ids=[row[0] for row in PLANTED])
def test_planted_fault_is_found(fault, size, parallel, drawn, seen, hangs, workers):
    records, errors = run(workers, size, parallel, drawn, fault=fault, timeout=5)
    found = differences(records, {})
    assert any(seen in line for line in found), "\n".join(found)
    assert bool(errors) == hangs
