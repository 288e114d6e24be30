"""The committed table of what the compiler makes of the kernels, for the chip that docs/kernels.md shows."""

import pytest

from smalt.profiling.kernels.check import check


@pytest.mark.slow
def test_no_kernel_got_worse_on_sm_90():
    outcome = check(targets=["sm_90"], beside=False)
    assert outcome.rows
    assert not [str(violation) for violation in outcome.violations]
