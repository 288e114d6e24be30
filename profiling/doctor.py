"""What this machine can do for Smalt, and what is wrong with it.

Whatever a library does when it is imported (fail, hang, crash the interpreter), it does in a process of its own with a time
limit: the doctor always comes back with a finding. At the top it imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TIMEOUT = 120.0  # seconds; the first import of torch from a cold network disk takes a minute
MIN_PYTHON, MIN_TORCH, MIN_TRITON = (3, 11), (2, 11), (3, 6)
INSTALL = "pip install -e . in Smalt's folder"
ROOMS = ("kernels", "model", "parallel", "profiling", "engine")
# Optional libraries, each with the extra of Smalt that brings it.
LIBRARIES = {"flash-attn": "", "liger-kernel": "", "deepspeed": "deepspeed", "transformers": "bench", "wandb": "wandb"}


@dataclass(frozen=True)
class Check:
    """One finding. status: ok; absent (optional, and not there); warning (works, but worse than it could); error (will not work).

    detail: what was found; advice: what to do about it, empty where nothing is to be done.
    """

    name: str
    status: Literal["ok", "warning", "error", "absent"]
    detail: str
    advice: str = ""


def doctor() -> list[Check]:
    """Examine this machine and this Python environment. Takes a few seconds, changes nothing."""
    with ThreadPoolExecutor() as pool:
        torch_facts = pool.submit(_torch_facts)
        rooms = pool.submit(check_smalt)
        companions = [pool.submit(check_companion, name) for name in ("torchvision", "torchaudio")]
        machine = [check_python(), check_cores(), check_memory(), check_disk()]
        facts, nvidia = torch_facts.result(), nvidia_gpus()
        torch = [check_torch(facts), check_gpu(facts, nvidia), check_triton(bool(facts.get("gpus") or nvidia))]
        torch += [check_gloo(facts), check_nccl(facts), check_bf16()]
        libraries = [check_apex(), *(c.result() for c in companions), *map(check_library, LIBRARIES)]
        return [*machine, *torch, *libraries, *check_requirements(), *rooms.result()]


def print_doctor(checks: list[Check]) -> int:
    """Show the findings; returns the exit code: 1 if any is an error, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .tables import print_table

    colours = {"ok": "green", "warning": "yellow", "error": "bold red", "absent": "dim"}
    table = Table.grid(padding=(0, 2))
    for c in checks:
        advice = f"\n[italic]{escape(c.advice)}[/]" if c.advice else ""
        table.add_row(f"[{colours[c.status]}]{c.status}[/]", escape(c.name), escape(c.detail) + advice)
    counts = {status: sum(c.status == status for c in checks) for status in colours}
    console = Console()
    print_table(console, table)
    console.print(", ".join(f"{n} {status}" for status, n in counts.items()))
    return 1 if counts["error"] else 0


# The machine


def check_python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"
    if sys.version_info < MIN_PYTHON:
        return Check("python", "error", found, f"make a virtual environment with Python {_dotted(MIN_PYTHON)} or newer")
    return Check("python", "ok", found)


def check_cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_read("/sys/fs/cgroup/cpu.max").split() or ["max", "1"])[:2]
    if quota != "max" and int(quota) < cores * int(period):
        found = f"{cores}, of which the container may use {int(quota) / int(period):g}"
        advice = "give the container more, or set OMP_NUM_THREADS to what it has: more threads than cores are slower than fewer"
        return Check("cores", "warning", found, advice)
    return Check("cores", "ok", f"{cores}")


def check_memory() -> Check:
    fields = dict(line.split(":") for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in fields:
        return Check("memory", "ok", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB")
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total, free = min(total, int(limit) / 2**30), min(free, (int(limit) - int(used or 0)) / 2**30)
    found = f"{free:.1f} GiB of {total:.1f} GiB available"
    if free < 2:
        return Check("memory", "warning", found, "the default run needs about 2 GiB: end other programs, or use a larger machine")
    return Check("memory", "ok", found)


def check_disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    found = f"{free:.1f} GiB free under {Path.cwd()}"
    if free < 2:
        return Check("disk", "warning", found, "free some space, or run with --folder on another disk: checkpoints need it")
    return Check("disk", "ok", found)


def check_bf16() -> Check:
    flags = set(re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16|sve_bf16)\b", _read("/proc/cpuinfo")))
    if flags:
        return Check("cpu bf16", "ok", ", ".join(sorted(flags)))
    return Check("cpu bf16", "absent", "this CPU has no bf16 arithmetic that could be seen", 'keep dtype = "float32" on the CPU')


# torch and the GPU

_TORCH_FACTS = """
import json, torch, torch.distributed as d
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "gpus": [[p.name, p.total_memory, [p.major, p.minor]] for p in gpus],
    "gloo": d.is_available() and d.is_gloo_available(), "nccl": d.is_available() and d.is_nccl_available(),
}))
"""


def _torch_facts() -> dict[str, Any]:
    """What torch says of itself, or {"error": why it cannot be imported}."""
    ok, said = _python(_TORCH_FACTS)
    return json.loads(said) if ok else {"error": said}


def check_torch(facts: dict[str, Any]) -> Check:
    if "error" in facts:
        version = _version("torch")
        found = f"{version}, but it cannot be imported: {facts['error']}" if version else "not installed"
        return Check("torch", "error", found, f"install torch {_dotted(MIN_TORCH)} or newer into a fresh virtual environment")
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    found = f"{facts['version']}, {build} build"
    if _numbers(facts["version"]) < MIN_TORCH:
        return Check("torch", "error", found, f"Smalt needs {_dotted(MIN_TORCH)}: pip install -U 'torch>={_dotted(MIN_TORCH)}'")
    return Check("torch", "ok", found)


def nvidia_gpus() -> list[str]:
    """Names of the machine's NVIDIA GPUs, whatever torch makes of them."""
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", said, re.MULTILINE)
    return names or (["an NVIDIA GPU whose driver does not answer"] if Path("/dev/nvidia0").exists() else [])


def check_gpu(facts: dict[str, Any], nvidia: list[str]) -> Check:
    """facts: of torch; nvidia: names of the GPUs that the machine has."""
    gpus, have = facts.get("gpus", []), ", ".join(nvidia)
    if not gpus and nvidia and not facts.get("cuda"):
        advice = "uninstall torch, torchvision and torchaudio, and install torch's CUDA build: no +cpu version, no CPU index"
        return Check("gpu", "warning", f"{have}; this torch is no CUDA build and cannot use it", advice)
    if not gpus and nvidia:
        advice = f"install a driver for CUDA {facts['cuda']} or a torch for the driver's CUDA; look at CUDA_VISIBLE_DEVICES"
        return Check("gpu", "warning", f"{have}; torch's CUDA {facts['cuda']} cannot use it", advice)
    if not gpus:
        return Check("gpu", "absent", "none; training runs on the CPU")
    found = ", ".join(f"{name} ({memory / 2**30:.0f} GiB, compute capability {_dotted(c)})" for name, memory, c in gpus)
    if not facts["hip"] and any(capability < [8, 0] for *_, capability in gpus):
        return Check("gpu", "warning", found, 'below compute capability 8.0 bf16 is emulated: set dtype = "float32"')
    return Check("gpu", "ok", found)


def check_triton(gpu: bool) -> Check:
    version = _version("triton") or _version("pytorch-triton-rocm")
    needed = _dotted(MIN_TRITON)
    if version and _numbers(version) < MIN_TRITON:
        return Check("triton", "warning", version, f"kernels need {needed}; it comes with torch: pip install -U torch triton")
    if version:
        return Check("triton", "ok", version)
    if gpu:
        return Check("triton", "warning", "not installed, and there is a GPU", f"pip install 'triton>={needed}'")
    return Check("triton", "absent", "not needed without a GPU")


def check_gloo(facts: dict[str, Any]) -> Check:
    if facts.get("gloo"):
        return Check("gloo", "ok", "several processes on CPUs")
    return Check("gloo", "warning", "this torch has no gloo", "several processes on CPUs need it: install torch's official build")


def check_nccl(facts: dict[str, Any]) -> Check:
    if facts.get("nccl"):
        return Check("nccl", "ok", "several GPUs")
    if len(facts.get("gpus", [])) > 1:
        return Check("nccl", "warning", "this torch has no NCCL", "several GPUs need it: install torch's official CUDA build")
    return Check("nccl", "absent", "not needed without several GPUs")


# Libraries beside torch


def check_apex() -> Check:
    """NVIDIA's apex has these two packages; the web toolkit of the same name in the public registry has neither."""
    spec = importlib.util.find_spec("apex")
    if spec is None and _version("apex") is None:
        return Check("apex", "absent", "not needed")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = f"{_version('apex') or 'no version'}{f' at {folders[0]}' if folders else ''}"
    if any((f / "optimizers").is_dir() and (f / "normalization").is_dir() for f in folders):
        return Check("apex", "ok", f"{found}, NVIDIA's")
    advice = "pip uninstall apex; if you want NVIDIA's, build it from its own source, as its README says"
    return Check("apex", "error", f"{found}; not NVIDIA's, but libraries that look for NVIDIA's will take it for that", advice)


def check_companion(name: str) -> Check:
    """torchvision or torchaudio: whether it fits the installed torch by its version, and whether it can be imported."""
    version, torch = _version(name), _version("torch")
    if version is None:
        return Check(name, "absent", "not needed")
    mine, host = _numbers(version), _numbers(torch or "")
    if name == "torchvision":  # torchvision 0.28 is built for torch 2.13
        wanted, fits = f"==0.{host[1] + 15}.*", mine == (0, host[1] + 15)
    elif host >= (2, 11):  # torchaudio keeps to torch's stable interface since 2.11, and then runs with every later torch
        wanted, fits = ">=2.11", (2, 11) <= mine <= host
    else:
        wanted, fits = f"=={_dotted(host)}.*", mine == host
    ok, said = _python(f"import {name}")
    if ok and fits:
        return Check(name, "ok", version)
    found = f"{version} is not for torch {torch}" if not fits else f"{version} with torch {torch}"
    found += "" if ok else f"; it cannot be imported: {said}"
    install = f"pip install '{name}{wanted}' from where torch came"
    advice = f"pip uninstall {name}, or {install}; transformers imports it if it is there"
    return Check(name, "warning" if ok else "error", found, advice)


def check_library(name: str) -> Check:
    if version := _version(name):
        return Check(name, "ok", version)
    extra = LIBRARIES[name]
    return Check(name, "absent", f"optional; pip install 'smalt[{extra}]' brings it" if extra else "optional")


def check_requirements() -> list[Check]:
    """Smalt's own requirements, and those of each extra: installed, and of a version that it was made for."""
    from packaging.requirements import Requirement  # a requirement of matplotlib

    try:
        metadata = importlib.metadata.metadata("smalt")
    except importlib.metadata.PackageNotFoundError:
        return [Check("requirements", "error", "smalt is not installed", INSTALL)]
    requirements = [Requirement(r) for r in metadata.get_all("Requires-Dist") or []]
    checks = []
    for extra in ("", *(metadata.get_all("Provides-Extra") or [])):
        applies = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
        mine = [r for r in applies if ("extra" in str(r.marker)) == bool(extra)]
        found = [(r, _version(r.name)) for r in mine]
        missing = [r.name for r, version in found if version is None]
        wrong = [f"{r.name} {v}, not {r.specifier}" for r, v in found if v and not r.specifier.contains(v, prereleases=True)]
        name, install = (f"extra {extra}", f"pip install 'smalt[{extra}]'") if extra else ("requirements", INSTALL)
        if wrong or (missing and not extra):
            problem = "; ".join([*wrong, *(f"{m} is missing" for m in missing)])
            checks.append(Check(name, "warning" if extra else "error", problem, install))
        elif missing:
            checks.append(Check(name, "absent", f"without {', '.join(missing)}; {install} brings it"))
        else:
            checks.append(Check(name, "ok", ", ".join(f"{r.name} {version}" for r, version in found)))
    return checks


# Smalt itself

_IMPORT_ROOMS = f"""
import importlib, json
broken = []
for room in {ROOMS}:
    try:
        importlib.import_module("smalt." + room)
    except Exception as error:
        broken.append(f"smalt.{{room}}: {{error}}")
print(json.dumps(broken))
"""


def check_smalt() -> list[Check]:
    """Whether every room can be imported, and whether the command is on the path."""
    ok, said = _python(_IMPORT_ROOMS)
    broken = json.loads(said) if ok else [said]
    rooms = Check("smalt", "ok", f"{', '.join(ROOMS)} can be imported")
    if broken:
        rooms = Check("smalt", "error", "; ".join(broken), f"repair what is named, then {INSTALL} again")
    ok, said = _python("from importlib.metadata import entry_points as e; e(group='console_scripts')['smalt'].load()")
    if not ok:
        return [rooms, Check("command", "error", f"smalt cannot start: {said}", INSTALL)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if where := shutil.which("smalt", path=path):
        return [rooms, Check("command", "ok", where)]
    advice = "activate the environment, or python -m smalt.engine.cli"
    return [rooms, Check("command", "warning", "smalt is not on the path", advice)]


# Means


def _python(code: str) -> tuple[bool, str]:
    """Run code in a fresh interpreter; whether it ended well, and the last line that it printed, or of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return False, f"no end after {TIMEOUT:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = lines[-1] if lines else f"exit status {done.returncode}"
    return done.returncode == 0, last


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; (0, 0) of what is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _dotted(version: tuple[int, ...] | list[int]) -> str:
    return ".".join(map(str, version))


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
