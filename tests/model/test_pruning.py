"""Pruning removes what does nothing, first and without a trace; and what it removes of weights is what it says."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalt.model import LanguageConfig, ModelConfig, VisionConfig, build_model
from smalt.model.importance import measure_importance
from smalt.model.pruning import choose, differences, origins

# The tile of the documents of conftest.py. Epsilon: what a norm adds to the mean square does not scale with the width.
VISION = VisionConfig(num_layers=2, width=8, num_heads=2, ffn=9, patch=2, tile=6, merge=2)
LARGER = LanguageConfig(
    num_layers=4, width=15, num_heads=6, num_kv_heads=3, head_dim=4, ffn=13, vocabulary=24, rope_theta=100.0, norm_eps=1e-30
)  # fmt: skip
SMALLER = {"num_layers": 2, "width": 12, "num_heads": 4, "num_kv_heads": 2, "ffn": 10}


def config_of(smaller, **variant):
    language = LARGER.model_copy(update={**variant, **(SMALLER if smaller else {})})
    vision = VISION.model_copy(update={"num_layers": 1, "ffn": 7} if smaller else {})
    return ModelConfig(vision=vision, language=language, projector_width=6 if smaller else 10, init_std=0.4)


def prune(model, smaller, packs):
    kept = choose(measure_importance(model, packs), model.config, smaller)
    small, whole = build_model(smaller, 1, dtype=torch.float64), dict(model.named_parameters())
    with torch.no_grad():
        for name, origin in origins(kept, model.config, smaller, [name for name, _ in small.named_parameters()]).items():
            p = dict(small.named_parameters())[name]
            p.copy_(origin.take(whole[origin.name], tuple((0, size) for size in p.shape)))
    return small, kept


def biases_too(model, generator):
    """Random where they are zero at first, as norms are not one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def kill(model, generator):
    """Silence as many units as the smaller config lacks, anywhere; returns those that live, as :class:`Kept` counts them."""

    def draw(total, left):
        return sorted(torch.randperm(total, generator=generator)[:left].tolist())

    def dead(total, live):
        return [i for i in range(total) if i not in live]

    language, vision, projector = model.language, model.vision, model.projector
    blocks, channels = draw(4, 2), draw(15, 12)
    living = {"channels": channels, "blocks": [], "vision": [], "projector": draw(10, 6)}
    gone = dead(15, channels)
    language.embedding.weight[:, gone] = 0
    projector.down.weight[gone], projector.down.bias[gone] = 0, 0
    projector.up.weight[dead(10, living["projector"])] = 0
    projector.up.bias[dead(10, living["projector"])] = 0
    for i, block in enumerate(language.blocks.values()):
        block.attention.out.weight[gone], block.down.weight[gone] = 0, 0
        if i not in blocks:
            block.attention.out.weight[:], block.down.weight[:] = 0, 0
            continue
        groups, neurons = draw(3, 2), draw(13, 10)
        for group in dead(3, groups):
            block.attention.v.weight[group * 4 : group * 4 + 4] = 0
            if block.attention.v.bias is not None:
                block.attention.v.bias[group * 4 : group * 4 + 4] = 0
        block.up.weight[dead(13, neurons)] = 0
        living["blocks"].append((i, groups, neurons))
    (dead_block,) = dead(2, draw(2, 1))
    block = vision.blocks[dead_block]
    for layer in (block.out, block.down):
        layer.weight[:], layer.bias[:] = 0, 0
    live = vision.blocks[1 - dead_block]
    neurons = draw(9, 7)
    live.up.weight[dead(9, neurons)], live.up.bias[dead(9, neurons)] = 0, 0
    living["vision"].append((1 - dead_block, neurons))
    return living


@pytest.fixture(scope="module")
def packs(make_document, make_pack):
    first = [make_document([("text", 9), ("image", 2), ("text", 5)], 1), make_document([("text", 7)], 2)]
    return [make_pack(first, tail=6), make_pack([make_document([("text", 11)], 3)]), make_pack([], tail=4)]


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31), tied=st.booleans(), qkv_bias=st.booleans(), qk_norm=st.booleans())
def test_what_does_nothing_is_removed_and_nothing_changes(packs, error, seed, tied, qkv_bias, qk_norm):
    variant = {"tie_embeddings": tied, "qkv_bias": qkv_bias, "qk_norm": qk_norm}
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config_of(False, **variant), seed, dtype=torch.float64)
    biases_too(model, generator)
    with torch.no_grad():
        living = kill(model, generator)
    small, kept = prune(model, config_of(True, **variant), packs)
    assert kept.language.channels == living["channels"]
    assert [(b.number, b.kv_heads, b.neurons) for b in kept.language.blocks] == living["blocks"]
    assert [(b.number, b.neurons) for b in kept.vision.blocks] == living["vision"]
    assert kept.projector == living["projector"]
    for pack in packs[:2]:
        assert error(small(pack), model(pack)) < 1e-10


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_sizes_give_the_same_bits(packs, tied):
    model = build_model(config_of(False, tie_embeddings=tied, qkv_bias=True), 0, dtype=torch.float64)
    same, _ = prune(model, model.config, packs)
    for name, p in model.named_parameters():
        assert torch.equal(dict(same.named_parameters())[name], p), name


def test_heads_stay_with_the_key_and_value_head_that_they_had(packs):
    larger = config_of(False)
    smaller = larger.model_copy(update={"language": larger.language.model_copy(update={"num_heads": 2, "num_kv_heads": 2})})
    importance = measure_importance(build_model(larger, 0, dtype=torch.float64), packs)
    heads = torch.tensor([5.0, 1.0, 9.0, 2.0, 3.0, 3.5], dtype=torch.float64)
    blocks = [dataclasses.replace(block, heads=heads) for block in importance.language.blocks]
    kept = choose(dataclasses.replace(importance, language=dataclasses.replace(importance.language, blocks=blocks)), larger, smaller)
    # Of groups worth 5, 9 and 3.5 when one head is left of each, the first two.
    assert (kept.language.blocks[0].kv_heads, kept.language.blocks[0].heads) == ([0, 1], [0, 2])


def test_a_narrower_vision_tower_has_its_heads_and_channels(packs):
    larger = config_of(False)
    smaller = larger.model_copy(update={"vision": larger.vision.model_copy(update={"width": 4, "num_heads": 1})})
    assert differences(larger, smaller) == []
    model = build_model(larger, 0, dtype=torch.float64)
    biases_too(model, torch.Generator().manual_seed(0))
    small, kept = prune(model, smaller, packs)
    channels, block = kept.vision.channels, kept.vision.blocks[1]
    rows = [4 * block.heads[0] + i for i in range(4)]
    old, new = model.vision.blocks[1], small.vision.blocks[1]
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(new, name).weight, getattr(old, name).weight[rows][:, channels])
        assert torch.equal(getattr(new, name).bias, getattr(old, name).bias[rows])
    assert torch.equal(new.out.weight, old.out.weight[channels][:, rows])
    assert torch.equal(new.norm2.bias, old.norm2.bias[channels])
    assert torch.equal(small.vision.position, model.vision.position[:, channels])
    merged = model.projector.up.weight.view(10, 4, 8)[:, :, channels]
    assert torch.equal(small.projector.up.weight, merged.flatten(1))
    assert small(packs[0]).isfinite().all()


def test_importance_is_of_documents_not_of_rows(packs, make_document, make_pack):
    """Documents packed together or alone, in any order, count alike; the tail and packs without an image count nothing."""
    model = build_model(config_of(False), 0, dtype=torch.float64)
    runs = [("text", 9), ("image", 2), ("text", 5)], [("text", 7)], [("text", 11)]
    documents = [make_document(of_one, seed) for seed, of_one in enumerate(runs, 1)]
    apart = measure_importance(model, [make_pack([document]) for document in reversed(documents)])
    together = measure_importance(model, packs)
    for one, other in ((apart.vision, together.vision), (apart.language, together.language)):
        assert torch.allclose(one.channels, other.channels, rtol=1e-10)
        for a, b in zip(one.blocks, other.blocks, strict=True):
            assert torch.allclose(a.heads, b.heads, rtol=1e-10)
            assert torch.allclose(a.neurons, b.neurons, rtol=1e-10)
            assert a.influence == pytest.approx(b.influence, rel=1e-10)


def test_importance_is_the_norm_over_documents_of_the_mean_over_rows(packs):
    model = build_model(config_of(False), 0, dtype=torch.float64)
    block, seen = model.language.blocks["2"], {}
    hooks = [
        block.down.register_forward_pre_hook(lambda _, args: seen.update(neurons=args[0].abs())),
        block.attention.out.register_forward_pre_hook(
            lambda _, args: seen.update(heads=args[0].view(-1, 6, 4).square().sum(-1).sqrt())
        ),
    ]
    found = measure_importance(model, packs[:1]).language.blocks[2]
    for hook in hooks:
        hook.remove()
    ends = (packs[0].positions == 0).nonzero().flatten().tolist()[1:2]
    rows = [slice(0, ends[0]), slice(ends[0], int((packs[0].kv_end > packs[0].kv_start).sum()))]
    for name, values in seen.items():
        want = torch.stack([values[one].mean(0) for one in rows]).square().sum(0).sqrt()
        assert torch.allclose(getattr(found, name), want, rtol=1e-12), name


def test_what_cannot_be_pruned_is_listed():
    larger = config_of(False)
    wrong = larger.model_copy(
        update={
            "language": larger.language.model_copy(update={"num_kv_heads": 1, "width": 16, "head_dim": 8, "tie_embeddings": False}),
            "vision": larger.vision.model_copy(update={"num_heads": 1, "tile": 8}),
        }
    )
    found = "\n".join(differences(larger, wrong))
    parts = ["language.width: 16 is more than the 15", "head_dim: 8, where it is 4", "tie_embeddings", "6 query heads"]
    for part in [*parts, "width / num_heads", "vision.tile"]:
        assert part in found
