"""How many threads a worker should compute with on a CPU, and on which cores.

One a core: two of a core's own wait for each other. No more than the quota of a container: beyond
it, all of them are stopped together for the rest of every tenth of a second, which libraries that
count cores do not see. Those of one socket: memory behind the other is half as fast to reach, so
that a second process there, which whoever starts it keeps on that socket's CPUs, gains more than
more threads here.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from zimage_core.settings import are_threads_given

_log = logging.getLogger(__name__)

_SYSTEM = Path("/sys")


def settle(system: Path = _SYSTEM) -> int | None:
    """Stays with the cores that are best, and returns how many threads to compute with; None where
    somebody has decided it by OMP_NUM_THREADS, or this system tells nothing."""
    if are_threads_given() or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    near = _largest_socket(allowed, system)
    if near != allowed:
        try:
            os.sched_setaffinity(0, near)
            _log.info("of %s CPUs, the %s of one socket are used", len(allowed), len(near))
        except OSError as error:  # a sandbox forbids it
            _log.info("all %s CPUs are used: %s", len(allowed), error)
            near = allowed
    return max(1, min(_core_count(near, system), _quota(system) or len(near)))


def _largest_socket(allowed: set[int], system: Path) -> set[int]:
    """The CPUs of the socket with the most of those that this process may use. (A NUMA node may be
    a part of one.)"""
    sockets: defaultdict[str, set[int]] = defaultdict(set)
    for cpu in sorted(allowed):
        at = f"devices/system/cpu/cpu{cpu}/topology/physical_package_id"
        sockets[_read(system / at)].add(cpu)
    return max(sockets.values(), key=len)


def _core_count(cpus: Iterable[int], system: Path) -> int:
    """Those that share a core count once."""
    siblings = "devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(system / siblings.format(cpu)) or str(cpu) for cpu in cpus})


def _quota(system: Path) -> int | None:
    """The cores' worth of time that the container has, if that is bounded."""
    own = _read(system / "fs/cgroup/cpu.max").split()
    old = "fs/cgroup/cpu/cpu.cfs_{}_us"
    most, period = own or (_read(system / old.format(name)) for name in ("quota", "period"))
    if not (most.isdecimal() and period.isdecimal()):  # "max", "-1", or nothing there
        return None
    return max(1, int(most) // int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
