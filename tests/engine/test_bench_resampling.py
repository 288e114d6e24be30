"""The bench of resampling: what its sources are, and what it says of runs."""

import pyarrow.parquet as pq
import pytest

from smalt.engine.bench_resampling import RECORDS, Outcome, bench_resampling, resampling_table, write_sources


def _cells(table):
    return [list(column.cells) for column in table.columns]


def test_what_is_saved_is_a_share_of_the_tokens_of_the_same_seed():
    shares = {"easy": 0.5, "hard": 0.3, "noisy": 0.2}
    plain = Outcome(0, False, 2000, 0, shares, [(1000, 0.5), (2000, 0.91)])
    quick, late = Outcome(0, True, 500, 70, shares, [(500, 0.9)]), Outcome(1, True, None, 70, shares, [(9000, 0.8)])
    table = resampling_table([plain, quick, Outcome(1, False, 4000, 0, shares, []), late])
    assert _cells(table)[2] == ["2,000", "500", "4,000", "not in 9,000"]
    assert _cells(table)[3] == ["", "75%", "", ""]


@pytest.mark.slow
def test_both_runs_of_a_seed_are_over_sources_of_which_one_is_noise(tmp_path):
    write_sources(tmp_path, 0)
    rows = {name: pq.read_table(tmp_path / "train" / f"{name}.parquet").to_pylist() for name in RECORDS}
    assert {name: len(found) for name, found in rows.items()} == RECORDS
    by_images = {}
    for row in rows["easy"] + pq.read_table(tmp_path / "held_out" / "easy.parquet").to_pylist():
        by_images.setdefault(row["images"][0]["bytes"], set()).add(row["messages"][-1]["content"])
    assert max(map(len, by_images.values())) == 1, "an easy image has one answer"
    answers = [int(row["messages"][-1]["content"]) for row in rows["noisy"]]
    assert all(abs(answers.count(n) / len(answers) - 1 / 19) < 0.01 for n in range(19))
    said = []
    plain, resampled = bench_resampling(1, steps=20, progress=said.append)
    assert (plain.tokens, resampled.tokens, plain.measured) == (None, None, 0)
    assert resampled.measured > 0
    assert plain.drawn == pytest.approx({"easy": 0.25, "hard": 0.25, "noisy": 0.5}, abs=0.02)
    assert len(said) == 2
