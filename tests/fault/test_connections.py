"""Connections that break, stall or are abused: nobody else suffers, nobody gets less than what was
asked for."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.e2e.relay import Relay, relaying
from tests.e2e.services import PATIENCE_SECONDS
from tests.fault.conftest import Rows
from tests.fault.stack import Supervised, supervised
from zimage_client import Client, Options, Picture, Progress
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc

pytestmark = pytest.mark.timeout(0)

PROMPT = "a red circle"
WISH = Options(seed=3, steps=30, packing="solo")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HALF_A_FRAME = bytes((0, 1, 0, 1, 4, 0, 0, 0, 1, 0x83))
"""The head of a frame of 256 bytes, and the first of them."""
_BEGINNINGS = (b"", b"PRI", _PREFACE, _PREFACE + _HALF_A_FRAME, b"GET / HTTP/1.1\r\n")
_HALF_OPEN = 60
SILENT_SECONDS = 35.0
"""More than gRPC's first pings, after which it would ask once a minute."""
NO_LONGER_SECONDS = 50.0
"""Less than the minute after which gRPC itself would notice that nobody answers."""


@pytest.fixture(scope="module")
def dit(model_folder: Path) -> Iterator[Supervised]:
    with supervised(model_folder, hung_after_seconds=300) as ([dit], _):
        yield dit


@pytest.fixture(scope="module")
def expected(dit: Supervised) -> str:
    """The picture's digest when nothing happens."""
    with Client(dit.address) as client:
        return client.generate(PROMPT, **WISH).pictures[0].pixels_sha256


BREAKS: dict[str, Callable[[Relay], None]] = {
    "is cut": Relay.cut,
    "is closed at the client's side": Relay.half_close,
    "stands still": Relay.stall,
}
SHORT = ["is cut", "is closed at the client's side"]
"""Those that every push sees: a peer that says nothing is given up after 15 s."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "what" in metafunc.fixturenames:
        is_short = metafunc.config.getoption("--times") == 1
        metafunc.parametrize("what", SHORT if is_short else BREAKS)


def test_a_connection_that_breaks_is_left_for_a_new_one(
    dit: Supervised, expected: str, what: str, rows: Rows
) -> None:
    strike = BREAKS[what]
    with ThreadPoolExecutor(1 if what in SHORT else rows.times) as pool:
        jobs = [pool.submit(_struck, dit, strike, expected) for _ in range(rows.times)]
        took = [job.result() for job in jobs]
    rows.enter(f"a connection {what} while denoising", took)


def _struck(dit: Supervised, strike: Callable[[Relay], None], expected: str) -> float:
    """The seconds from the strike until the picture is there."""
    struck = 0.0
    with relaying(dit.address) as relay, Client(relay.address) as client:
        for event in client.stream(PROMPT, **WISH):
            if isinstance(event, Progress) and event.step >= 5 and not struck:
                strike(relay)
                struck = time.monotonic()
            if isinstance(event, Picture):
                assert event.pixels_sha256 == expected
                ended = time.monotonic()
    assert struck
    assert ended - struck < NO_LONGER_SECONDS
    return ended - struck


def test_a_connection_that_stands_still_in_silence_is_left_for_a_new_one(
    dit: Supervised, expected: str, rows: Rows
) -> None:
    """All at once, and nobody hears of any work before their connections stand still."""
    silence = SILENT_SECONDS if rows.times > 1 else 1.0

    def draw(address: str) -> float:
        with Client(address) as client:
            assert client.generate(PROMPT, **WISH).pictures[0].pixels_sha256 == expected
        return time.monotonic()

    worker: psutil.Process = dit.service.worker
    with ExitStack() as closing:
        relays = [closing.enter_context(relaying(dit.address)) for _ in range(rows.times)]
        worker.suspend()
        try:
            pool = closing.enter_context(ThreadPoolExecutor(rows.times))
            jobs = [pool.submit(draw, relay.address) for relay in relays]
            time.sleep(silence)
            for relay in relays:
                relay.stall()
        finally:
            worker.resume()
        struck = time.monotonic()
        took = [job.result() - struck for job in jobs]
    assert max(took) < NO_LONGER_SECONDS
    rows.enter(f"connections stand still after {silence:.0f} s of silence", took)


def test_who_reads_nothing_holds_up_nobody_and_gets_everything(
    dit: Supervised, expected: str, rows: Rows
) -> None:
    stub = dit_pb2_grpc.DitServiceStub(dit.service.channel)
    took = []
    for _ in range(rows.times):
        spec = dit_pb2.GenerateSpec(seed=3, step_count=2, width_px=256, height_px=256)
        spec.positive.segments.add().prompt.text = PROMPT
        spec.image_count = 4
        slow = stub.Generate(iter([dit_pb2.GenerateRequest(spec=spec)]), timeout=PATIENCE_SECONDS)
        assert next(slow).HasField("accepted")
        began = time.monotonic()
        with Client(dit.address) as client:
            assert client.generate(PROMPT, **WISH).pictures[0].pixels_sha256 == expected
        took.append(time.monotonic() - began)
        *_, last = slow
        assert len(last.completed.artifacts) == spec.image_count
    rows.enter("another client reads nothing of four large pictures", took)


def test_connections_that_say_nothing_or_half_of_it_hold_up_nobody(
    dit: Supervised, expected: str, rows: Rows
) -> None:
    front = psutil.Process(dit.service.process.pid)
    took = []
    for _ in range(rows.times):
        with ExitStack() as closing:
            for number in range(_HALF_OPEN):
                half = closing.enter_context(socket.socket(socket.AF_UNIX))
                half.connect(dit.address.removeprefix("unix:"))
                with suppress(BrokenPipeError):  # it may have seen already what this is
                    half.sendall(_BEGINNINGS[number % len(_BEGINNINGS)])
            began = time.monotonic()
            with Client(dit.address) as client:
                assert client.generate(PROMPT, **WISH).pictures[0].pixels_sha256 == expected
            took.append(time.monotonic() - began)
        until = time.monotonic() + PATIENCE_SECONDS
        while front.num_fds() >= _HALF_OPEN:
            assert time.monotonic() < until
            time.sleep(0.05)
    rows.enter(f"{_HALF_OPEN} other connections say nothing, or half of a frame", took)
