"""Packs of a step are full and cost the same, on data whose lengths and images are far from equal."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smalt.engine.data.balance import choose_packs, deal_packs
from smalt.engine.data.packing import POOL
from smalt.profiling.bench_packing import BASELINES, bench_packing


@pytest.mark.slow
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=100),
    num_packs=st.integers(1, 40),
    seed=st.integers(0, 99),
    steps=st.sampled_from([0, 1, 4]),
)
@example(lengths=[5] * 40, num_packs=40, seed=0, steps=0)  # as many documents as packs: the end of all epochs
def test_what_is_chosen_fits_is_chosen_once_and_has_the_oldest(lengths, num_packs, seed, steps):
    lengths = lengths * max(1, -(-steps * 50 * num_packs // sum(lengths)))
    lengths = np.array((lengths * num_packs)[: max(len(lengths), num_packs)])
    costs = lengths * np.random.default_rng(seed).uniform(1, 3, len(lengths))
    packs = choose_packs(lengths, costs, num_packs, 50)
    chosen = [document for pack in packs for document in pack]
    assert len(packs) == num_packs
    assert all(packs)
    assert len(set(chosen)) == len(chosen)
    assert 0 in chosen
    assert all(lengths[pack].sum() <= 50 for pack in packs)
    assert packs == choose_packs(lengths, costs, num_packs, 50)


@settings(max_examples=60)
@given(costs=st.lists(st.floats(1, 100), min_size=1, max_size=8), rows=st.integers(1, 6), seed=st.integers(0, 99))
def test_packs_are_dealt_so_that_what_runs_at_once_costs_alike(costs, rows, seed):
    replicas = len(costs)
    values = np.random.default_rng(seed).permutation(np.repeat(costs, rows) * np.linspace(1, 1.1, replicas * rows))
    dealt = deal_packs(values, replicas)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(replicas * rows))
    assert {len(numbers) for numbers in dealt} == {rows}
    in_order = np.sort(values)[::-1].reshape(rows, replicas)
    for row in range(rows):
        assert sorted((values[numbers[row]] for numbers in dealt), reverse=True) == in_order[row].tolist()
    # The sums differ by no more than the widest row.
    sums = [values[numbers].sum() for numbers in dealt]
    assert max(sums) - min(sums) <= (in_order[:, 0] - in_order[:, -1]).max() + 1e-9


def test_packs_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 packs do not divide over 2 replicas"):
        deal_packs(np.ones(3), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_long_tailed_set_is_packed_full_and_even(seed):
    methods = {"Smalt": (choose_packs, deal_packs), **BASELINES}
    rows = bench_packing(methods, num_ranks=8, pool=POOL, steps=6, seed=seed)
    for low in range(0, len(rows), len(methods)):
        ours, *others = rows[low : low + len(methods)]
        assert ours["fill"] >= 0.98
        assert ours["spread"] <= 1.05
        assert all(ours["spread"] < other["spread"] for other in others)
