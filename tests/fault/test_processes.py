"""Processes that die or stand still while they work: clients get the same picture, only later."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.e2e.services import PATIENCE_SECONDS
from tests.fault.conftest import Rows
from tests.fault.stack import Supervised, supervised
from zimage_client import Accepted, Client, Event, Options, Picture, Progress

pytestmark = pytest.mark.timeout(0)

PROMPT = "a red circle on a blue background"
_PAUSE_SECONDS = 0.5
"""Between the pictures of a client, so that services find a core to load on."""
WISH = Options(seed=7, steps=30, packing="solo", count=2)


@dataclass(frozen=True)
class Stack:
    """One of each."""

    dit: Supervised
    encoder: Supervised

    def wait_until_serving(self) -> None:
        self.dit.wait_until_serving()
        self.encoder.wait_until_serving()


@pytest.fixture(scope="module")
def stack(model_folder: Path) -> Iterator[Stack]:
    with supervised(model_folder) as ([dit], [encoder]):
        yield Stack(dit, encoder)


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[str]:
    """The digests of the pictures when nothing happens."""
    with Client(stack.dit.address) as client:
        made = client.generate(PROMPT, **WISH)
    return [picture.pixels_sha256 for picture in made.pictures]


def _paused(one: Supervised, seconds: float) -> None:
    one.hit(signal.SIGSTOP)
    process = one.service.process
    threading.Timer(seconds, process.send_signal, [signal.SIGCONT]).start()


def _killed_twice(one: Supervised) -> None:
    """Also the worker that comes after, while it loads."""
    first = one.service.worker
    first.kill()
    while True:
        with suppress(ValueError, psutil.Error):  # between the two there is none
            if (second := one.service.worker) != first:
                second.kill()
                return
        time.sleep(0.01)


PHASES: dict[str, Callable[[Event], bool]] = {
    "encoding": lambda event: isinstance(event, Progress) and event.stage == "encoding",
    "denoising": lambda event: isinstance(event, Progress) and event.step >= 5,
    "between two pictures": lambda event: isinstance(event, Picture),
    "decoding": lambda event: isinstance(event, Progress) and event.stage == "decoding",
}
WHILE_LOADING = "kill -9 of the DiT's worker, and of the next as it loads,"
STRIKES: dict[str, Callable[[Stack], None]] = {
    "kill -9 of the DiT's worker": lambda stack: stack.dit.hit_worker(signal.SIGKILL),
    "kill -9 of the DiT's front": lambda stack: stack.dit.hit(signal.SIGKILL),
    "SIGTERM for the DiT": lambda stack: stack.dit.hit(signal.SIGTERM),
    WHILE_LOADING: lambda stack: _killed_twice(stack.dit),
    "SIGSTOP of the DiT's worker": lambda stack: stack.dit.hit_worker(signal.SIGSTOP),
    "SIGSTOP of the DiT's front for 2 s": lambda stack: _paused(stack.dit, 2.0),
    "kill -9 of the encoder's front": lambda stack: stack.encoder.hit(signal.SIGKILL),
    "kill -9 of the encoder's worker": lambda stack: stack.encoder.hit_worker(signal.SIGKILL),
    "SIGSTOP of the encoder's front for 2 s": lambda stack: _paused(stack.encoder, 2.0),
    "SIGSTOP of the encoder's worker": lambda stack: stack.encoder.hit_worker(signal.SIGSTOP),
}
ENDS_A_FRONT = (
    "kill -9 of the DiT's front",
    "SIGTERM for the DiT",
    "kill -9 of the encoder's front",
)
OF_THE_DIT = [
    (strike, phase)
    for strike in STRIKES
    if "DiT" in strike
    for phase in PHASES
    if strike != WHILE_LOADING or phase == "denoising"
]
OF_THE_ENCODER = [(strike, "encoding") for strike in STRIKES if "encoder" in strike]
SHORT = [
    ("kill -9 of the DiT's worker", "denoising"),
    ("kill -9 of the DiT's front", "decoding"),
    ("SIGSTOP of the DiT's worker", "between two pictures"),
    ("kill -9 of the encoder's front", "encoding"),
]
"""Those that every push sees; `make fault` does all."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"strike", "phase"} <= set(metafunc.fixturenames):
        is_short = metafunc.config.getoption("--times") == 1
        every = SHORT if is_short else OF_THE_DIT + OF_THE_ENCODER
        metafunc.parametrize(("strike", "phase"), every)


def test_a_request_outlives_what_makes_it(
    stack: Stack, expected: list[str], strike: str, phase: str, rows: Rows
) -> None:
    took = []
    for _ in range(rows.times):
        pictures, struck = {}, 0.0
        fronts = {one: one.service for one in (stack.dit, stack.encoder)}
        with Client(stack.dit.address) as client:
            for event in client.stream(PROMPT, **WISH):
                if not struck and PHASES[phase](event):
                    STRIKES[strike](stack)
                    struck = time.monotonic()
                if isinstance(event, Picture):
                    assert event.index not in pictures
                    pictures[event.index] = event.pixels_sha256
        assert struck
        assert [pictures[index] for index in sorted(pictures)] == expected
        took.append(time.monotonic() - struck)
        for one, front in fronts.items():
            if strike in ENDS_A_FRONT and (one is stack.dit) == ("DiT" in strike):
                one.wait_for_successor(front)
        stack.wait_until_serving()
    rows.enter(f"{strike} while {phase}", took)


def test_a_client_that_dies_leaves_nothing_behind(stack: Stack, rows: Rows, tmp_path: Path) -> None:
    program = (
        "import sys; from zimage_client import Client, Progress\n"
        f"for event in Client({stack.dit.address!r}).stream('x', steps=1000, count=8):\n"
        "    if isinstance(event, Progress) and event.step: print(event.step, flush=True)"
    )
    took = []
    for _ in range(rows.times):
        stack.wait_until_serving()
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            process.kill()
        struck = time.monotonic()
        with Client(stack.dit.address) as client:
            while next(_accepted(client)).queue_position:
                assert time.monotonic() - struck < PATIENCE_SECONDS
                time.sleep(0.05)
        took.append(time.monotonic() - struck)
    rows.enter("kill -9 of a client while denoising: its place is free", took)


def _accepted(client: Client) -> Iterator[Accepted]:
    events = client.stream("x", steps=1, seed=1)
    yield from (event for event in events if isinstance(event, Accepted))
    events.close()


def test_everything_is_restarted_in_turn_under_load(model_folder: Path, rows: Rows) -> None:
    """Two DiT services, two encoders, eight clients: no request fails, no picture differs."""
    wishes = [Options(seed=seed, steps=8, packing="solo") for seed in range(8)]
    took = []
    with supervised(model_folder, dits=2, encoders=2) as (dits, encoders):
        at = ",".join(one.address for one in dits)
        with Client(at) as client:
            alone = [client.generate(PROMPT, **w).pictures[0].pixels_sha256 for w in wishes]
        over = threading.Event()

        def draw(number: int) -> list[str]:
            made = []
            with Client(at) as client:
                while not over.wait(_PAUSE_SECONDS):
                    made.append(client.generate(PROMPT, **wishes[number]).pictures[0].pixels_sha256)
            return made

        with ThreadPoolExecutor(len(wishes)) as pool:
            jobs = [pool.submit(draw, number) for number in range(len(wishes))]
            try:
                for one in -(-rows.times // 4) * (*dits, *encoders):
                    began, front = time.monotonic(), one.service
                    one.hit(signal.SIGTERM)
                    assert front.process.wait(PATIENCE_SECONDS) == 0
                    one.wait_for_successor(front)
                    took.append(time.monotonic() - began)
                    for job in jobs:
                        assert not job.done(), job.exception()  # all still draw
            finally:
                over.set()
            for job, sha256 in zip(jobs, alone, strict=True):
                assert set(job.result()) == {sha256}
    rows.enter("each of 2 DiT services and 2 encoders drained and restarted, 8 clients", took)
