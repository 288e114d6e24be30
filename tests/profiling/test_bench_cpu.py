"""The benchmark is fair: one model, one set of documents, one loss on both sides; and its sums add up."""

import importlib.util

import numpy as np
import pytest

from smalt.kernels import IGNORE
from smalt.model import Document, LanguageConfig, ModelConfig, VisionConfig
from smalt.profiling import bench_cpu as module
from smalt.profiling.bench_cpu import CONTESTANTS, Contestant, bench_cpu, make_batches, print_report

# Not importorskip: whoever collects these tests would import all of it.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers (the extra bench)")
IMAGE = 7
CONFIG = ModelConfig(
    vision=VisionConfig(num_layers=2, width=16, num_heads=2, ffn=24, patch=2, tile=8),
    language=LanguageConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=40, vocabulary=50),
)


@pytest.fixture(scope="module")
def documents():
    rng, made = np.random.default_rng(0), []
    for number in range(40):
        length, images = int(rng.integers(12, 40)), number % 3
        rows = np.arange(1, 1 + 4 * images)
        tokens = rng.integers(8, 50, length)
        tokens[rows] = IMAGE
        targets = (np.arange(length) > 9) & (rng.random(length) < 0.7)
        tiles = rng.standard_normal((images, 3, 8, 8), dtype=np.float32)
        made.append(Document(tokens, targets, rows, tiles, rows[::4, None] + np.array([0, 4])))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_both_models_are_the_same(documents, tie):
    config = CONFIG.model_copy(update={"language": CONFIG.language.model_copy(update={"tie_embeddings": tie})})
    difference, parameters = module._compare_models(documents, config)
    assert difference < 1e-6
    assert parameters["transformers"] == parameters["smalt"]


@pytest.mark.parametrize("contestant", CONTESTANTS[:3], ids=lambda c: c.name)
def test_everyone_trains_on_every_token_once(documents, contestant):
    batches = make_batches(contestant, documents, CONFIG, pack_length=128, batch=8, seed=0)
    assert sum(b.useful for b in batches) == sum(map(len, documents))
    assert all(0 < b.useful <= b.rows for b in batches)
    inputs = [b.inputs for b in batches]
    packs = contestant.library == "smalt"
    labels = [p.labels if packs else p["labels"] for p in inputs]
    tiles = [p.tiles if packs else p["pixel_values"] for p in inputs]
    assert sum(int((x != IGNORE).sum()) for x in labels) == sum(int(d.targets.sum()) for d in documents)
    assert sum(map(len, tiles)) == sum(len(d.tiles) for d in documents)


def test_batches_by_length_and_packs_have_less_padding(documents):
    fill = {}
    for c in CONTESTANTS[:3]:
        batches = make_batches(c, documents, CONFIG, pack_length=128, batch=8, seed=0)
        fill[c.order] = sum(b.useful for b in batches) / sum(b.rows for b in batches)
    assert fill["random"] < fill["by length"] < 1
    assert fill["random"] < fill["packs"]


def test_gain_is_fill_times_speed():
    smalt = [{"useful": 90, "rows": 100, "seconds": 1.0}, {"useful": 95, "rows": 100, "seconds": 2.0}]
    other = [{"useful": 90, "rows": 180, "seconds": 1.5}, {"useful": 95, "rows": 190, "seconds": 5.0}]
    ratio = module._ratio(Contestant("transformers", "random", False), {CONTESTANTS[2].name: smalt, CONTESTANTS[0].name: other})
    assert ratio["fill"] == pytest.approx([1.825, 1.85, 1.875])
    assert ratio["total"][1] == pytest.approx((1.5 + 2.5) / 2)
    assert ratio["speed"][1] == pytest.approx((1.5 / 1.8 + 2.5 / 1.9) / 2)


@pytest.mark.slow
def test_the_whole_of_it(documents, capsys, monkeypatch):
    monkeypatch.setattr(module, "ROUND_BATCHES", 2)
    result = bench_cpu(documents, CONFIG, pack_length=128, batch=4, rounds=2, threads=1)
    assert len(result["contestants"]) == len(CONTESTANTS)
    assert all(c["tokens_per_s"] > 0 and c["peak_mib"] > 0 for c in result["contestants"])
    print_report(result)
    shown = capsys.readouterr().out
    assert all(shown.count(c.name) >= 1 for c in CONTESTANTS)
    assert "…" not in shown


def test_what_cannot_be_compared_is_refused(documents):
    odd = CONFIG.model_copy(update={"vision": CONFIG.vision.model_copy(update={"tile": 6})})
    settings = {"pack_length": 128, "batch": 4, "rounds": 1, "threads": 1}
    with pytest.raises(ValueError, match="3 x 3"):
        bench_cpu(documents, odd, **settings)
    with pytest.raises(ValueError, match="longer than the pack"):
        bench_cpu(documents, CONFIG, **{**settings, "pack_length": 16})
    few = documents[0]
    stray = Document(np.full_like(few.tokens, IMAGE), few.targets, few.image_index, few.tiles, few.spans)
    with pytest.raises(ValueError, match="token 7"):
        bench_cpu([*documents, stray], CONFIG, **settings)
