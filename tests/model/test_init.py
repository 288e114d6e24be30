"""Initial weights are a function of (seed, parameter name), and sizes are those of the configuration."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smalt.model import PRESETS, LanguageConfig, MultimodalModel, VisionConfig, build_model, count_parameters
from smalt.model.init import BLOCK, initial_rows, seeded_normal

WHOLE = seeded_normal("a.weight", 5, 0, 3 * BLOCK + 7)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_same_seed_same_weights_whatever_the_global_state(make_model):
    first = weights(make_model(seed=3))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second = weights(make_model(seed=3))
    assert torch.equal(torch.get_rng_state(), state), "and they leave it alone"
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_do_not_depend_on_other_parameters(make_model):
    # One layer less, an untied head and biases: other parameters in another order. What both models hold is the same, but for the
    # scale of the projections into the residual stream, which is 1 / sqrt(2 x layers).
    two, one = (weights(make_model(num_layers=n, tie_embeddings=n == 2, qkv_bias=n == 1)) for n in (2, 1))
    both = two.keys() & one.keys()
    assert {"language.blocks.0.attention.q.weight", "language.embedding.weight", "vision.patch_embed.weight"} <= both
    for name in both:
        residual = name.startswith("language") and name.split(".")[-2] in ("out", "down")
        torch.testing.assert_close(two[name] * (2**0.5 if residual else 1), one[name], rtol=3e-7 if residual else 0, atol=0)


def test_every_name_and_seed_has_its_own_weights(make_model):
    drawn = [
        p.flatten()[:8] / p.flatten()[0]
        for seed in (0, 1)
        for name, p in weights(make_model(seed=seed)).items()
        if "norm" not in name and not name.endswith("bias")
    ]
    assert len({tuple(x.tolist()) for x in drawn}) == len(drawn) > 30


def test_scales(make_config):
    model = build_model(make_config(init_std=0.5, width=64, head_dim=16, ffn=300, vocabulary=300, qkv_bias=True), seed=0)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif "norm" in name.split(".")[-2]:
            assert p.eq(1).all(), name
    language = model.language
    assert language.embedding.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert language.blocks["1"].gate.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert language.blocks["1"].down.weight.std().item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype(make_config, dtype):
    model = build_model(make_config(), seed=0, dtype=dtype)
    exact = build_model(make_config(), seed=0, dtype=torch.float64)
    for got, want in zip(model.parameters(), exact.parameters(), strict=True):
        assert got.dtype == dtype
        assert got.device.type == "cpu"
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_published_model():
    config = PRESETS["bluelm_3b"]
    with torch.device("meta"):
        counts = count_parameters(MultimodalModel(config))
    assert 2.85e9 < counts["total"] < 2.95e9
    assert counts["total"] == counts["vision"] + counts["projector"] + counts["language"]
    # SigLIP2 so400m, patch 14 at 378.
    vision = config.vision
    assert (vision.num_layers, vision.width, vision.num_heads, vision.ffn) == (27, 1152, 16, 4304)
    assert (vision.patch, vision.tile, vision.merge) == (14, 378, 2)
    assert vision.tokens_per_tile == 196
    assert 0.40e9 < counts["vision"] < 0.43e9


def test_a_tied_head_counts_once(make_model):
    tied, untied = (count_parameters(make_model(tie_embeddings=tie))["total"] for tie in (True, False))
    assert untied - tied == 24 * 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionConfig(width=10, num_heads=4), "width 10 is not a multiple of num_heads 4"),
        (lambda: VisionConfig(tile=15, patch=14), "tile 15 is not a multiple of patch 14"),
        (lambda: LanguageConfig(num_heads=6, num_kv_heads=4), "num_heads 6 is not a multiple of num_kv_heads 4"),
        (lambda: LanguageConfig(head_dim=7), "head_dim 7 is odd"),
        (lambda: LanguageConfig(layers=3), "layers"),
    ],
)
def test_impossible_sizes(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


@given(st.integers(0, 3 * BLOCK), st.integers(0, 3 * BLOCK))
@settings(max_examples=40)
@example(BLOCK - 1, BLOCK + 1)
@example(BLOCK, BLOCK)
@example(BLOCK, 2 * BLOCK)
def test_a_shard_makes_the_numbers_of_the_whole(one, other):
    first, last = sorted((one, other))
    assert torch.equal(seeded_normal("a.weight", 5, first, last), WHOLE[first:last])


def test_every_block_has_numbers_of_its_own():
    assert abs(float(WHOLE.mean())) < 0.01
    assert float(WHOLE.std()) == pytest.approx(1, abs=0.01)
    blocks = WHOLE[: 3 * BLOCK].view(3, BLOCK)
    assert torch.corrcoef(blocks).fill_diagonal_(0).abs().max() < 0.02


def test_rows_of_a_large_parameter(make_config):
    config = make_config(vocabulary=40_000)  # 40,000 x 12 numbers: eight blocks
    shape = torch.Size((40_000, 12))
    whole = initial_rows(config, "language.embedding.weight", shape, 1, 0, 40_000)
    assert torch.equal(initial_rows(config, "language.embedding.weight", shape, 1, 5_000, 30_001), whole[5_000:30_001])
