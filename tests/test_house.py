"""Rules of the house that no other tool checks."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "model", "parallel", "profiling", "engine", "integrations")
SOURCES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_files_are_short():
    assert len(SOURCES) > 30
    long = [p.name for p in [*SOURCES, *(ROOT / "tests").rglob("*.py")] if len(p.read_text().splitlines()) >= 500]
    assert not long


def test_kernels_and_model_know_no_process_group():
    found = [(p, name) for room in ("kernels", "model") for p in (ROOT / room).rglob("*.py") for name in imports(p)]
    assert found
    assert not [f for f in found if f[1].startswith("torch.distributed")]


@pytest.mark.slow
def test_rooms_are_imported_under_one_name():
    assert not [(p, name) for p in SOURCES for name in imports(p) if name.split(".")[0] in ROOMS]


@pytest.mark.slow
def test_optional_libraries_are_not_loaded_by_the_default_run():
    code = "import sys, smalt.engine.trainer, smalt.engine.cli; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "'torch'" in loaded
    optional = (
        "transformers", "wandb", "sklearn", "deepspeed", "vllm", "datasets", "lm_eval", "math_verify", "datasketch", "imagehash",
        "py3langid",
    )  # fmt: skip
    assert not [m for m in optional if f"'{m}'" in loaded]


def test_no_file_of_engine_shadows_a_library():
    # `torchrun engine/train.py` puts engine/ first on the path: a file there must not be called like anything that is imported.
    installed = {name for names in importlib.metadata.packages_distributions() for name in [names]}
    ours = {p.stem for p in (ROOT / "engine").iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__", "__pycache__"}
    assert not ours & (installed | set(sys.stdlib_module_names))


@pytest.mark.slow
def test_transformers_imports_from_the_root_beside_the_kernels_of_hugging_face():
    pytest.importorskip("transformers")
    assert importlib.util.find_spec("kernels"), "the Hugging Face package `kernels` is part of the extra dev"
    code = "import transformers.integrations.hub_kernels, kernels, smalt.kernels; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "kernels") not in done.stdout


def test_version_is_in_the_changelog():
    version = importlib.metadata.version("smalt")
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
