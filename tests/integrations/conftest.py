"""A tiny run that took a few steps on digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smalt.engine.data.digits import write_digits

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name = "tiny"
device = "cpu"
dtype = "{dtype}"
[model.vision]
num_layers = 1
width = 16
num_heads = 2
ffn = 32
patch = 2
tile = 8
[model.language]
num_layers = 2
width = 32
num_heads = 2
num_kv_heads = 1
head_dim = 16
ffn = 64
vocabulary = 320
[data]
tokenizer = "{digits}/tokenizer.json"
sources = {{ sum = "{digits}/train/sum.parquet" }}
[stages.sft]
steps = 2
sequence_length = 128
mixture = {{ sum = 1.0 }}
trainable = {{ language = 1.0 }}
learning_rate = 1e-2
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a run of two steps in float64."""
    folder = tmp_path_factory.mktemp("run")
    write_digits(folder / "digits", records=50, questions=8, seed=0)
    (folder / "config.toml").write_text(CONFIG.format(digits=folder / "digits", dtype="float64"))
    command = [sys.executable, "engine/train.py", str(folder / "config.toml"), "--folder", str(folder / "run")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300)
    assert json.loads((folder / "run" / "config.json").read_text())["name"] == "tiny"
    return folder / "run"
