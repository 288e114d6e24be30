"""The whole model as transformers loads it, in a process that has no Smalt: the same tokens, tiles, logits and text."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PIL_Image

from smalt.engine.data.chat import ChatEncoder
from smalt.engine.data.images import ImageLimits
from smalt.engine.data.records import Image, Record
from smalt.engine.errors import UserError
from smalt.engine.export import export_run
from smalt.engine.weights.remote import tiling_smalt
from smalt.model import LanguageConfig, ModelConfig, TilingConfig, VisionConfig, YarnConfig, build_model, pack, tiling
from smalt.model.generate import Sampling, generate

from .exact import randomised

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).parent / "elsewhere.py"
LANGUAGE = LanguageConfig(num_layers=2, width=16, num_heads=4, num_kv_heads=2, head_dim=6, ffn=24, vocabulary=320, rope_theta=1e4)
TILING = TilingConfig(max_rows=2, max_columns=3)
MODELS = {
    # Tiles of 3 x 3 patches, which 2 x 2 do not divide.
    "qwen3": ModelConfig(
        vision=VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=6), tiling=TILING, projector_width=20,
        language=LANGUAGE.model_copy(update={"qk_norm": True, "tie_embeddings": False}),
    ),
    "llama": ModelConfig(
        vision=VisionConfig(num_layers=1, width=8, num_heads=2, ffn=12, patch=2, tile=8), tiling=TILING, image_attention="causal",
        language=LANGUAGE.model_copy(update={"yarn": YarnConfig(factor=4, original_length=16)}),
    ),
}  # fmt: skip
EXACT = 1e-10
CONVERSATIONS = [
    [("system", "be brief"), ("user", "<image><image> add <|end|> 1"), ("assistant", " <think>1+2</think>3"), ("user", "é?\n<image>")],
    [("user", "<image>read")],
    [("user", "a text alone <think>")],
    [("user", "first <image> then <image>")],
]
BUDGETS = [None, 0, 3]
MAX_TOKENS = 10


def write_images(folder):
    """Of several shapes; the last a JPEG that lies on its side, and is far larger than its tiles."""
    noise, paths = np.random.default_rng(0), []
    for number, (width, height) in enumerate([(6, 6), (31, 9), (5, 44), (17, 23), (1, 1), (400, 300)]):
        picture = PIL_Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        exif = PIL_Image.Exif()
        exif[tiling_smalt.ORIENTATION] = 6
        paths.append(folder / (f"{number}.jpg" if width == 400 else f"{number}.png"))
        picture.save(paths[-1], **({"exif": exif} if width == 400 else {}))
    return paths


def parts(content, images):
    """A message's content as transformers has it, a text in two parts."""
    found = []
    for number, text in enumerate(content.split("<image>")):
        found += [{"type": "image", "path": str(next(images))}] if number else []
        found += [{"type": "text", "text": part} for part in (text[: len(text) // 2], text[len(text) // 2 :]) if part]
    return found


def example_of_the_docs(image):
    text = (ROOT / "docs" / "weights.md").read_text().partition("### The whole model in transformers\n")[2]
    code = [line for line in text.partition("\n- ")[0].splitlines() if line.startswith("    ")]
    return textwrap.dedent("\n".join(code)).replace("page.png", str(image))


@pytest.fixture
def loaded_elsewhere(tmp_path):
    """loaded_elsewhere(folders, image files): what a process that has no Smalt finds in each folder, as elsewhere.py writes it."""

    def run(folders, paths):
        images = iter(paths)
        conversations = [[{"role": role, "content": parts(c, images)} for role, c in turns] for turns in CONVERSATIONS]
        job = {"conversations": conversations, "budgets": BUDGETS, "max_tokens": MAX_TOKENS, "example": example_of_the_docs(paths[0])}
        (tmp_path / "job.json").write_text(json.dumps(job))
        environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, SCRIPT, tmp_path / "job.json", tmp_path / "found.pt", *folders]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "found.pt", weights_only=False)

    return run


@pytest.mark.slow
def test_someone_without_smalt_loads_the_same_model(save_run, digits, tmp_path, error, loaded_elsewhere):
    pytest.importorskip("transformers")
    paths = write_images(tmp_path)
    models = {name: randomised(build_model(config, 0)) for name, config in MODELS.items()}
    for name, own in models.items():
        export_run(save_run(tmp_path / f"run-{name}", own), tmp_path / name)
    results = loaded_elsewhere([tmp_path / name for name in models], paths)
    for own, found in zip(models.values(), results, strict=True):
        encoder = ChatEncoder.load(digits / "tokenizer.json", tiling.ImageShape.of(own.config), 320, ImageLimits())
        check_conversations(own, encoder, found, paths, error)
        assert error(found["halves"], found["at_once"]) < EXACT
        assert found["from_cache"] == found["from_start"]
        assert found["beams"][0] == 2 * len(CONVERSATIONS)
        assert found["refusal"].splitlines()[1:] == ["  missing: projector.down.weight", "  unexpected: projector.sideways.weight"]
        assert encoder.control.think_end in found["example"][:33]
        # As text, with one placeholder an image.
        assert found["rendered"][1] == "<|user|><|image|>read<|end|><|assistant|><|think|><think>"
        assert "<|assistant|><|answer|>3<|end|>" in found["rendered"][0]


def check_conversations(own, encoder, found, paths, error):
    images, prompts = iter(paths), iter(found["prompts"])
    for number, turns in enumerate(CONVERSATIONS):
        of_it = [Image(None, str(next(images))) for _ in range(sum(content.count("<image>") for _, content in turns))]
        for mode in ("think", "answer"):
            document, got = encoder.prompt(Record(tuple(turns), tuple(of_it)), mode), next(prompts)
            assert got["input_ids"][0].tolist() == document.tokens.tolist()
            assert ("pixel_values" in got) == bool(of_it)
            if of_it:
                assert np.array_equal(got["pixel_values"][0], document.tiles)
                assert got["num_tiles"].sum() == len(document.tiles)
            batch = pack([document], len(document), own.config.image_attention, own.config.vision.tile)
            with torch.no_grad():
                want = own.hidden(batch) @ own.language.head_weight.T
            assert error(got["logits"], want) < EXACT
            budgets = BUDGETS if mode == "think" else [None]
            completions = [generate(own, [document], encoder.control, Sampling(MAX_TOKENS), b)[0].tokens for b in budgets]
            assert got["completions"] == completions
            if mode == "think":
                assert completions[1][0] == encoder.control.think_end
                assert found["batch"][number] == completions[-1]


@given(
    width=st.integers(1, 8000), height=st.integers(1, 8000), side=st.sampled_from([6, 50, 378]), max_rows=st.integers(1, 6),
    max_columns=st.integers(1, 6), alpha=st.floats(0, 0.99),
)  # fmt: skip
def test_images_are_cut_as_in_training(width, height, side, max_rows, max_columns, alpha):
    config = TilingConfig(max_rows=max_rows, max_columns=max_columns, alpha=alpha)
    grid = tiling.choose_grid(width, height, side, config)
    assert tiling_smalt.choose_grid(width, height, side, max_rows, max_columns, alpha) == (grid.rows, grid.columns)
    canvas = (grid.columns * side, grid.rows * side)
    assert tiling_smalt.fit(width, height, *canvas) == tiling.fit(width, height, *canvas)


def test_what_transformers_does_not_have_is_exported_in_smalts_own_form(save_run, tmp_path):
    own = build_model(
        MODELS["qwen3"].model_copy(update={"language": LANGUAGE.model_copy(update={"qk_norm": True, "qkv_bias": True})}), 0
    )
    run = save_run(tmp_path / "run", own)
    with pytest.raises(UserError, match="--format smalt"):
        export_run(run, tmp_path / "out")
    with pytest.raises(UserError, match="leave out --part"):
        export_run(run, tmp_path / "out", part="vision", form="smalt")
    assert export_run(run, tmp_path / "out", form="smalt").num_tensors == len(dict(own.named_parameters()))
