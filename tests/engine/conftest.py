"""A little of the digits, the smallest run over it, and the real command that trains."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from smalt.engine.checkpoints import CheckpointWriter
from smalt.engine.config import parse_config
from smalt.engine.data.digits import write_digits
from smalt.parallel import alone

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with 200 training records and 24 held-out questions a task, and the tokenizer."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, records=200, questions=24, seed=0)
    return folder


def _values(digits):
    stage = {"sequence_length": 128, "learning_rate": 1e-3, "warmup_steps": 1}
    return {
        "name": "tiny",
        "device": "cpu",
        "model": {
            "init_std": 0.04,
            "vision": {"num_layers": 1, "width": 16, "num_heads": 2, "ffn": 32, "patch": 2, "tile": 8},
            "language": {
                "num_layers": 1, "width": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn": 64, "vocabulary": 320,
                "rope_theta": 10000.0,
            },
        },
        "data": {
            "tokenizer": digits / "tokenizer.json",
            "sources": {task: str(digits / "train" / f"{task}.parquet") for task in ("read", "sum")},
            "validation": {"read": str(digits / "held_out" / "read.parquet")},
            "validation_documents": 8,
            "packs_per_step": 2,
            "window": 16,
            "workers": 0,
        },
        "stages": {
            "align": {**stage, "steps": 3, "mixture": {"read": 1.0}, "trainable": {"projector": 1.0}, "schedule": "constant"},
            "sft": {
                **stage, "steps": 4, "mixture": {"read": 0.4, "sum": 0.6},
                "trainable": {"vision": 0.5, "projector": 1.0, "language": 1.0}, "think": 0.7, "truncate": 0.3,
            },
        },
        "checkpoint": {"every": 2},
        "evaluation": {
            "sources": {task: str(digits / "held_out" / f"{task}.parquet") for task in ("read", "sum")},
            "budget_tasks": ["sum"], "budgets": [0, 4], "questions": 4, "max_tokens": 6,
        },
    }  # fmt: skip


def _set(values, changes):
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(key)
        else:
            section[key] = value


def _toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.fixture
def tiny_values(digits):
    """tiny_values(changes={}): the tiny run as a nested dict. changes: values by dotted name; None removes the key."""

    def make(changes=()):
        values = copy.deepcopy(_values(digits))
        _set(values, dict(changes))
        return values

    return make


@pytest.fixture
def tiny_config(tiny_values, tmp_path):
    """tiny_config(changes={}, name="config.toml"): the same as a TOML file in tmp_path."""

    def write(changes=(), name="config.toml"):
        path = tmp_path / name
        path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in tiny_values(changes).items()))
        return path

    return write


@pytest.fixture
def save_run(tiny_values):
    """save_run(folder, model): a run whose checkpoint holds the weights of a model."""

    def save(folder, model):
        config = parse_config(tiny_values() | {"model": model.config.model_dump()}, "test")
        folder.mkdir()
        (folder / "config.json").write_text(config.model_dump_json())
        writer = CheckpointWriter(folder / "checkpoints", 1, alone(torch.device("cpu")), pytest.fail)
        writer.save(1, {f"model.{n}": p.data for n, p in model.named_parameters()}, {"model": config.model.model_dump()})
        writer.wait()
        return folder

    return save


@pytest.fixture(scope="session")
def train_command():
    """train_command(args, nproc=1, options=()): the command of the README as a list, to be run in the root of the repository.

    options: more of torchrun, which starts one process too if there are any.
    """

    def command(args, nproc=1, options=()):
        torchrun = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), *options] if nproc > 1 or options else []
        )
        return [sys.executable, *torchrun, "engine/train.py", *map(str, args)]

    return command


@pytest.fixture(scope="session")
def train(train_command):
    """train(args, nproc=1, env=None, check=True, **kwargs of subprocess.run): train to the end; gives the CompletedProcess."""

    def run(args, nproc=1, env=None, check=True, **kwargs):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(env or {})}
        done = subprocess.run(
            train_command(args, nproc), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def _figures(folder):
    """What a run computed, by step: everything but its speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_seconds", "cost_spread")} for line in lines]


def _tensors(folder):
    """Every tensor of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    found = {}
    for shard in newest.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    return found


def _assert_same_run(killed, whole):
    assert _figures(killed) == _figures(whole)
    ours, theirs = _tensors(killed), _tensors(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert any(name.startswith("optimizer.exp_avg.") for name in theirs)
    assert (killed / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()


@pytest.fixture(scope="session")
def assert_same_run():
    """assert_same_run(killed, whole): metrics but for speed, every tensor of the last checkpoint and the scores have the same bits."""
    return _assert_same_run


@pytest.fixture(scope="session")
def figures():
    """figures(folder): what a run computed, by step, without gap or repetition: everything but its speed."""
    return _figures
