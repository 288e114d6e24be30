"""The committed table of what the compiler makes of the kernels, chip by chip."""

import pytest

from smalt.kernels.launch import TARGETS
from smalt.profiling.kernels.check import check


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_got_worse(target):
    outcome = check(targets=[target], beside=False)
    assert outcome.rows
    assert not [str(violation) for violation in outcome.violations]
