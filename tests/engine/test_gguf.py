"""The decoder as a GGUF file: read back by transformers and by Smalt, the logits are those of the weights as they are stored."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from smalt.engine.cli import app
from smalt.engine.data.chat import SPECIAL_TOKENS
from smalt.engine.errors import UserError
from smalt.engine.export_gguf import export_gguf
from smalt.engine.weights.gguf_file import gguf_layout, model_keys, read_gguf
from smalt.engine.weights.gguf_tokenizer import tokenizer_keys
from smalt.model import LanguageConfig, ModelConfig, VisionConfig, YarnConfig, build_model

gguf = pytest.importorskip("gguf")

VISION = VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=6)
FEATURES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def decoder(family="llama", **changes):
    # transformers reads no size of heads from qwen2 and qwen3: their defaults are width / heads and 128.
    sizes = {
        "num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128 if family == "qwen3" else 16, "ffn": 96,
        "vocabulary": 320, "rope_theta": 1e4, "norm_eps": 1e-5,
    }  # fmt: skip
    return ModelConfig(language=LanguageConfig(**sizes | FEATURES[family] | changes), vision=VISION)


def randomised(config):
    model, generator = build_model(config, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model, tokens):
    positions = torch.arange(len(tokens), dtype=torch.int32)
    rows = model.language.rows(positions, torch.zeros_like(positions), positions + 1, model.language.embedding.weight.dtype)
    with torch.no_grad():
        return model.language(model.language.embedding(tokens), rows) @ model.language.head_weight.T


def rounded(weight, stored):
    kind = gguf.GGMLQuantizationType[stored]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.detach().numpy(), kind), kind).copy())


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FEATURES)
def test_transformers_and_smalt_read_back_the_weights_as_stored(family, tie, save_run, tmp_path, error):
    transformers = pytest.importorskip("transformers")
    own = randomised(decoder(family, tie_embeddings=tie))
    run, tokens, matrices = save_run(tmp_path / "run", own), torch.arange(0, 40), {}
    for kind in ("f16", "q8_0", "q4_0"):
        done = export_gguf(run, tmp_path / f"{kind}.gguf", kind=kind)
        layout = {one.own: one.stored for one in done.layout.values()}
        matrices[kind] = {
            layout[name] for name in layout if not name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "bias"))
        }
        want = randomised(own.config)
        with torch.no_grad():
            for name, p in want.named_parameters():
                if name in layout:
                    p.copy_(rounded(p, layout[name]))
        read = dict(read_gguf(tmp_path / f"{kind}.gguf", done.layout))
        assert read.keys() == layout.keys()
        assert not [name for name, p in want.named_parameters() if name in read and not torch.equal(read[name], p)]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
        assert theirs.config.model_type == family
        assert theirs.config.tie_word_embeddings is tie
        with torch.no_grad():
            got = theirs(tokens[None]).logits[0]
        assert error(got, logits(want, tokens)) < 1e-5
        assert error(got, logits(own, tokens)) > 1e-5  # it is no comparison of weights that are the same anyway
    assert matrices == {"f16": {"F16"}, "q8_0": {"Q8_0"}, "q4_0": {"Q4_0", "Q8_0"}}


def test_a_file_says_what_llama_cpp_asks_for(digits, save_run, tmp_path):
    yarn = YarnConfig(factor=8.0, original_length=64, beta_fast=16.0, attention_factor=1.5)
    run = save_run(tmp_path / "run", randomised(decoder("qwen2", yarn=yarn)))
    export_gguf(run, tmp_path / "out.gguf", kind="q8_0")
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    tokenizer = Tokenizer.from_file(str(digits / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    tokens = [fields["tokenizer.ggml.tokens"][i] for i in range(tokenizer.get_vocab_size())]
    assert tokens == [tokenizer.id_to_token(i) for i in range(len(tokens))]
    want = {
        "general.architecture": "qwen2", "general.name": "tiny", "general.file_type": 7, "general.quantization_version": 2,
        "qwen2.context_length": 128, "qwen2.embedding_length": 64, "qwen2.block_count": 2, "qwen2.feed_forward_length": 96,
        "qwen2.attention.head_count": 4, "qwen2.attention.head_count_kv": 2, "qwen2.attention.key_length": 16,
        "qwen2.attention.value_length": 16, "qwen2.rope.dimension_count": 16, "qwen2.rope.freq_base": 1e4, "qwen2.vocab_size": 320,
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 8.0, "qwen2.rope.scaling.original_context_length": 64,
        "qwen2.rope.scaling.yarn_beta_fast": 16.0, "qwen2.rope.scaling.yarn_beta_slow": 1.0,
        "qwen2.rope.scaling.attn_factor": pytest.approx(1.5 / (0.1 * np.log(8) + 1)),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.eos_token_id": end, "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: fields[key] for key in want} == want
    assert fields["tokenizer.ggml.token_type"] == [3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - len(SPECIAL_TOKENS)) + [5] * (
        320 - len(tokens)
    )
    assert "add_generation_prompt" in fields["tokenizer.chat_template"]


@pytest.mark.slow
def test_transformers_reads_the_tokenizer_and_the_template(digits, save_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    run = save_run(tmp_path / "run", randomised(decoder()))
    export_gguf(run, tmp_path / "out.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    own = Tokenizer.from_file(str(digits / "tokenizer.json"))
    text = "<|user|>What are the digits? add them: 12, 7.<|end|><|assistant|><|think|><think>1 + 2</think>3<|end|>"
    assert theirs(text).input_ids == own.encode(text).ids
    assert theirs.eos_token == "<|end|>"
    assert theirs.apply_chat_template([{"role": "user", "content": "add"}], tokenize=False, add_generation_prompt=True).endswith(
        "<think>"
    )


# Letters, marks, digits, symbols, blanks of several kinds, what an apostrophe does in English, and what is cut as Chinese.
PIECES = [
    *"'7½é+,?…^$Ⅻ🙂 \n\t", "\u00a0", "\u3000", "e\u0301", "\r\n", "中文", "한국", "==", "42", "'s", "'think", " think", "the",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_tokenizer_of_the_digits_makes_the_same_tokens_split_as_llama_cpp_does(digits, text):
    own = Tokenizer.from_file(str(digits / "tokenizer.json"))
    assert tokenizer_keys(own.to_str().encode(), 320)["tokenizer.ggml.pre"] == "deepseek-coder"
    theirs = Tokenizer.from_str(own.to_str())
    # The patterns that llama.cpp splits by under that name, one after the other.
    patterns = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert own.encode(text).ids == theirs.encode(text).ids


def qwen(number):
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


BYTES, DIGITS, PUNCTUATION = pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("isolated")


@pytest.mark.parametrize(
    ("steps", "merges", "ignored", "want"),
    [
        ([BYTES], ["a b"], False, "gpt-2"),
        ([DIGITS, BYTES], ["a b"], False, "smollm"),
        (qwen(r"\p{N}"), ["a b"], False, "qwen2"),
        (qwen(r"\p{N}{1,3}"), ["a b"], True, "llama-bpe"),
        ([DIGITS, PUNCTUATION, BYTES], ["a b"], False, "deepseek-coder"),
        ([DIGITS, PUNCTUATION, BYTES], ["a b", "a ?"], False, None),
        (qwen(r"\p{N}{1,3}"), ["a b"], False, None),
        ([pre_tokenizers.Whitespace(), BYTES], ["a b"], False, None),
        ([BYTES], [], False, None),
    ],
)
def test_the_way_of_splitting_is_named_or_refused(steps, merges, ignored, want):
    pairs = [tuple(merge.split()) for merge in merges]
    words = sorted({*pre_tokenizers.ByteLevel.alphabet(), *map("".join, pairs)})
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs, ignore_merges=ignored))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Sequence(steps), normalizers.NFC()
    if want is None:
        with pytest.raises(UserError, match=r"data\.tokenizer"):
            tokenizer_keys(tokenizer.to_str().encode(), 300)
    else:
        assert tokenizer_keys(tokenizer.to_str().encode(), 300)["tokenizer.ggml.pre"] == want


def test_rows_that_are_no_whole_blocks_are_f16_and_said_so(save_run, tmp_path, capsys):
    run, out = save_run(tmp_path / "run", randomised(decoder(ffn=72, num_layers=1))), tmp_path / "out.gguf"
    app.cli(prog="smalt", args=["export", "--run", str(run), "--out", str(out), "--format", "gguf", "--type", "q4_0"])
    said = capsys.readouterr().out
    assert said == (
        f"{out}: 11 tensors of step 1, {out.stat().st_size:,} bytes; 6 in Q4_0, 3 in F32, 1 in Q8_0, 1 in F16; "
        "in F16 because their rows are no multiple of 32: blk.0.ffn_down.weight\n"
    )
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert stored["token_embd.weight"] == "Q8_0"
    assert stored["blk.0.ffn_down.weight"] == "F16"


def test_what_cannot_be_written_is_refused_and_leaves_nothing(save_run, tmp_path):
    own = randomised(decoder())
    with torch.no_grad():
        own.language.embedding.weight[3, 5] = 1e6
    run, out = save_run(tmp_path / "run", own), tmp_path / "new" / "out.gguf"
    with pytest.raises(UserError, match=r"language.embedding.weight has numbers beyond 65504, which Q8_0 does not hold"):
        export_gguf(run, out, kind="q8_0")
    assert list(out.parent.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_gguf(run, out)
    assert out.read_text() == "mine"
    for options, said in (
        (["--type", "q8_0"], "--type is of --format gguf"),
        (["--format", "gguf", "--dtype", "float32"], "one --type"),
    ):
        with pytest.raises(UserError, match=said):
            app.cli(prog="smalt", args=["export", "--run", str(run), "--out", str(tmp_path / "x"), *options])
    with pytest.raises(UserError, match="no decoder with both"):
        gguf_layout(decoder(qkv_bias=True, qk_norm=True), "f16")
    untruncated = decoder(yarn=YarnConfig(factor=2.0, original_length=8, truncate=False)).language
    with pytest.raises(UserError, match="truncate = false"):
        model_keys(untruncated, "f16", "name", 16)


@pytest.mark.slow
def test_the_bench_measures_the_weights_as_stored(save_run, tmp_path, capsys):
    run, path = save_run(tmp_path / "run", randomised(decoder())), tmp_path / "bench.json"
    app.cli(prog="smalt", args=["bench", "gguf", str(run), "--questions", "2", "--json", str(path)])
    own, *files = json.loads(path.read_text())
    assert [one["kind"] for one in files] == ["f16", "q8_0", "q4_0"]
    assert [(s["task"], s["mode"]) for s in own["scores"]] == [
        (task, mode) for task in ("read", "sum") for mode in ("answer", "think")
    ]
    sizes, lost = [one["size"] for one in files], [abs(one["losses"]["read"] - own["losses"]["read"]) for one in files]
    assert sizes == sorted(sizes, reverse=True)
    assert 0 < lost[0] < lost[1] < lost[2]
    assert f"{sizes[1]:,}" in capsys.readouterr().out
