"""What all tests share. float64 is the truth; errors of tensors are measured by ``error``."""

import inspect
import os

import pytest
import torch
from hypothesis import Phase, settings

# Without a GPU the kernels run in Triton's interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors are tiny. More threads only wait for each other, on a busy machine for minutes.
torch.set_num_threads(1)
# A failing case is shown as it was found: to shrink one of interpreted kernels takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target)
settings.register_profile("smalt", deadline=None, derandomize=True, max_examples=25, database=None, phases=PHASES)
settings.load_profile("smalt")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _with_room(call):
    return call()


# CPython 3.11 keeps the frames of calls in chunks of 16 KiB, and maps and unmaps memory at each call that passes the end of one. A
# frame this large gets a chunk with room for all that it calls. Without it interpreted kernels spend half of their time there.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=200_000)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    given = pyfuncitem.funcargs
    arguments = {name: given[name] for name in inspect.signature(pyfuncitem.obj).parameters if name in given}
    _with_room(lambda: pyfuncitem.obj(**arguments))
    return True


def _error(got, want, floor=0.0):
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    difference = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    size = max(want.double().abs().max().item() if want.numel() else 0.0, floor)
    return difference if difference == 0 or size == 0 else difference / size


@pytest.fixture(scope="session")
def error():
    """error(got, want, floor=0) = max|got - want| / max(max|want|, floor); NaN where either has a NaN."""
    return _error


@pytest.fixture(scope="session")
def gradient_error():
    """gradient_error(got, want, floor=1e-3): the largest error of any gradient, floor in units of the RMS of all wanted ones.

    Some true gradients are zero; relative to themselves they would be noise.
    """

    def measure(got, want, floor=1e-3):
        got, want = list(got), list(want)
        floor *= (sum(w.double().square().sum().item() for w in want) / sum(w.numel() for w in want)) ** 0.5
        errors = [_error(g, w, floor) for g, w in zip(got, want, strict=True)]
        return max(errors, key=lambda e: (e != e, e))

    return measure
