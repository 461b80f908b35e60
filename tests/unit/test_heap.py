"""The heap that the worker computes on."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import random
import resource
import torch
from dit_service.engine.heap import prepare_heap

def work(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        rows = draw.choice([96, 288, 640, 1152])
        kept = [torch.ones(rows, 768) for _ in range(draw.randint(2, 6))]
        wide = torch.ones(rows, 2048), torch.ones(rows, 2048)
        del kept, wide
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

prepare_heap()
draw = random.Random(0)
work(200)
print(work(50))
"""
ROUND_BYTES = 4 * 640 * (4 * 768 + 2 * 2048)  # in the middle


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is prepared")
def test_freed_activations_are_not_faulted_in_again() -> None:
    """In a process of its own, for a heap stays as it was prepared."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 50 * ROUND_BYTES / 4096 / 20
