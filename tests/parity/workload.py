"""What every row of the matrix trains: a small model with everything that has gone wrong in engines, on packs of many kinds."""

import numpy as np
import torch

from smalt.model import Document, LanguageConfig, ModelConfig, PackedBatch, VisionConfig, YarnConfig, build_model, pack

LENGTH, STEPS, PACKS = 64, 3, 8
MAX_NORM = 0.5
VISION = VisionConfig(num_layers=2, width=8, num_heads=2, ffn=12, patch=2, tile=6, merge=2)  # 4 tokens a tile
# Key biases and QK-norm, a tied head, grouped queries; four blocks, for four pipeline stages.
LANGUAGE = LanguageConfig(
    num_layers=4,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn=24,
    vocabulary=26,
    rope_theta=100.0,
    qkv_bias=True,
    qk_norm=True,
)
ALL = ("vision", "projector", "language")
TRAINABLE = {"all": ALL, "frozen tower": ("projector", "language"), "projector only": ("projector",)}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
# Runs of tokens and tiles, document by document, of packs of 64: spans and borders fall anywhere.
LAYOUTS = [
    [[("text", 5), ("image", 3), ("text", 9)], [("text", 21)], [("image", 1), ("text", 4)]],
    [[("text", 64)]],
    [],
    [[("image", 9), ("text", 3)], [("text", 2), ("image", 2), ("text", 7)]],
    [[("text", 1)], [("text", 1)], [("text", 30), ("image", 1), ("text", 6), ("image", 4), ("text", 6)]],
    [[("text", 17)], [("text", 13), ("image", 5), ("text", 14)]],
    [[("silent", 40)]],
    [[("text", 11), ("image", 1), ("text", 44), ("image", 1)]],
]


def make_config(variant):
    yarn = YarnConfig(factor=4.0, original_length=16) if "yarn" in variant else None
    language = LANGUAGE.model_copy(update={"tie_embeddings": "untied" not in variant, "yarn": yarn})
    return ModelConfig(vision=VISION, language=language, image_attention="bidirectional", init_std=0.4)


def make_document(runs, rng):
    length, tiles, spans, silent = 0, 0, [], False
    for kind, count in runs:
        rows = count * VISION.tokens_per_tile if kind == "image" else count
        if kind == "image":
            spans.append((length, length + rows))
            tiles += count
        silent |= kind == "silent"
        length += rows
    return Document(
        tokens=rng.integers(0, LANGUAGE.vocabulary, length),
        targets=np.zeros(length, bool) if silent else rng.random(length) < 0.8,
        image_index=np.concatenate([np.arange(low, high) for low, high in spans] or [np.zeros(0, np.int64)]),
        tiles=rng.standard_normal((tiles, 3, VISION.tile, VISION.tile)).astype(np.float32),
        spans=np.array(spans, np.int64).reshape(-1, 2),
    )


def make_steps(variant, dtype):
    """STEPS lists of PACKS packs. "text": without an image."""
    steps = []
    for step in range(STEPS):
        packs = []
        for number in range(PACKS):
            rng = np.random.default_rng((step, number))
            layout = LAYOUTS[(number + 3 * step) % len(LAYOUTS)]
            if "text" in variant:
                layout = [[(kind if kind != "image" else "text", count) for kind, count in runs] for runs in layout]
            one = pack([make_document(runs, rng) for runs in layout], LENGTH, "bidirectional", VISION.tile)
            weight = one.loss_weight * torch.from_numpy(rng.uniform(0.5, 1.5, LENGTH)).float()
            packs.append(PackedBatch(**{**one.__dict__, "loss_weight": weight, "tiles": one.tiles.to(dtype)}))
        steps.append(packs)
    return steps


def denominator(packs):
    return float(sum((one.labels >= 0).sum() for one in packs))


def make_optimizer(parameters):
    # A large epsilon: the gradient of SigLIP's key bias is zero but for rounding, which AdamW would divide by its own size.
    return torch.optim.AdamW(list(parameters), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True)


def norm_of(tensors):
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


def losses(model, one, rounded):
    if not rounded:
        return model(one)
    # Weights are rounded wherever they are used; what they are rounded from gets the gradient.
    weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        return torch.func.functional_call(model, weights, one)


def pack_loss(nll, shard):
    return (nll * shard.loss_weight).sum()


def train_layout(model, optimizer, steps, gradients_of):
    """What :func:`run_reference` finds, of a model on a layout. gradients_of(model): every gradient whole, by name."""
    world = model.world
    result = {"loss": [], "norm": [], "clipped": [], "initial": {n: p.clone() for n, p in model.full_state().items()}}
    for step, packs in enumerate(steps):
        mine, total = packs[world.replica :: world.num_replicas], denominator(packs)
        if step == 0:
            result["evaluated"] = float(world.sum(model.evaluate(mine, pack_loss, len(mine)))) / total
        loss = model.accumulate(mine, lambda nll, shard, total=total: pack_loss(nll, shard) / total)
        result["loss"].append(float(world.sum(loss)))
        if step == 0:
            result["gradients"] = gradients_of(model)
        result["norm"].append(model.clip_gradients(MAX_NORM))
        result["clipped"].append(model.gradient_norm())
        optimizer.step()
        optimizer.zero_grad()
    return result | {"parameters": {n: p.clone() for n, p in model.full_state().items()}}


def run_reference(variant, trainable, dtype):
    """The plain model in one process: no mesh, no ranks, nothing of smalt.parallel."""
    model = build_model(make_config(variant), seed=0, dtype=DTYPES[dtype])
    for name, part in model.named_children():
        part.requires_grad_(name in TRAINABLE[trainable])
    optimizer = make_optimizer(model.parameters())
    result = {"loss": [], "norm": [], "clipped": [], "initial": {n: p.detach().clone() for n, p in model.named_parameters()}}
    for step, packs in enumerate(make_steps(variant, DTYPES[dtype])):
        total = 0.0
        for one in packs:
            loss = (losses(model, one, dtype == "bfloat16") * one.loss_weight).sum() / denominator(packs)
            loss.backward()
            total += loss.item()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = norm_of(grads)
        if step == 0:
            result["gradients"] = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        for grad in grads:
            grad *= min(1.0, MAX_NORM / norm)
        result["loss"].append(total)
        result["norm"].append(norm)
        result["clipped"].append(norm_of(grads))
        optimizer.step()
        optimizer.zero_grad()
    result["evaluated"] = result["loss"][0]
    result["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return result
