"""How much memory a worker's process holds."""

import resource
import sys
from pathlib import Path

_PAGES = Path("/proc/self/statm")
_PEAK_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def held() -> dict[str, int]:
    """Bytes on the host, and on the device where that has memory of its own: what tensors take, and
    what was reserved for them. Asks the torch that is there: this room imports none."""
    found = {"host": _host()}
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    if torch.cuda.is_initialized():
        found["device"] = torch.cuda.memory_allocated()
        found["device_reserved"] = torch.cuda.memory_reserved()
    elif torch.backends.mps.is_available():
        found["device"] = torch.mps.current_allocated_memory()
        found["device_reserved"] = torch.mps.driver_allocated_memory()
    return found


def _host() -> int:
    """In RAM now; where the system does not tell, the most that ever was."""
    if _PAGES.exists():
        return int(_PAGES.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT_BYTES
