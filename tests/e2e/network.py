"""Two machines and the link between them, as far as one machine can have them: two network
namespaces, joined by the program in `link.py`."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.e2e import link

DELAY_SECONDS = 0.02
"""One way."""

_BYTES_PER_SECOND = 125e6
_QUEUE_LENGTH = 1000
_PREFIX_LENGTH = 24


class Network:
    """Two sides; a command that begins with `left` or `right` runs there."""

    def __init__(self, process: "subprocess.Popen[str]", left: str, right: str) -> None:
        self._process = process
        self.left = ("ip", "netns", "exec", left)
        self.right = ("ip", "netns", "exec", right)

    def cut(self) -> None:
        """From now on all packets get lost, without a word to anybody."""
        self.say({"loss": 1.0})

    def mend(self) -> None:
        """From now on none does."""
        self.say({"loss": 0.0})

    def say(self, what: Mapping[str, object]) -> None:
        """Tells the link, and waits until it has heard it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", "the link is gone; it said why above"


def missing() -> str:
    """Why this machine can have no such network; empty when it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    lacks = {
        "root": os.geteuid() == 0,
        str(link.TUN): link.TUN.exists(),
        "ip, of the package iproute2": shutil.which("ip") is not None,
    }
    return ", ".join(name for name, is_there in lacks.items() if not is_there)


@contextmanager
def network(
    left: Sequence[str], right: Sequence[str], hosts: Mapping[str, Sequence[str]]
) -> Iterator[Network]:
    """The addresses of both sides, and the addresses that names stand for."""
    unique = secrets.token_hex(4)  # tests may run beside others, or after some that were killed
    names = [f"zimage-{unique}-{side}" for side in ("left", "right")]
    sides = [
        link.Side(namespace=name, addresses=[f"{one}/{_PREFIX_LENGTH}" for one in addresses])
        for name, addresses in zip(names, (left, right), strict=True)
    ]
    lines = [f"{address} {name}\n" for name, known in hosts.items() for address in known]
    wire = link.Wire(
        sides=sides,
        hosts="".join(["127.0.0.1 localhost\n", *lines]),
        delay_seconds=DELAY_SECONDS,
        queue_length=_QUEUE_LENGTH,
        loss=0.0,
        bytes_per_second=_BYTES_PER_SECOND,
    )
    with subprocess.Popen(
        [sys.executable, str(Path(link.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C ends the tests first
    ) as process:
        joined = Network(process, *names)
        joined.say(wire)
        yield joined
        # The end of the block is the end of its standard input.
