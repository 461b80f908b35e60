"""How much memory a worker's process holds."""

import os
import sys
from pathlib import Path

_PAGES = Path("/proc/self/statm")


def held() -> dict[str, int]:
    """Bytes on the host, and on the device where that has memory of its own: what tensors take, and
    what was reserved for them. Asks the torch that is there: this room imports none."""
    found = _host()
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    if torch.cuda.is_initialized():
        found["device"] = torch.cuda.memory_allocated()
        found["device_reserved"] = torch.cuda.memory_reserved()
    elif torch.backends.mps.is_available() and torch.mps.driver_allocated_memory():
        found["device"] = torch.mps.current_allocated_memory()
        found["device_reserved"] = torch.mps.driver_allocated_memory()
    return found


def _host() -> dict[str, int]:
    """In RAM now; where the system does not tell as simply, the most that ever was."""
    if _PAGES.exists():
        return {"host": int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if sys.platform == "win32":
        return {}
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
