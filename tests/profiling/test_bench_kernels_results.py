"""What becomes of the figures of ``smalt bench kernels``, and what keeps wrong kernels out of them.

The figures here are the tests' own, written to tmp_path.
"""

import sys
import types

import pytest
import torch

from smalt.kernels import current_backend
from smalt.profiling.kernels import bench, bench_gate, bench_machine, bench_results
from smalt.profiling.kernels.bench_gate import Check, run_gate
from smalt.profiling.kernels.bench_machine import Machine
from smalt.profiling.kernels.bench_results import BEGIN, END, insert_section, read_results, render, write_result

# Results


def result_of(gpu, date, whole=True, factor=1.0):
    def row(contestant, absent, seconds, roof="copy", operation="rms_norm", shape="8k x 2560", parts=("forward", "backward", "both")):
        times = {p: {"p20": 0.9 * seconds, "median": seconds, "p80": 1.1 * seconds, "runs": 9} for p in parts}
        return {
            "operation": operation, "shape": shape, "contestant": contestant, "absent": absent, "note": "",
            "times": {} if absent else times, "work": dict.fromkeys(parts, 1e9), "roofline": roof,
            "memory": {} if absent else {"peak": 2**21, "workspace": 2**20}, "clocks": {"sm_mhz": 1500.0},
        }  # fmt: skip

    return {
        "format": 1, "date": date, "whole": whole, "left": [], "versions": {"torch": "2.13.0", "triton": "3.9.0", "apex": None},
        "machine": {**Machine("Test GPU", "no such one").state(), "gpu": gpu, "power_limit_w": 700.0}, "tests": {},
        "roofline": {"copy": 2e12, "matmul": 5e14},
        "rows": [row("smalt", None, 1e-3 * factor), row("torch eager", None, 2e-3 * factor), row("Liger", "not | installed", 0.0),
                 row("smalt", None, 4e-3, "matmul", "adamw", "all", ("step",))],
    }  # fmt: skip


OPERATIONS = [("rms_norm", ("8k x 2560", "32k x 2560")), ("adamw", ("all",))]


def test_percent_of_the_roofline_of_the_same_run():
    result = result_of("A", "2026-01-01T00:00:00+00:00")
    row = result["rows"][0]
    assert bench_results.rate(row, "forward") == pytest.approx(1e12)
    assert bench_results.percent(row, "forward", result["roofline"]) == pytest.approx(50)
    assert bench_results.ratio(result["rows"][1], row) == pytest.approx(2)
    assert bench_results.ratio(result["rows"][2], row) is None
    assert bench_results.percent(result["rows"][3], "step", result["roofline"]) == pytest.approx(100 * 1e9 / 4e-3 / 5e14)


def test_table_is_made_of_the_files(tmp_path):
    write_result(result_of("B GPU", "2026-01-02T03:04:05+00:00"), tmp_path)
    write_result(result_of("A GPU", "2026-01-01T03:04:05+00:00", factor=2), tmp_path)
    text = render(read_results(tmp_path), OPERATIONS)
    assert text.index("### A GPU") < text.index("### B GPU")
    lines = text[text.index("### B GPU") :].splitlines()
    once, twice = "1.000 (0.900-1.100)", "2.000 (1.800-2.200)"
    assert f"| smalt | {once} | 1,000 GB/s | 50 | {once} | 1,000 GB/s | 50 | {once} | 2.0 | 1.0 |  |" in lines
    assert f"| torch eager | {twice} | 500 GB/s | 25 | {twice} | 500 GB/s | 25 | {twice} | 2.0 | 1.0 | 2.00 |" in lines
    assert "| Liger | absent: not \\| installed |  |  |  |  |  |  |  |  |  |" in lines
    assert "| smalt | 4.000 (3.600-4.400) | 0.25 TFLOP/s | 0 |  |  |  |  | 2.0 | 1.0 |  |" in lines
    assert "**rms_norm**, 32k x 2560: not measured" in lines
    assert "2026-01-02; driver unknown, power limit 700 W, clocks unknown" in text
    assert "torch 2.13.0, triton 3.9.0." in text
    assert "apex None" not in text


def test_without_results_nothing_is_measured():
    lines = render([], OPERATIONS).splitlines()[2:]
    assert lines == [
        "| rms_norm | 8k x 2560 | not measured |", "| rms_norm | 32k x 2560 | not measured |", "| adamw | all | not measured |",
    ]  # fmt: skip


def test_the_newest_whole_run_of_a_gpu_is_shown(tmp_path):
    dates = [("2026-01-01T00:00:00", True), ("2026-03-01T00:00:00", True), ("2026-04-01T00:00:00", False)]
    files = [write_result(result_of("A", date, whole), tmp_path).name for date, whole in dates]
    assert files == ["a_2026-01-01T0000.json", "a_2026-03-01T0000.json", "a_2026-04-01T0000_partial.json"]
    assert [r["date"][:7] for r in bench_results.shown(read_results(tmp_path))] == ["2026-03"]
    write_result(result_of("B", "2026-04-01T00:00:00", False), tmp_path)
    assert "Only a part was measured." in render(read_results(tmp_path), OPERATIONS)
    again = write_result(result_of("A", *dates[0]), tmp_path)
    assert again.name == "a_2026-01-01T0000_2.json"


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json: not a result"):
        read_results(tmp_path)


def test_section_of_the_page():
    once = insert_section("# Title\n\ntext\n", "one")
    assert once == f"# Title\n\ntext\n\n{BEGIN}\n\none\n\n{END}\n"
    page = once + "\n## After\n"
    assert insert_section(page, "two") == page.replace("one", "two")
    assert insert_section("", "one") == f"{BEGIN}\n\none\n\n{END}\n"
    for broken in (BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{END}"):
        with pytest.raises(ValueError, match="expected one"):
            insert_section(broken, "one")


def test_the_page_shows_what_the_results_say():
    if not bench_results.DOCS.exists() or BEGIN not in (text := bench_results.DOCS.read_text()):
        pytest.skip("docs/kernels.md has no section of measurements")
    assert insert_section(text, bench.table(read_results(bench_results.RESULTS))) == text


# The machine


def test_figures_of_nvidia_smi():
    got = bench_machine.parse_smi("570.86.15, 700.00, 119.40, 1980, 2619, 1980, 2619, [N/A]\n")
    assert got["driver"] == "570.86.15"
    assert (got["power_limit_w"], got["sm_mhz"], got["temperature_c"]) == (700.0, 1980.0, None)


def test_a_machine_that_nobody_knows_has_no_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "")
    state = Machine("Some GPU", "1234").state()
    assert state["gpu"] == "Some GPU"
    assert state["source"].startswith("none (nvidia-ml-py: ")
    assert "nvidia-smi: " in state["source"]
    assert all(v is None for k, v in state.items() if k not in ("gpu", "source"))


def test_nvml_is_asked_by_uuid(monkeypatch):
    nvml = types.SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlSystemGetDriverVersion=lambda: b"570.1",
        nvmlDeviceGetClockInfo=lambda h, kind: 1000 * kind, nvmlDeviceGetMaxClockInfo=lambda h, kind: 2000 * kind,
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 700_000, nvmlDeviceGetPowerUsage=lambda h: 300_500,
        nvmlDeviceGetTemperature=lambda h, kind: len(h),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = Machine("Some GPU", "12").state()
    assert state["source"] == "nvidia-ml-py"
    assert (state["driver"], state["power_limit_w"], state["power_w"]) == ("570.1", 700.0, 300.5)
    assert (state["sm_mhz"], state["memory_mhz"], state["max_memory_mhz"]) == (1000, 2000, 4000)
    assert state["temperature_c"] == len("GPU-12")


# The gate


def check_of(function):
    return Check("it", function, bench_gate._bf16((5, 4)))


def double(x):
    return 2 * x


def on_triton(change):
    """2 x, but for ``change`` of it where the kernels run."""
    return lambda x: change(2 * x) if current_backend() == "triton" else 2 * x


PLANTED = {
    "a wrong factor": lambda y: y * 1.02,
    "one wrong element": lambda y: torch.cat([y.flatten()[:-1], 1.1 * y.flatten()[-1:]]).view(y.shape),
    "another dtype": lambda y: y.float(),
    "NaN": lambda y: y * float("nan"),
    "a forgotten gradient": lambda y: y.detach(),
    "noise from run to run": lambda y: y + torch.rand(()) * 1e-2,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_gate_is_red_for(fault):
    pytest.importorskip("triton")
    assert run_gate("cpu", (check_of(double),), pytest.fail) == []
    assert run_gate("cpu", (check_of(on_triton(PLANTED[fault])),), lambda _: None)


def test_gate_allows_twice_the_error_of_torch_and_no_noise():
    pytest.importorskip("triton")

    def cube(x):
        return x * x * x * (1.01 if current_backend() == "triton" else 1.0)

    assert "RMS error" in run_gate("cpu", (check_of(cube),), lambda _: None)[0]
    noisy = run_gate("cpu", (check_of(on_triton(PLANTED["noise from run to run"])),), lambda _: None)
    assert "it: output 0 changes its bits from run to run" in noisy


def test_gate_is_red_where_a_kernel_raises_or_forgets_a_row():
    pytest.importorskip("triton")

    def raises(x):
        raise RuntimeError("no such tile\nmore")

    assert run_gate("cpu", (check_of(raises),), lambda _: None) == ["it: RuntimeError: no such tile"]
    forgets = check_of(on_triton(lambda y: y + 0 * y.new_empty(4)))
    assert "it: output 0: RMS error inf" in run_gate("cpu", (forgets,), lambda _: None)[0]
    assert not torch.are_deterministic_algorithms_enabled() or torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.slow
def test_kernels_pass_the_gate():
    pytest.importorskip("triton")
    names = {check.name.split()[0] for check in bench_gate.CHECKS}
    assert {o.name.split()[0] for o in bench.OPERATIONS} <= names
    on_gpu = torch.cuda.is_available()
    checks = tuple(c for c in bench_gate.CHECKS if on_gpu or not (c.model or c.name.startswith("attention")))
    assert run_gate("cuda" if on_gpu else "cpu", checks, lambda _: None) == []


def test_tests_that_cannot_run_say_so(monkeypatch, tmp_path):
    assert bench_gate.run_tests(tmp_path / "none") == ("not run: Smalt is installed without them", [])
    find = bench_gate.importlib.util.find_spec
    monkeypatch.setattr(bench_gate.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else find(name))
    assert bench_gate.run_tests(tmp_path) == ("not run: hypothesis not installed", [])


@pytest.mark.slow
def test_red_tests_are_red(tmp_path):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    file = folder / "test_it.py"
    file.write_text("def test_it(): pass\n")
    assert "1 passed" in bench_gate.run_tests(folder)[0]
    file.write_text("def test_it(): assert 0\n")
    outcome, wrong = bench_gate.run_tests(folder)
    assert outcome == "red"
    assert "test_it.py::test_it" in wrong[0]
    file.write_text("import time\ndef test_it(): time.sleep(60)\n")
    assert bench_gate.run_tests(folder, seconds=2.0) == ("none red in 2 s, then stopped", [])
