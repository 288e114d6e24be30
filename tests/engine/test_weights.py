"""Weights of Hugging Face folders, in and out, against transformers' own models at random tiny sizes."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PIL_Image

from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.images import ImageLimits, decode_tiles
from smalt.engine.data.records import Image, Record
from smalt.engine.export import export_run
from smalt.engine.weights.folder import read_json
from smalt.engine.weights.load import open_weights
from smalt.engine.weights.settings import language_config, vision_config
from smalt.model import LanguageConfig, ModelConfig, VisionConfig, YarnConfig, build_model
from smalt.model.batch import see_as
from smalt.model.init import initialize
from smalt.model.tiling import Grid, ImageShape
from smalt.parallel import ParallelModel, alone

from .exact import exactly, randomised

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # its import alone takes seconds

EXACT = 1e-10
VISION = VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=6)
LANGUAGE = LanguageConfig(num_layers=1, width=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn=12, vocabulary=40)


@st.composite
def decoders(draw):
    """A family, and a decoder that it has: grouped queries, heads of any size, tied or not."""
    family, kv_heads = draw(st.sampled_from(["llama", "qwen2", "qwen3"])), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    return family, LanguageConfig(
        num_layers=draw(st.integers(1, 2)), width=draw(st.integers(1, 2)) * heads + (family != "llama"), num_heads=heads,
        num_kv_heads=kv_heads, head_dim=2 * draw(st.integers(1, 5)), ffn=draw(st.integers(2, 16)), vocabulary=draw(st.integers(2, 20)),
        rope_theta=draw(st.sampled_from([100.0, 1e4, 1e6])), norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3", tie_embeddings=draw(st.booleans()), yarn=draw(st.none() | yarns()),
    )  # fmt: skip


def yarns():
    return st.builds(
        YarnConfig, factor=st.sampled_from([1.0, 4.0, 8.5]), original_length=st.integers(2, 64),
        beta_fast=st.sampled_from([32.0, 3.0]), beta_slow=st.sampled_from([1.0, 0.25]),
        attention_factor=st.none() | st.sampled_from([0.7, 1.3]), truncate=st.booleans(),
    )  # fmt: skip


@st.composite
def towers(draw):
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return VisionConfig(
        num_layers=draw(st.integers(1, 2)), width=heads * draw(st.integers(1, 4)), num_heads=heads, ffn=draw(st.integers(2, 12)),
        patch=patch, tile=patch * draw(st.integers(1, 4)), norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
    )  # fmt: skip


def scaling(yarn):
    if yarn is None:
        return {"rope_type": "default"}
    names = {"original_length": "original_max_position_embeddings"}
    return {"rope_type": "yarn"} | {names.get(key, key): value for key, value in yarn.model_dump(exclude_none=True).items()}


def theirs_of(family, c):
    sizes = {
        "vocab_size": c.vocabulary, "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings, "rope_parameters": {"rope_theta": c.rope_theta, **scaling(c.yarn)},
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return randomised(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes)))


def loaded(folder, part, config):
    """A model with one part from a folder."""
    model = ParallelModel(config, alone(torch.device("cpu")), 0, torch.float64, (), 16)
    with open_weights(folder, part, config, 0) as values:
        model.fill(values)
    return model.parts[0]


def logits(model, tokens):
    """[T, V] of one document."""
    positions = torch.arange(len(tokens), dtype=torch.int32)
    rows = model.language.rows(positions, torch.zeros_like(positions), positions + 1, torch.float64)
    return model.language(model.language.embedding(tokens), rows) @ model.language.head_weight.T


def assert_same_bits(got, want, part):
    want = {name: p for name, p in want.named_parameters() if name.startswith(part)}
    got = dict(got.named_parameters())
    assert want
    assert not [name for name, p in want.items() if not torch.equal(got[name], p)]


@given(drawn=decoders(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_decoder_has_the_logits_of_transformers(drawn, data, error):
    family, config = drawn
    theirs = theirs_of(family, config)
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, config.vocabulary - 1), min_size=1, max_size=12)))
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        theirs.save_pretrained(name, max_shard_size=data.draw(st.sampled_from(["1KB", "5GB"])))
        assert language_config(read_json(Path(name) / "config.json"), "") == config
        ours = loaded(Path(name), "language", ModelConfig(language=config, vision=VISION))
        assert error(logits(ours, tokens), theirs(tokens[None]).logits[0]) < 1e-4
        assert error(logits(ours, tokens), exactly(theirs)(tokens[None]).logits[0]) < EXACT


@given(config=towers(), whole=st.booleans(), naflex=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_tower_has_the_features_of_transformers(config, whole, naflex, error):
    kind = "siglip2" if naflex else "siglip"
    sizes = {
        "hidden_size": config.width, "intermediate_size": config.ffn, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "patch_size": config.patch, "layer_norm_eps": config.norm_eps,
        "num_patches" if naflex else "image_size": config.grid**2 if naflex else config.tile,
    }  # fmt: skip
    text = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    settings_there = (
        transformers.AutoConfig.for_model(kind, vision_config=sizes, text_config=text)
        if whole
        else transformers.AutoConfig.for_model(f"{kind}_vision_model", **sizes)
    )
    theirs = randomised(transformers.AutoModel.from_config(settings_there))
    tower = theirs.vision_model if whole else theirs
    with torch.no_grad():  # their NaFlex form rounds positions to float32
        tower.embeddings.position_embedding.weight.copy_(tower.embeddings.position_embedding.weight.float())
    tiles = torch.randn(2, 3, config.tile, config.tile, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = {"pixel_values": tiles}
    if naflex:
        g, p = config.grid, config.patch
        patches = tiles.view(2, 3, g, p, g, p).permute(0, 2, 4, 3, 5, 1).reshape(2, g * g, -1)
        inputs = {
            "pixel_values": patches, "pixel_attention_mask": torch.ones(2, g * g), "spatial_shapes": torch.full((2, 2), g)
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        theirs.save_pretrained(name)
        assert vision_config(read_json(Path(name) / "config.json"), "") == config
        ours = loaded(Path(name), "vision", ModelConfig(vision=config, language=LANGUAGE))
        assert error(ours.vision(tiles).flatten(1, 2), tower(**inputs).last_hidden_state) < EXACT


@given(drawn=decoders())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_exported_decoder_is_that_of_transformers_and_comes_back(drawn, save_run, error):
    _, config = drawn
    config = config.model_copy(update={"vocabulary": 320})  # of the run's tokenizer
    own = randomised(build_model(ModelConfig(language=config, vision=VISION), 0))
    tokens = torch.arange(0, 20)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        out = Path(name) / "out"
        export_run(save_run(Path(name) / "run", own), out, part="language")
        theirs, said = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64, output_loading_info=True)
        assert not any(said.values()), said
        assert error(logits(own, tokens), exactly(theirs.eval())(tokens[None]).logits[0]) < EXACT
        assert_same_bits(loaded(out, "language", own.config), own, "language")


@given(config=towers())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_exported_tower_is_that_of_transformers_and_comes_back(config, save_run, error):
    own = randomised(build_model(ModelConfig(vision=config, language=LANGUAGE.model_copy(update={"vocabulary": 320})), 0))
    tiles = torch.randn(2, 3, config.tile, config.tile, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        out = Path(name) / "out"
        export_run(save_run(Path(name) / "run", own), out, part="vision")
        theirs, said = transformers.SiglipVisionModel.from_pretrained(out, dtype=torch.float64, output_loading_info=True)
        assert not any(said.values()), said
        assert error(own.vision(tiles).flatten(1, 2), theirs.eval()(tiles).last_hidden_state) < EXACT
        assert_same_bits(loaded(out, "vision", own.config), own, "vision")


def test_an_exported_tokenizer_and_its_template_make_the_tokens_of_smalt(digits, save_run, tmp_path):
    own = build_model(ModelConfig(vision=VISION, language=LANGUAGE.model_copy(update={"vocabulary": 320})), 0)
    export_run(save_run(tmp_path / "run", own), tmp_path / "out", part="language")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    encoder = ChatEncoder.load(digits / "tokenizer.json", ImageShape(6, 4), 320, ImageLimits())
    turns = [("system", "be brief"), ("user", " add 1, 2"), ("assistant", " <think>1+2</think>3"), ("user", "é?\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for mode in ("think", "answer"):
        want = encoder.prompt(Record(tuple(turns), ()), mode).tokens.tolist()
        got = theirs.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=mode == "think", return_dict=False)
        assert got == want
    assert theirs.eos_token_id == encoder.control.end
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == encoder.control.end


def test_an_image_processor_makes_the_tile_of_smalt(save_run, tmp_path):
    own = build_model(ModelConfig(vision=VISION, language=LANGUAGE), 0)
    export_run(save_run(tmp_path / "run", own), tmp_path / "out", part="vision")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    path, noise = tmp_path / "noise.png", torch.randint(0, 256, (11, 11, 3), generator=torch.Generator().manual_seed(0))
    PIL_Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    got = processor(PIL_Image.open(path), return_tensors="pt")["pixel_values"]
    tiles = decode_tiles(Image(None, str(path)), Grid(1, 1), VISION.tile, ImageLimits())
    assert (got - see_as(torch.from_numpy(tiles), torch.float32)).abs().max() < 1e-6


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_of_the_vocabulary_are_near_the_mean(tie, tmp_path):
    family, small = "llama", LANGUAGE.model_copy(update={"vocabulary": 17, "tie_embeddings": tie})
    theirs = theirs_of(family, small)
    theirs.save_pretrained(tmp_path)
    larger = ModelConfig(language=small.model_copy(update={"vocabulary": 23}), vision=VISION, init_std=1e-3)
    ours = dict(loaded(tmp_path, "language", larger).named_parameters())
    fresh = build_model(larger, 0)
    initialize(fresh, 0)
    names = ["language.embedding.weight"] + ([] if tie else ["language.head.weight"])
    for name, matrix in zip(names, [theirs.model.embed_tokens.weight, theirs.lm_head.weight], strict=False):
        assert torch.equal(ours[name][:17], matrix)
        new = matrix.mean(0) + dict(fresh.named_parameters())[name][17:]
        torch.testing.assert_close(ours[name][17:], new, rtol=1e-12, atol=1e-12)
        assert len(ours[name][17:].unique(dim=0)) == 6
