"""What a worker's process takes: now, and at its peak since it was asked before."""

import sys

import pytest

from zimage_core.serving import memory

LARGE = 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_the_peak_is_that_since_it_was_asked_before() -> None:
    memory.used_and_peak()
    block = bytearray(LARGE)
    del block
    used, peak = memory.used_and_peak()
    assert peak - used > LARGE / 2
    used, peak = memory.used_and_peak()
    assert peak - used < LARGE / 2
