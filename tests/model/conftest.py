"""A model of a few thousand parameters, and documents for it. Weights are large, so that no part of the model is nearly linear."""

import numpy as np
import pytest
import torch

from smalt.model import Document, LanguageConfig, ModelConfig, VisionConfig, build_model, pack
from smalt.model.generate import ControlTokens

VISION = VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=6, merge=2)  # a 3 x 3 grid, padded to 4 x 4
LANGUAGE = LanguageConfig(num_layers=2, width=12, num_heads=4, num_kv_heads=2, head_dim=4, ffn=16, vocabulary=24, rope_theta=100.0)


@pytest.fixture(scope="session")
def make_config():
    """make_config(image_attention="bidirectional", init_std=0.4, **fields of LanguageConfig)."""

    def make(image_attention="bidirectional", init_std=0.4, **language):
        decoder = LANGUAGE.model_copy(update=language)
        return ModelConfig(vision=VISION, language=decoder, image_attention=image_attention, init_std=init_std)

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """make_model(seed=0, **what make_config takes), in float64."""
    return lambda seed=0, **kwargs: build_model(make_config(**kwargs), seed, dtype=torch.float64)


@pytest.fixture(scope="session")
def make_document():
    """make_document(runs, seed=0, last=None): runs are ("text", tokens) and ("image", tiles); last replaces the last token."""

    def make(runs, seed=0, last=None):
        rng = np.random.default_rng(seed)
        length, tiles, spans = 0, 0, []
        for kind, count in runs:
            rows = count * VISION.tokens_per_tile if kind == "image" else count
            if kind == "image":
                spans.append((length, length + rows))
                tiles += count
            length += rows
        tokens = rng.integers(6, 24, length)
        if last is not None:
            tokens[-1] = last
        return Document(
            tokens=tokens,
            targets=rng.random(length) < 0.8,
            image_index=np.concatenate([np.arange(low, high) for low, high in spans] or [np.zeros(0, np.int64)]),
            tiles=rng.standard_normal((tiles, 3, VISION.tile, VISION.tile)).astype(np.float32),
            spans=np.array(spans, np.int64).reshape(-1, 2),
        )

    return make


@pytest.fixture(scope="session")
def make_pack():
    """make_pack(documents, tail=0, image_attention="bidirectional"), tiles in float64."""

    def make(documents, tail=0, image_attention="bidirectional"):
        return pack(documents, sum(map(len, documents)) + tail, image_attention, VISION.tile).to("cpu", torch.float64)

    return make


@pytest.fixture(scope="session")
def control():
    return ControlTokens(think_start=2, think_end=3, end=4, close=(5, 3))


@pytest.fixture(scope="session")
def policy(make_pack):
    """policy(model, document, temperature=1): log-probabilities [L, V] of what follows each token, by one plain forward pass."""

    def log_probs(model, document, temperature=1.0):
        with torch.no_grad():
            hidden = model.hidden(make_pack([document], 0, model.config.image_attention))
            return torch.log_softmax(hidden @ model.language.head_weight.T / temperature, -1)

    return log_probs
