"""Where launch configurations come from: the model of the chips, the compiler's word, and the tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from smalt.kernels.launch import TABLES, TARGETS
from smalt.profiling.kernels import configure as module
from smalt.profiling.kernels.chips import CHIPS
from smalt.profiling.kernels.configure import configure, write_rows
from smalt.profiling.kernels.launch_model import KERNELS, MACHINES, MatrixKernel, ranked, row, sizes

SHIPPED = [r for path in sorted(TABLES.glob("*.json")) for r in json.loads(path.read_text())]
BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def test_every_shipped_row_is_one_of_the_models_choices():
    gpu = [r for r in SHIPPED if r["target"] != "interpreter"]
    assert {r["kernel"] for r in gpu} == set(BY_NAME)
    for r in gpu:
        kernel = BY_NAME[r["kernel"]]
        assert r in [
            row(kernel, r["target"], r["bits"], r["size"], guess) for guess in ranked(kernel, r["target"], r["bits"], r["size"])
        ]


def test_every_kernel_has_a_row_for_every_chip_and_for_the_interpreter():
    keys = {(r["kernel"], r["target"], r["bits"], r["size"]) for r in SHIPPED}
    wanted = {(k.name, t, bits, size) for k in KERNELS for t in TARGETS for bits in k.bits for size in sizes(k, bits)}
    assert wanted == {key for key in keys if key[1] != "interpreter"}
    assert {r["kernel"] for r in SHIPPED if r["target"] == "interpreter"} == set(BY_NAME)


@pytest.mark.parametrize("target", TARGETS)
def test_guesses_fit_the_chip_and_the_fastest_comes_first(target):
    chip, machine = CHIPS[target], MACHINES[target]
    for kernel in KERNELS:
        for bits in kernel.bits:
            guesses = ranked(kernel, target, bits, kernel.sizes[0])
            assert guesses, kernel.name
            assert [round(g.seconds, 7) for g in guesses] == sorted(round(g.seconds, 7) for g in guesses)
            for g in guesses:
                assert g.seconds > 0
                assert g.num_warps * chip.warp_size <= min(1024, machine.threads)
                if isinstance(kernel, MatrixKernel) and chip.backend == "cuda":
                    held = kernel.held(g.tiles, kernel.sizes[0]) + g.num_stages * kernel.loads(g.tiles, kernel.sizes[0])
                    assert held * bits // 8 <= chip.shared


def test_writing_replaces_the_rows_of_the_same_kernel_chip_and_width_only(tmp_path):
    old = [
        {"kernel": "a", "target": t, "bits": b, "size": 8, "tiles": {"X": 1}, "num_warps": 4, "num_stages": 1}
        for t in ("interpreter", "sm_90", "sm_80")
        for b in (16, 32)
    ]
    (tmp_path / "a.json").write_text(json.dumps(old))
    (tmp_path / "b.json").write_text(json.dumps([{**old[0], "kernel": "b"}]))
    new = {**old[2], "tiles": {"X": 2}, "size": 16}
    assert write_rows([new], tmp_path) == [tmp_path / "a.json"]
    written = json.loads((tmp_path / "a.json").read_text())
    assert [r for r in written if r not in old] == [new]
    assert [r for r in old if r not in written] == [old[2]]


def test_a_kernel_without_a_table_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"no table in .* has rows of \['adamw'\]: write its row for the interpreter first"):
        write_rows([next(r for r in SHIPPED if r["kernel"] == "adamw")], tmp_path)
    assert (tmp_path / "a.json").read_text() == "[]"


def made_up(spilling):
    """What the compiling processes would give: of the configurations that ``spilling`` names, spills."""
    tasks = []

    def run_tasks(given, jobs):
        tasks.extend(given)
        results = []
        for task in given:
            rows = [r for r in json.loads(Path(task["rows"]).read_text()) if r["target"] == task["target"]]
            found = [{**r, "spills": 5 * spilling(r, task), "shared": 0} for r in rows]
            results.append({"rows": found, "problems": []})
        return results

    return run_tasks, tasks


def test_a_row_is_left_alone_where_everything_spills(monkeypatch):
    run_tasks, _ = made_up(lambda r, task: r["size"] == task["size"] == 256)
    monkeypatch.setattr(module, "run_tasks", run_tasks)
    monkeypatch.setattr(module, "MAX_ROUNDS", 3)
    rows, refused = configure("attention_dq", ["sm_90"])
    places = [(r["bits"], r["size"]) for r in rows]
    assert sorted(places) == [(bits, size) for bits in (16, 32) for size in sizes(BY_NAME["attention_dq"], bits)]
    for bits in (16, 32):
        mine = {"kernel": "attention_dq", "target": "sm_90", "bits": bits, "size": 256}
        assert [r for r in rows if r.items() >= mine.items()] == [r for r in SHIPPED if r.items() >= mine.items()]
    assert len([line for line in refused if "its row is left as it is" in line]) == 2


def test_what_spills_is_not_tried_with_more_stages(monkeypatch):
    run_tasks, _ = made_up(lambda r, task: (r["num_warps"], r["bits"]) == (8, 16))
    monkeypatch.setattr(module, "run_tasks", run_tasks)
    rows, refused = configure("attention_dq", ["sm_90"])
    assert all(r["num_warps"] != 8 for r in rows if r["bits"] == 16)
    tried = [line.partition(" warps")[0] for line in refused]
    assert tried
    assert len(set(tried)) == len(tried)


def test_a_row_is_compiled_at_every_size_of_the_model_that_takes_it(monkeypatch):
    run_tasks, tasks = made_up(lambda r, task: False)
    monkeypatch.setattr(module, "run_tasks", run_tasks)
    configure("attention_dq", ["sm_90"])
    assert {(t["dtype"], t["size"]) for t in tasks} == {("bf16", 64), ("bf16", 72), ("bf16", 80), ("bf16", 128), ("bf16", 256)} | {
        ("fp32", 72), ("fp32", 128), ("fp32", 256),
    }  # fmt: skip


def test_names_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="unknown kernel 'none'"):
        configure("none")
    with pytest.raises(ValueError, match="unknown target 'sm_1'"):
        configure("adamw", ["sm_1"])


@pytest.mark.slow
def test_what_spills_is_refused_and_the_next_one_tried(monkeypatch):
    kernel = BY_NAME["rms_norm_backward"]
    guesses = ranked(kernel, "sm_90", 16, 8192)
    spilling = replace(guesses[0], tiles={**guesses[0].tiles, "BLOCK_T": 1}, num_warps=2)  # 128 columns of several tensors a thread
    monkeypatch.setattr(module, "ranked", lambda k, t, b, s: [spilling, *guesses] if (b, s) == (16, 8192) else ranked(k, t, b, s))
    rows, refused = configure("rms_norm_backward", ["sm_90"])
    (confirmed,) = [r for r in rows if (r["bits"], r["size"]) == (16, 8192)]
    assert confirmed["num_warps"] != 2
    assert any("2 warps" in line and "spills" in line for line in refused)
