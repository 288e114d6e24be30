"""The benchmark of saving counts what a save costs, and nothing else."""

import json
import time

import pytest
import torch

from smalt.engine.checkpoints import CheckpointWriter
from smalt.engine.optimizers import optimizer_tensors
from smalt.model import LanguageConfig, ModelConfig, VisionConfig
from smalt.parallel import alone
from smalt.profiling.bench_checkpoint import Round, _row, bench_checkpoint, print_report

CONFIG = ModelConfig(
    vision=VisionConfig(num_layers=1, width=16, num_heads=2, ffn=24, patch=2, tile=8),
    language=LanguageConfig(num_layers=1, width=32, num_heads=2, num_kv_heads=1, head_dim=16, ffn=40, vocabulary=50),
)


def test_a_row_is_what_a_save_costs_by_step():
    row = _row(Round(plain=8.0, saving=8.6, call=0.2, late=0.0), steps=4)
    want = {"step": 2.0, "step_beside_save": 2.1, "call": 0.2, "lost": 0.6, "call_share": 0.1, "lost_share": 0.3, "late": 0.0}
    assert row == pytest.approx(want)


def test_the_whole_of_it(tmp_path, capsys):
    writer = CheckpointWriter(tmp_path, 1, alone(torch.device("cpu")), pytest.fail)
    threads = torch.get_num_threads()
    result = bench_checkpoint(CONFIG, writer, optimizer_tensors, rounds=3, steps=2, step_seconds=0.0, threads=1)
    assert torch.get_num_threads() == threads
    assert json.loads(json.dumps(result)) == result
    assert len(result["rounds"]) == 3
    # Weights and two moments in float32, and a step counter a tensor.
    assert 12 * result["parameters"] < result["bytes"] < 12.5 * result["parameters"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    print_report(result)
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in ("round ", "quartile", "median", "of a step")] == [3, 2, 1, 2]
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_a_slow_writer_is_seen():
    class Slow:
        def save(self, step, tensors, state):
            time.sleep(0.2)

        def poll(self):
            pass

        def wait(self):
            time.sleep(0.05)

    result = bench_checkpoint(CONFIG, Slow(), optimizer_tensors, rounds=2, steps=1, step_seconds=0.0, threads=1)
    assert all(row["call"] >= 0.2 and row["late"] >= 0.05 for row in result["rounds"])
