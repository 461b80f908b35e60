"""How much memory a worker's process holds."""

import ctypes
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

_PAGES = Path("/proc/self/statm")
_STATUS, _MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORGET_THE_PEAK = "5"


def held() -> dict[str, int]:
    """Bytes on the host, and on the device where that has memory of its own: what tensors take, and
    what was reserved for them, with the peaks of both. Asks the torch that is there: this room
    imports none."""
    found = _host() | _host_most()
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    if torch.cuda.is_initialized():
        found["device"] = torch.cuda.memory_allocated()
        found["device_peak"] = torch.cuda.max_memory_allocated()
        found["device_reserved"] = torch.cuda.memory_reserved()
    elif torch.backends.mps.is_available() and torch.mps.driver_allocated_memory():
        found["device"] = torch.mps.current_allocated_memory()
        found["device_reserved"] = torch.mps.driver_allocated_memory()
    return found


def used_and_peak() -> tuple[int, int]:
    """Bytes that tensors take of the device, and took at the most since this was asked before; of a
    CPU's memory, what the process takes, and its peak where the system tells."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), peak
    found = held()
    used = found.get("device", found.get("host", 0))
    return used, max(used, _host_peak() if "device" not in found else 0)


def give_back() -> None:
    """Hands what was freed back to the system: between blocks that stay, much of it is kept for the
    next one that fits. Does nothing where the C library is another than glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _host_peak() -> int:
    peak = _host_most().get("host_peak", 0)
    with suppress(OSError):
        _MARKS.write_text(_FORGET_THE_PEAK)
    return peak


def _host_most() -> dict[str, int]:
    """At its peak, where the system tells."""
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        most = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
        return {"host_peak": most}
    return {}


def _host() -> dict[str, int]:
    """In RAM now; where the system does not tell as simply, the most that ever was."""
    if _PAGES.exists():
        return {"host": int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if sys.platform == "win32":
        return {}
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
