"""Two machines with a bad link between them: it takes longer, and that is all."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.e2e.network import DELAY_SECONDS, Network, missing, network
from tests.e2e.services import clean_environment, running
from tests.fault.conftest import Rows

pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}"),
]

ENCODER, DIT = "192.0.2.1:50051", "192.0.2.2:50052"
BAD = {"loss": 0.02, "bytes_per_second": 10e6 / 8}
FAR = {"delay_seconds": 0.3}
GOOD = {"loss": 0.0, "delay_seconds": DELAY_SECONDS, "bytes_per_second": 125e6}
SILENT_SECONDS, SHORT_SILENCE_SECONDS = 20.0, 3.0
"""More than it takes to give up a peer that says nothing; less, which every push waits for."""

CLIENTS = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
from zimage_client import Client, Picture, Progress
address, times, at_once = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def draw(number):
    began, is_told = time.monotonic(), False
    with Client(address) as client:
        for event in client.stream("a red circle", seed=3, steps=30, packing="solo"):
            if isinstance(event, Progress) and event.step >= 5 and not is_told:
                print(json.dumps("denoising"), flush=True)
                is_told = True
            if isinstance(event, Picture):
                print(json.dumps([event.pixels_sha256, time.monotonic() - began]), flush=True)

with ThreadPoolExecutor(at_once) as pool:
    list(pool.map(draw, range(times)))
"""


@dataclass(frozen=True)
class Apart:
    """The encoder and clients left, the DiT service right."""

    sides: Network
    expected: str
    """The picture's digest when nothing happens."""


@pytest.fixture(scope="module")
def apart(model_folder: Path) -> Iterator[Apart]:
    model = "--model", str(model_folder), "--insecure"
    with (
        network([ENCODER.partition(":")[0]], [DIT.partition(":")[0]], {}) as sides,
        running("encoder_service", *model, listen=ENCODER, inside=sides.left) as encoder,
        running("dit_service", *model, "--encoder", ENCODER, listen=DIT, inside=sides.right) as dit,
    ):
        for service in (encoder, dit):
            service.wait_for_line("listens on")
        with _clients(sides.right, 1) as said:
            assert json.loads(said.readline()) == "denoising"
            expected, _ = json.loads(said.readline())
        yield Apart(sides, expected)


@contextmanager
def _clients(inside: Sequence[str], times: int, at_once: int = 1) -> Iterator[IO[str]]:
    """What they print; when the block ends they have ended well."""
    command = [*inside, sys.executable, "-c", CLIENTS, DIT, str(times), str(at_once)]
    environment = clean_environment(Path("/nowhere"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        try:
            yield process.stdout
            assert process.wait() == 0
        finally:
            process.kill()


LINKS = {
    "a link of 40 ms round trip, 10 Mbit/s and 2 % loss": BAD,
    "a link of 600 ms round trip": FAR,
}


@pytest.mark.parametrize("what", LINKS)
def test_a_bad_link_changes_no_picture(apart: Apart, what: str, rows: Rows) -> None:
    apart.sides.say(LINKS[what])
    try:
        with _clients(apart.sides.left, rows.times) as said:
            pictures = [json.loads(line) for line in said if "denoising" not in line]
    finally:
        apart.sides.say(GOOD)
    assert [sha256 for sha256, _ in pictures] == rows.times * [apart.expected]
    seconds = [seconds for _, seconds in pictures]
    rows.enter(f"{what}, between client and DiT and between DiT and encoder", seconds)


def test_a_link_that_is_gone_for_a_while_costs_that_while(apart: Apart, rows: Rows) -> None:
    silence = SILENT_SECONDS if rows.times > 1 else SHORT_SILENCE_SECONDS
    with _clients(apart.sides.left, rows.times, at_once=rows.times) as said:
        assert json.loads(said.readline()) == "denoising"
        apart.sides.cut()
        try:
            time.sleep(silence)
        finally:
            apart.sides.mend()
        mended = time.monotonic()
        took = []
        for line in said:
            if "denoising" not in line:
                assert json.loads(line)[0] == apart.expected
                took.append(time.monotonic() - mended)
    assert len(took) == rows.times
    rows.enter(f"the link is gone for {silence:.0f} s while denoising, for all at once", took)
