"""Hugging Face folders that do not fit: every error lists all that is wrong. No transformers here."""

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from smalt.engine.config import parse_config
from smalt.engine.data.chat import SPECIAL_TOKENS
from smalt.engine.errors import UserError
from smalt.engine.sections import InitConfig
from smalt.engine.weights.describe import describe_folder, write_tokenizer
from smalt.engine.weights.folder import open_folder
from smalt.engine.weights.load import PREFIXES, open_weights, transformers_layout
from smalt.engine.weights.settings import language_config, language_json, vision_config, vision_json
from smalt.model import LanguageConfig, ModelConfig, VisionConfig, YarnConfig, build_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vision=VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=6),
    language=LanguageConfig(num_layers=2, width=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn=12, vocabulary=20),
)
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 20,
}  # fmt: skip


def write_folder(folder, part, config=CONFIG, change=lambda tensors: None, **settings):
    """A folder of random weights; change(tensors) alters what is written; settings: other values of its config.json."""
    own = dict(build_model(config, 3).named_parameters())
    layout = transformers_layout(config, part, PREFIXES[part])
    tensors = {name: own[twin.own].detach().view(twin.shape) for name, twin in layout.items()}
    change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    made = language_json(config.language, 64, None, "float32") if part == "language" else vision_json(config.vision, "float32")
    (folder / "config.json").write_text(json.dumps(made | settings))
    return own


def refusal(folder, part, config=CONFIG):
    with pytest.raises(UserError) as refused, open_weights(folder, part, config, 0):
        pass
    return str(refused.value)


def test_what_a_config_leaves_out_is_what_transformers_has_then():
    assert language_config(LLAMA, "") == CONFIG.language.model_copy(
        update={"num_kv_heads": 2, "rope_theta": 10_000.0, "tie_embeddings": False}
    )
    # Versions 4 and 5 keep the base of RoPE in different places.
    for theta in ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        assert language_config(LLAMA | theta, "").rope_theta == 5e5
    assert language_config(LLAMA | {"model_type": "qwen3", "num_key_value_heads": 1}, "").head_dim == 128
    assert language_config(LLAMA | {"model_type": "qwen2", "num_key_value_heads": 1}, "").qkv_bias
    base = vision_config({"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}, "")
    assert (base.num_layers, base.width, base.num_heads, base.ffn, base.patch, base.tile) == (12, 768, 12, 3072, 16, 224)
    # 27 patches of 14 pixels are seen of 384.
    assert vision_config({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, "").tile == 378
    assert vision_config({"model_type": "siglip2", "vision_config": {"num_patches": 256}}, "").grid == 16


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_what_the_decoder_cannot_do_is_named(key, value):
    with pytest.raises(UserError, match=key):
        language_config(LLAMA | {key: value}, "config.json")


def test_everything_that_is_wrong_with_a_config_is_listed():
    raw = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    with pytest.raises(UserError) as refused:
        language_config(raw | {"mlp_bias": True, "attention_bias": True}, "FOLDER/config.json")
    assert all(
        word in str(refused.value) for word in ("FOLDER/config.json", "intermediate_size is missing", "mlp_bias", "attention_bias")
    )
    with pytest.raises(UserError, match=r"num_heads 3 is not a multiple of num_kv_heads 2"):
        language_config(LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 2}, "")
    with pytest.raises(UserError, match="model_type is 'mixtral'; a language model is one of llama, qwen2, qwen3"):
        language_config({"model_type": "mixtral"}, "")
    with pytest.raises(UserError, match="num_hidden_layers is 0, hidden_size is '8'; sizes are whole numbers above 0"):
        language_config(LLAMA | {"num_hidden_layers": 0, "hidden_size": "8"}, "")
    with pytest.raises(UserError, match="model_type is 'clip'"):
        vision_config({"model_type": "clip"}, "")
    with pytest.raises(UserError, match="num_patches is 200, which is no square"):
        vision_config({"model_type": "siglip2_vision_model", "num_patches": 200}, "")


def test_every_difference_from_the_config_is_listed(tmp_path):
    other = CONFIG.model_copy(
        update={
            "language": CONFIG.language.model_copy(update={"ffn": 16, "rope_theta": 500.0, "vocabulary": 21, "tie_embeddings": False})
        }
    )
    write_folder(tmp_path, "language", other)
    assert refusal(tmp_path, "language") == (
        f"init.language = {tmp_path} holds another model than the config; `smalt model {tmp_path}` prints the section that fits:\n"
        "  model.language.ffn is 12, the folder's 16\n"
        "  model.language.vocabulary is 20, the folder's 21\n"
        "  model.language.rope_theta is 1000000.0, the folder's 500.0\n"
        "  model.language.tie_embeddings is true, the folder's false"
    )


def test_every_tensor_is_accounted_for(tmp_path):
    def change(tensors):
        tensors["model.layers.0.mlp.experts.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(9)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(12, 8, dtype=torch.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)  # of old files, and ignored
        del tensors["model.layers.0.self_attn.k_proj.weight"]

    write_folder(tmp_path, "language", change=change)
    assert refusal(tmp_path, "language") == (
        f"{tmp_path} does not hold the weights that its config.json describes:\n"
        "  missing: model.layers.0.self_attn.k_proj.weight\n"
        "  unexpected: model.layers.0.mlp.experts.weight\n"
        "  of another type: model.layers.1.mlp.up_proj.weight is I8; only floating-point numbers are read\n"
        "  of another shape: model.norm.weight is [9], and should be [8]"
    )


def test_a_tied_head_that_is_there_must_be_the_embedding(tmp_path):
    write_folder(tmp_path, "language", change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    with open_weights(tmp_path, "language", CONFIG, 0) as values:
        assert "language.head.weight" not in values
    write_folder(tmp_path, "language", change=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "unexpected: lm_head.weight, which is not model.embed_tokens.weight" in refusal(tmp_path, "language")


def test_the_pooling_head_and_the_text_part_are_ignored_and_nothing_else(tmp_path):
    def change(tensors):
        for name in ("vision_model.head.probe", "text_model.final_layer_norm.bias", "logit_scale", "logit_bias"):
            tensors[name] = torch.zeros(1)

    own = write_folder(tmp_path, "vision", change=change)
    with open_weights(tmp_path, "vision", CONFIG, 0) as values:
        assert values.keys() == {name for name in own if name.startswith("vision.")}
        weight = own["vision.patch_embed.weight"]
        assert torch.equal(values["vision.patch_embed.weight"](((1, 5), (2, 11))), weight[1:5, 2:11])
        assert values["vision.position"](((3, 3), (0, 8))).shape == (0, 8)
    write_folder(tmp_path, "vision", change=lambda tensors: tensors.update({"vision_model.extra": torch.zeros(1)}))
    assert "unexpected: vision_model.extra" in refusal(tmp_path, "vision")


def test_a_part_of_the_new_rows_is_a_part_of_all(tmp_path):
    own = write_folder(tmp_path, "language")["language.embedding.weight"]
    larger = CONFIG.model_copy(update={"language": CONFIG.language.model_copy(update={"vocabulary": 26})})
    with open_weights(tmp_path, "language", larger, 0) as values:
        read = values["language.embedding.weight"]
        whole = read(((0, 26), (0, 8)))
        assert torch.equal(whole[:20], own)
        assert (whole[20:] - own.mean(0)).abs().max() < 5 * larger.init_std
        for bounds in (((0, 20), (2, 5)), ((18, 24), (2, 5)), ((22, 26), (0, 8)), ((26, 26), (0, 8))):
            rows, columns = (slice(*b) for b in bounds)
            assert torch.equal(read(bounds), whole[rows, columns])


def test_damaged_folders_are_named(tmp_path):
    assert f"{tmp_path / 'config.json'} does not exist" in refusal(tmp_path, "language")
    write_folder(tmp_path, "language")
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    names = list(load_file(file))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}))
    assert "model-00002-of-00002.safetensors cannot be read" in refusal(tmp_path, "language")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}))
    assert "names files outside of its folder: ../elsewhere.safetensors" in refusal(tmp_path, "language")
    index.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path, "language")
    index.unlink()
    file.write_bytes(file.read_bytes()[:-8])
    assert f"{file} cannot be read" in refusal(tmp_path, "language")
    file.unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path, "language")
    (tmp_path / "config.json").write_text("[1]")
    assert "holds no JSON object" in refusal(tmp_path, "language")


def test_a_decoder_that_transformers_lacks_is_not_exported():
    both = CONFIG.language.model_copy(update={"qkv_bias": True, "qk_norm": True})
    with pytest.raises(UserError, match="no decoder with both"):
        language_json(both, 8, None, "float32")
    with pytest.raises(UserError, match="a multiple of its heads"):
        language_json(CONFIG.language.model_copy(update={"width": 9}), 8, None, "float32")


def test_the_sections_that_are_printed_fit_the_folder(tmp_path):
    model, init = {}, {}
    for part in ("language", "vision"):
        write_folder(tmp_path / part, part)
        printed = tomllib.loads(describe_folder(tmp_path / part, num_tokens=33))
        model |= printed["model"]
        init |= printed["init"]
    config = ModelConfig.model_validate(model)
    assert config.vision == CONFIG.vision
    assert config.language == CONFIG.language.model_copy(update={"vocabulary": 33})
    assert InitConfig.model_validate(init) == InitConfig(language=tmp_path / "language", vision=tmp_path / "vision")
    with open_weights(tmp_path / "language", "language", config, 0) as opened:
        assert opened["language.embedding.weight"](((0, 33), (0, 8))).shape == (33, 8)


def test_a_tokenizer_gets_the_special_tokens_of_the_template(tmp_path):
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])  # as Qwen3 has it: not special
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert write_tokenizer(tmp_path, tmp_path / "new" / "tokenizer.json") == 256 + len(SPECIAL_TOKENS)
    written = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert written.token_to_id("<think>") == 256
    for token in SPECIAL_TOKENS:
        assert written.encode(f"a{token}b").ids == [64, written.token_to_id(token), 65]
    written.encode_special_tokens = True  # of the text of a message
    assert max(written.encode("".join(SPECIAL_TOKENS)).ids) < 256


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_its_folders_and_goes_on_without_them(tiny_config, tiny_values, tmp_path, train):
    config = parse_config(tiny_values(), "").model
    own = write_folder(tmp_path / "language", "language", config)
    own |= {name: p for name, p in write_folder(tmp_path / "vision", "vision", config).items() if name.startswith("vision")}
    init = {"init.language": tmp_path / "language", "init.vision": tmp_path / "vision", "checkpoint.every": 1, "checkpoint.keep": 9}
    run = tmp_path / "run"
    train([tiny_config(init), "--folder", run], nproc=2)
    found = {}
    for shard in (run / "checkpoints" / "step-00000001").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            found.setdefault(name.removeprefix("model."), []).append(tensor)
    # The first stage trains the projector alone; two ranks have the halves of everything.
    frozen = [name for name in own if not name.startswith("projector")]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(torch.cat(found[name]).reshape(-1)[: own[name].numel()], own[name].reshape(-1)), name
    for path in (tmp_path / "language", tmp_path / "vision"):
        (path / "model.safetensors").unlink()
    train(["--folder", run, "--resume"])


@pytest.mark.slow
def test_a_folder_that_does_not_fit_ends_the_command_with_one_message(tiny_config, tmp_path, train):
    write_folder(tmp_path / "language", "language")
    done = train([tiny_config({"init.language": tmp_path / "language"}), "--folder", tmp_path / "run"], nproc=2, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"error: init.language = {tmp_path / 'language'} holds another model than the config") == 1


@pytest.mark.slow
def test_the_command_prints_the_section_and_names_what_it_cannot_read(tmp_path):
    write_folder(tmp_path, "language")
    command = [sys.executable, "-m", "smalt.engine.cli", "model", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == describe_folder(tmp_path) + "\n"
    done = subprocess.run([*command, "--tokenizer", tmp_path / "out.json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'tokenizer.json'} cannot be read")


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


def test_yarn_goes_out_as_transformers_writes_it_and_comes_in():
    yarn = YarnConfig(factor=8.0, original_length=64, beta_fast=16.0)
    config = CONFIG.language.model_copy(update={"yarn": yarn})
    written = language_json(config, 512, None, "float32")
    assert written["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": CONFIG.language.rope_theta, "factor": 8.0, "original_max_position_embeddings": 64,
        "beta_fast": 16.0, "beta_slow": 1.0, "truncate": True,
    }  # fmt: skip
    # Version 4 reads this, and the base beside it.
    assert written["rope_scaling"] == {key: value for key, value in written["rope_parameters"].items() if key != "rope_theta"}
    assert written["rope_theta"] == CONFIG.language.rope_theta
    assert "rope_scaling" not in language_json(CONFIG.language, 512, None, "float32")
    assert language_config(written, "") == config


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}},
            {"factor": 4.0},
        ),  # as Qwen2.5 has it
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32}, {"factor": 4.0, "original_length": 32}),
        ({"rope_parameters": YARN | {"beta_fast": None, "attention_factor": None, "truncate": False}}, {"truncate": False}),
        (
            {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}},
            {"attention_factor": (0.05 * math.log(8) + 1) / (0.1 * math.log(8) + 1)},
        ),
    ],
)
def test_yarn_as_it_is_spelled(raw, want):
    found = language_config(LLAMA | raw, "").yarn
    plain = {"factor": 8.0, "original_length": 64, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}
    assert found.model_dump() == plain | want


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"factor": 0.5}, "factor: Input should be greater than or equal to 1"),
        ({"factor": "8"}, "factor: Input should be a valid number"),
        ({"factor": None}, "factor: Field required"),
        ({"original_max_position_embeddings": 64.5}, "original_max_position_embeddings: Input should be a valid integer"),
        ({"beta_slow": 40.0}, "beta_slow 40.0 is above beta_fast 32.0"),
        ({"truncate": None}, "truncate: Input should be a valid boolean"),
        ({"mscale": 1.0}, "mscale or mscale_all_dim; they are supported together"),
        ({"long_factor": [1.0]}, "long_factor, which Smalt's YaRN does not know"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; only 1.0 is supported"),
    ],
)
def test_yarn_that_does_not_fit_is_named_by_its_key(value, said):
    with pytest.raises(UserError, match=said):
        language_config(LLAMA | {"rope_parameters": YARN | value}, "config.json")


def test_a_folder_of_another_yarn_is_refused_and_its_section_printed(tmp_path):
    yarn = YarnConfig(factor=8.0, original_length=64)
    scaled = CONFIG.model_copy(update={"language": CONFIG.language.model_copy(update={"yarn": yarn})})
    write_folder(tmp_path, "language", scaled)
    printed = tomllib.loads(describe_folder(tmp_path))["model"]["language"]
    assert LanguageConfig.model_validate(printed) == scaled.language
    assert "model.language.yarn is not set, the folder's { factor = 8.0, original_length = 64" in refusal(tmp_path, "language")


def test_a_tensor_is_in_the_one_file_that_the_index_says(tmp_path):
    files = [f"model-{n}.safetensors" for n in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))
    for held, said in ((["ab", "b"], f"b is in {files[0]}, not in {files[1]} as "), (["a", "ab"], f"a is both in {files[0]} and in")):
        for file, names in zip(files, held, strict=True):
            save_file({name: torch.zeros(1) for name in names}, tmp_path / file)
        with pytest.raises(UserError, match=said), open_folder(tmp_path):
            pass
