"""The ratios of FLOPs are those of what ranks compute, as torch counts it in them; and the program runs. Never how long it takes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smalt.model import LanguageConfig, ModelConfig, VisionConfig
from smalt.model.cost import Cost, Workload, model_cost
from smalt.profiling.bench_tiles import (
    PAPER_CP,
    bench_tiles,
    flops_ratio,
    make_pack,
    paper_ratios,
    print_report,
    rank_flops,
    vision_share,
    work_of,
)  # fmt: skip

CONFIG = ModelConfig(
    vision=VisionConfig(num_layers=2, width=16, num_heads=2, ffn=24, patch=2, tile=8),  # 4 tokens a tile
    language=LanguageConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=40, vocabulary=50),
)
TOKENS = 128


def test_ratios_by_hand():
    cost = Cost(token=1.0, pair=0.5, head=2.0, tile=10.0, num_blocks=3)  # of 100 tokens and 40 pairs: 3 (100 + 20) + 200 = 560
    assert [flops_ratio(cost, Workload(100, 40, tiles), 2) for tiles in (0, 1, 8)] == [1, 1, (280 + 80) / (280 + 40)]
    # The rank with most tiles has two of five, as has one of four with seven.
    assert flops_ratio(cost, Workload(100, 40, 5), 3) == (560 / 3 + 50) / (560 / 3 + 20)
    assert flops_ratio(cost, Workload(100, 40, 7), 4) == (140 + 70) / (140 + 20)
    assert vision_share(cost, Workload(100, 40, 8)) == 80 / 640


def test_the_pack_has_the_tiles_that_are_asked_for():
    batch = make_pack(CONFIG, TOKENS, 6)
    assert (len(batch.tokens), len(batch.tiles), len(batch.image_index)) == (TOKENS, 6, 24)
    # Four documents of 32 tokens with 2, 2, 1 and 1 tiles, whose rows see each other.
    within = sum(rows * (rows - 1) // 2 for rows in (8, 8, 4, 4))
    assert work_of(batch) == Workload(TOKENS, 4 * 32 * 33 // 2 + within, 6)
    with pytest.raises(ValueError, match="9 tiles of 4 tokens do not fit a document of 32"):
        make_pack(CONFIG, TOKENS, 33)


def test_ratios_of_the_large_model():
    rows = paper_ratios()
    assert [(row["document"], row["tiles"], row["image_rows"]) for row in rows[:2]] == [(32768, 34, 6664), (32768, 85, 16660)]
    for row in rows:
        # Of one process's FLOPs a share s is vision: (1 - s) / cp + s over (1 - s) / cp + s / cp, but for tiles that do not divide.
        for cp in PAPER_CP:
            assert row["ratios"][str(cp)] == pytest.approx(1 + (cp - 1) * row["vision_share"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [8, 5])
def test_ratios_are_those_of_what_ranks_compute(tiles, tmp_path):
    worker, settings = Path(__file__).with_name("tiles_worker.py"), json.dumps([CONFIG.model_dump(), TOKENS, tiles])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(worker), str(tmp_path), settings], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    counts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    # Every row with every key, in the tower too. torch forms no gradient of the pixels, and does not look into the operator that is
    # the head over a part of the vocabulary.
    cost, work, vision = model_cost(CONFIG), Workload(TOKENS, TOKENS**2, tiles), CONFIG.vision
    for axis, kind in itertools.product(("cp", "tp"), ("shared", "replicated")):
        seen = tiles if kind == "replicated" else -(-tiles // 2)
        beyond = 3 * 4 * vision.width * (seen**2 - seen) * vision.grid**4 * vision.num_layers
        pixels = 2 * seen * vision.grid**2 * 3 * vision.patch**2 * vision.width
        head = cost.head * TOKENS / 2 if axis == "tp" else 0
        assert max(count[f"{axis}, {kind}"] for count in counts) == rank_flops(cost, work, 2, kind) + beyond - pixels - head


@pytest.mark.slow
def test_the_whole_of_it(capsys):
    result = bench_tiles(2, 1, TOKENS, 8, CONFIG)
    print_report(result)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(column in shown for column in ("replicated", "of FLOPs", "image rows", "cp 8"))
    assert json.loads(json.dumps(result)) == result
    for row in result["axes"]:
        assert row["flops_ratio"] == flops_ratio(model_cost(CONFIG), work_of(make_pack(CONFIG, TOKENS, 8)), 2)
        assert all(0 < low <= middle <= high for low, middle, high in (v for v in row.values() if isinstance(v, list)))
    with pytest.raises(ValueError, match="rounds = 0"):
        bench_tiles(0, 1, TOKENS, 8, CONFIG)
    with pytest.raises(ValueError, match="sequence_length = 129 is not a multiple"):
        bench_tiles(1, 1, 129, 8, CONFIG)
