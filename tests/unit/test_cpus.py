"""Threads and cores, as this machine and others tell of themselves."""

import os
from pathlib import Path

import pytest

from zimage_core.serving import cpus

ONE_SOCKET = [0] * 8


def _system(root: Path, sockets: list[int], siblings: dict[int, str], quota: str = "") -> Path:
    """The socket of each CPU, and those that share a core."""
    files = {}
    for cpu, socket in enumerate(sockets):
        files[f"devices/system/cpu/cpu{cpu}/topology/physical_package_id"] = str(socket)
    for cpu, text in siblings.items():
        files[f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = text
    if quota:
        files["fs/cgroup/cpu.max"] = quota
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The process may use eight CPUs; what it restricts itself to."""
    asked: list[set[int]] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, to: asked.append(to), raising=False)
    return asked


def test_every_core_has_one_thread(kept: list[set[int]], tmp_path: Path) -> None:
    pairs = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    assert cpus.settle(_system(tmp_path, ONE_SOCKET, pairs)) == 4
    assert not kept


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("200000 100000", 2), ("250000 100000", 2), ("10000 100000", 1)],
)
def test_a_container_has_what_its_quota_says(
    kept: list[set[int]], tmp_path: Path, quota: str, threads: int
) -> None:
    assert cpus.settle(_system(tmp_path, ONE_SOCKET, {}, quota)) == threads
    assert not kept


def test_the_older_kind_of_quota_counts_too(kept: list[set[int]], tmp_path: Path) -> None:
    system = _system(tmp_path, ONE_SOCKET, {})
    (system / "fs/cgroup/cpu").mkdir(parents=True)
    for name, value in (("quota", 150000), ("period", 100000)):
        (system / f"fs/cgroup/cpu/cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert cpus.settle(system) == 1
    assert not kept


def test_it_stays_on_the_socket_with_the_most(kept: list[set[int]], tmp_path: Path) -> None:
    assert cpus.settle(_system(tmp_path, [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0], {})) == 5
    assert kept == [{3, 4, 5, 6, 7}]


def test_a_sandbox_that_forbids_it_costs_speed_alone(
    kept: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: int, __: set[int]) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    assert cpus.settle(_system(tmp_path, [0, 0, 0, 0, 1, 1, 1, 1], {})) == 8
    assert not kept


def test_a_system_that_tells_nothing_is_used_whole(kept: list[set[int]], tmp_path: Path) -> None:
    assert cpus.settle(tmp_path) == 8
    assert not kept


def test_whoever_has_decided_is_right(
    kept: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpus.settle(_system(tmp_path, [0, 0, 0, 0, 1, 1, 1, 1], {})) is None
    assert not kept
