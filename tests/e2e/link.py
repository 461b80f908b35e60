"""A slow wire between two network namespaces, in user space: many kernels come without netem.

A program of its own, so that packets flow while the tests wait, and so that the end of its standard
input is the end of the namespaces and of all that runs in them, however the tests ended. Standard
library alone.

Reads JSON objects, one a line, and answers each with "done". The first is `Wire` with its two
`Side`s; later ones change its `loss`, `delay_seconds` or `bytes_per_second`, as {"loss": 1.0}.
"""

import fcntl
import json
import os
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypedDict

TUN = Path("/dev/net/tun")

_OF_NAMESPACES = Path("/etc/netns")
"""`ip netns exec` puts the files in NAME here over those in /etc."""
_DEVICE = "wire"
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_MOST_BYTES = 1 << 16
_PACKETS_AT_ONCE = 64


class Side(TypedDict):
    """One end of the wire."""

    namespace: str
    addresses: list[str]
    """With the length of their prefix."""


class Wire(TypedDict):
    """What lies between them."""

    sides: list[Side]
    hosts: str
    """The /etc/hosts of both."""
    delay_seconds: float
    """One way."""
    queue_length: int
    """Packets under way, each way; what comes when it is full gets lost."""
    loss: float
    """The share of packets that gets lost."""
    bytes_per_second: float


class Direction:
    """Packets on their way from one device to the other, in order."""

    def __init__(self, source: int, target: int, wire: Wire) -> None:
        self.source = source
        self._target = target
        self._wire = wire
        self._is_free_at = 0.0
        self._under_way: deque[tuple[float, bytes]] = deque()

    @property
    def next_arrival(self) -> float:
        """When the next packet is at the other end."""
        return self._under_way[0][0] if self._under_way else float("inf")

    def take_in(self) -> None:
        """Takes what the kernel sends."""
        wire = self._wire
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet = os.read(self.source, _MOST_BYTES)
            except BlockingIOError:
                return
            if len(self._under_way) < wire["queue_length"] and random.random() >= wire["loss"]:
                begins = max(time.monotonic(), self._is_free_at)
                self._is_free_at = begins + len(packet) / wire["bytes_per_second"]
                self._under_way.append((self._is_free_at + wire["delay_seconds"], packet))

    def hand_out(self) -> None:
        """Hands the kernel what has been under way for long enough."""
        while self.next_arrival <= time.monotonic():
            _, packet = self._under_way.popleft()
            with suppress(OSError):  # a device that is busy or down: the packet is lost
                os.write(self._target, packet)


def main() -> None:
    """Runs until standard input ends, or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as closing:
        wire: Wire = json.loads(os.read(sys.stdin.fileno(), _MOST_BYTES))
        devices = []
        for side in wire["sides"]:
            closing.enter_context(_namespace(side["namespace"], wire["hosts"]))
            devices.append(closing.enter_context(_device(side)))
        left, right = devices
        _answer()
        _carry([Direction(left, right, wire), Direction(right, left, wire)], wire)


def _carry(directions: list[Direction], wire: Wire) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        for direction in directions:
            selector.register(direction.source, selectors.EVENT_READ, direction)
        while True:
            for direction in directions:
                direction.hand_out()
            next_arrival = min(direction.next_arrival for direction in directions)
            patience = None if next_arrival == float("inf") else next_arrival - time.monotonic()
            for key, _ in selector.select(patience):
                if key.data is not None:
                    key.data.take_in()
                elif line := os.read(sys.stdin.fileno(), _MOST_BYTES):
                    wire |= json.loads(line)
                    _answer()
                else:
                    return


def _answer() -> None:
    sys.stdout.write("done\n")
    sys.stdout.flush()


@contextmanager
def _namespace(name: str, hosts: str) -> Iterator[None]:
    """A network namespace; what still runs in it at the end is killed."""
    files = _OF_NAMESPACES / name
    _ip("netns", "add", name)
    try:
        files.mkdir(parents=True)
        (files / "hosts").write_text(hosts)
        yield
    finally:
        for pid in _ip("netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", name)
        shutil.rmtree(files, ignore_errors=True)


@contextmanager
def _device(side: Side) -> Iterator[int]:
    """The end of a wire in a namespace; packets are read from it and written to it."""
    device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    try:
        # The kernel chooses a free name, then the device moves to where nobody else has one.
        wish = struct.pack("16sH22x", b"zimage%d", _TUN_WITHOUT_HEADER)
        name = fcntl.ioctl(device, _TUNSETIFF, wish)[:16].rstrip(b"\0").decode()
        namespace = side["namespace"]
        _ip("link", "set", "dev", name, "netns", namespace, "name", _DEVICE)
        for address in side["addresses"]:
            _ip("-n", namespace, "address", "add", address, "dev", _DEVICE)
        for one in ("lo", _DEVICE):
            _ip("-n", namespace, "link", "set", "dev", one, "up")
        yield device
    finally:
        os.close(device)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
