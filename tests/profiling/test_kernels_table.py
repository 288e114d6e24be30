"""The committed table of what the compiler makes of the kernels, chip by chip."""

import pytest

from smalt.kernels.launch import TARGETS
from smalt.profiling.kernels.check import check

# Each takes minutes. A kernel that gets worse mostly does so on every chip of its maker.
OFTEN = ("sm_90", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(t, marks=[] if t in OFTEN else pytest.mark.exhaustive) for t in TARGETS])
def test_no_kernel_got_worse(target):
    outcome = check(targets=[target], beside=False)
    assert outcome.rows
    assert not [str(violation) for violation in outcome.violations]
