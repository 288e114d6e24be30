"""The doctor on this machine, and on machines made ill: packages faked on PYTHONPATH, seen by a process of their own."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from smalt.profiling import doctor as module
from smalt.profiling.doctor import Check, check_gpu, check_nccl, check_torch, check_triton, print_doctor

TORCH_MINOR = int(torch.__version__.split(".")[1])


@pytest.fixture
def fake(tmp_path):
    """fake(name, version, files) installs a package into a folder; fake.examine(code) asks the doctor with that folder first."""

    class Fake:
        folder = tmp_path / "site"

        def __call__(self, name, version=None, **files):
            package = self.folder / name
            for path, text in files.items():
                target = package / f"{path.replace('__', '/')}.py" if path != "init" else package / "__init__.py"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text)
            if version:
                info = self.folder / f"{name}-{version}.dist-info"
                info.mkdir(parents=True)
                (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

        def examine(self, code, timeout=60, **environment):
            program = (
                f"import dataclasses, json; from smalt.profiling import doctor as d; d.TIMEOUT = {timeout}\n"
                f"found = {code}\n"
                "found = found if isinstance(found, list) else [found]\n"
                "print(json.dumps([dataclasses.asdict(c) for c in found]))"
            )
            env = {**os.environ, "PYTHONPATH": str(self.folder), **environment}
            done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
            return [Check(**c) for c in json.loads(done.stdout.splitlines()[-1])]

    return Fake()


@pytest.mark.slow
def test_this_machine(capsys):
    checks = module.doctor()
    by_name = {c.name: c for c in checks}
    assert len(by_name) == len(checks)
    for name in ("python", "torch", "gloo", "requirements", "smalt", "command"):
        assert by_name[name].status == "ok", by_name[name]
    assert torch.__version__ in by_name["torch"].detail
    for c in checks:
        assert c.detail
        assert c.advice or c.status in ("ok", "absent"), c
        assert not re.search(r"https?://|\w\.(org|com|io)\b", c.detail + c.advice), c
    print_doctor(checks)
    shown = capsys.readouterr().out
    assert all(name in shown for name in by_name)


def test_exit_code_and_brackets(capsys):
    bad = Check("torch", "error", "not installed", "pip install 'smalt[bench]'")
    worse = Check("gpu", "warning", "old [and slow]", "buy")
    assert print_doctor([worse, Check("python", "ok", "3.11")]) == 0
    assert print_doctor([worse, bad]) == 1
    shown = capsys.readouterr().out
    assert "smalt[bench]" in shown
    assert "[and slow]" in shown


def test_apex_of_another_author_is_named_and_never_imported(fake, tmp_path):
    touched = tmp_path / "imported"
    fake("apex", "0.9.10", init=f"open({str(touched)!r}, 'w'); raise SystemExit('a web toolkit')")
    (found,) = fake.examine("d.check_apex()")
    assert (found.status, found.name) == ("error", "apex")
    assert "0.9.10" in found.detail
    assert "pip uninstall apex" in found.advice
    assert not touched.exists()


def test_apex_of_nvidia(fake):
    fake("apex", "0.1", init="1 / 0", optimizers____init__="", normalization____init__="")
    (found,) = fake.examine("d.check_apex()")
    assert found.status == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "version", "code", "status", "says"),
    [
        ("torchvision", f"0.{TORCH_MINOR + 15}.1+cpu", "", "ok", ""),
        ("torchvision", f"0.{TORCH_MINOR + 14}.0", "", "warning", "is not for torch"),
        ("torchvision", f"0.{TORCH_MINOR + 14}.0", "import no_such_operator", "error", "no_such_operator"),
        ("torchvision", f"0.{TORCH_MINOR + 15}.0", "raise RuntimeError('no operator nms')", "error", "no operator nms"),
        ("torchvision", f"0.{TORCH_MINOR + 15}.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "error", "-11"),
        ("torchvision", f"0.{TORCH_MINOR + 15}.0", None, "error", "No module named"),
        ("torchaudio", "2.11.0", "", "ok", ""),
        ("torchaudio", "2.10.0", "", "warning", "is not for torch"),
    ],
)
def test_companions_of_torch(fake, name, version, code, status, says):
    fake(name, version, **({} if code is None else {"init": code}))
    (found,) = fake.examine(f"d.check_companion({name!r})")
    assert found.status == status
    assert says in found.detail
    if status != "ok":
        wanted = f"torchvision==0.{TORCH_MINOR + 15}.*" if name == "torchvision" else "torchaudio>=2.11"
        assert wanted in found.advice


@pytest.mark.slow
def test_a_companion_that_hangs(fake):
    fake("torchvision", f"0.{TORCH_MINOR + 15}.0", init="import time; time.sleep(60)")
    (found,) = fake.examine("d.check_companion('torchvision')", timeout=2)
    assert (found.status, found.detail.split("; ")[1]) == ("error", "it cannot be imported: no end after 2 s")


@pytest.mark.slow
def test_a_broken_torch_ends_in_a_report(fake):
    fake("torch", init="raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    found = {c.name: c for c in fake.examine("d.doctor()")}
    for name in ("torch", "smalt"):
        assert found[name].status == "error"
        assert "libtorch_cpu.so" in found[name].detail
        assert found[name].advice
    assert found["python"].status == "ok"


def test_versions_that_smalt_was_not_made_for(fake):
    fake("transformers", "4.40.0", init="")
    fake("rich", "9.0")
    found = {c.name: c for c in fake.examine("d.check_requirements()")}
    assert found["extra bench"].status == "warning"
    assert "transformers 4.40.0" in found["extra bench"].detail
    assert "smalt[bench]" in found["extra bench"].advice
    assert found["requirements"].status == "error"
    assert "rich 9.0" in found["requirements"].detail


def test_gpu_that_a_cpu_build_of_torch_cannot_use(fake, tmp_path):
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA L4'\n")
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    (found,) = fake.examine("d.check_gpu({'cuda': None, 'hip': None, 'gpus': []}, d.nvidia_gpus())", PATH=path)
    assert found.status == "warning"
    assert "NVIDIA H100 80GB HBM3, NVIDIA L4" in found.detail
    assert "CUDA build" in found.advice


GIB = 2**30
H100 = ["NVIDIA H100", 80 * GIB, [9, 0]]
CUDA = {"version": "2.13.0", "cuda": "13.0", "hip": None, "gloo": True, "nccl": False, "gpus": [H100]}


@pytest.mark.parametrize(
    ("facts", "nvidia", "status", "says"),
    [
        ({**CUDA, "gpus": []}, [], "absent", "CPU"),
        (CUDA, ["NVIDIA H100"], "ok", "NVIDIA H100 (80 GiB, compute capability 9.0)"),
        ({**CUDA, "gpus": []}, ["NVIDIA H100"], "warning", "CUDA 13.0 cannot use it"),
        ({**CUDA, "gpus": [["Tesla T4", 15 * GIB, [7, 5]]]}, ["Tesla T4"], "warning", "7.5"),
        ({"error": "no module"}, [], "absent", "CPU"),
    ],
)
def test_gpu(facts, nvidia, status, says):
    found = check_gpu(facts, nvidia)
    assert found.status == status
    assert says in found.detail
    assert found.advice or status in ("ok", "absent")


@pytest.mark.parametrize(("version", "status"), [("2.10.1", "error"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("3.0.0", "ok")])
def test_supported_torch(version, status):
    found = check_torch({**CUDA, "version": version})
    assert found.status == status
    assert "CUDA 13.0 build" in found.detail


@pytest.mark.parametrize(
    ("version", "gpu", "status"),
    [(None, False, "absent"), (None, True, "warning"), ("3.5.1", True, "warning"), ("3.10.0", True, "ok")],
)
def test_triton(version, gpu, status, monkeypatch):
    monkeypatch.setattr(module, "_version", lambda name: version if name == "triton" else None)
    found = check_triton(gpu)
    assert found.status == status
    assert found.advice or status in ("ok", "absent")


def test_nccl_matters_with_several_gpus():
    assert check_nccl({**CUDA, "nccl": True}).status == "ok"
    assert check_nccl(CUDA).status == "absent"
    assert check_nccl({**CUDA, "gpus": [H100, H100]}).status == "warning"
