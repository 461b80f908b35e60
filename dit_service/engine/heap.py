"""How the worker's process holds host memory while it computes on the CPU."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def prepare_heap() -> None:
    """Keeps freed activations in the process and lays large tensors on huge pages.

    By default glibc hands freed memory back to the kernel and every step faults it in again, page
    by page. Call it before the first tensor; it does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.putenv("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for it at its first allocation
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
