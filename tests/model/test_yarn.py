"""YaRN in the decoder: it is that of transformers, and everything that computes positions has it."""

import pytest
import torch

from smalt.model import YarnConfig, build_model
from smalt.model.generate import Sampling, generate
from smalt.parallel import ParallelModel, alone

YARN = YarnConfig(factor=4.0, original_length=8, beta_fast=4.0)


@pytest.fixture(scope="module")
def document(make_document):
    return make_document([("text", 9), ("image", 1), ("text", 12)])


def test_a_factor_of_one_is_plain(make_config):
    tables = []
    for yarn in (None, YarnConfig(factor=1.0, original_length=8)):
        model = build_model(make_config(yarn=yarn), 0, dtype=torch.float64)
        tables.append(model.language.rotary(torch.arange(64), torch.float64))
    for plain, scaled in zip(*tables, strict=True):
        assert torch.equal(plain, scaled)


def test_weights_and_shapes_are_those_without_it(make_model):
    plain, scaled = make_model().state_dict(), make_model(yarn=YARN).state_dict()
    assert plain.keys() == scaled.keys()
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def test_a_rank_and_a_decode_step_have_it(make_model, make_config, document, make_pack, control):
    model = make_model(yarn=YARN)
    batch = make_pack([document])
    want = model(batch)
    assert (want - make_model()(batch)).abs().max() > 0.01
    world = alone(torch.device("cpu"))
    part = ParallelModel(make_config(yarn=YARN), world, 0, torch.float64, ("language",), len(document))
    found = part.evaluate([batch], lambda nll, shard: nll.sum(), 1)
    assert torch.allclose(found, want.double().sum(), rtol=1e-12)
    cached, whole = (generate(model, [document], control, Sampling(max_tokens=20), use_cache=use) for use in (True, False))
    assert cached[0].tokens == whole[0].tokens
    assert cached[0].log_probs == pytest.approx(whole[0].log_probs, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.3}, {"truncate": False}], ids=str
)
def test_the_table_is_that_of_transformers(make_model, monkeypatch, options):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import Qwen2Config

    yarn = YarnConfig(factor=8.0, original_length=64, **options)
    model = make_model(head_dim=32, rope_theta=200.0, yarn=yarn)
    positions = torch.arange(512)
    cos, sin = model.language.rotary(positions, torch.float64)
    names = {"original_length": "original_max_position_embeddings"}
    parameters = {names.get(key, key): value for key, value in yarn.model_dump().items() if value is not None}
    config = Qwen2Config(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512,
        rope_parameters={"rope_type": "yarn", "rope_theta": 200.0, **parameters},
    )  # fmt: skip
    # It computes in float32 whatever the default is.
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    frequencies, magnitude = rope_utils._compute_yarn_parameters(config)
    angle = positions[:, None] * frequencies
    assert frequencies.dtype == torch.float64
    assert torch.allclose(cos, angle.cos() * magnitude, rtol=0, atol=1e-12)
    assert torch.allclose(sin, angle.sin() * magnitude, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"factor": 0.5}, "greater than or equal to 1"),
        ({"original_length": 0}, "greater than or equal to 1"),
        ({"beta_slow": 40.0}, "beta_slow 40.0 is above beta_fast 32.0"),
        ({"attention_factor": 0.0}, "greater than 0"),
        ({"length": 3}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_be_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        YarnConfig(**{"factor": 8.0, "original_length": 64, **values})
