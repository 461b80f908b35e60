"""The services on two machines with a real distance between them, and an encoder that dies."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.network import DELAY_SECONDS, Network, missing, network
from tests.e2e.services import PATIENCE_SECONDS, Service, clean_environment, running
from tests.e2e.terminal import CLIENT, Terminal
from zimage_client import read_receipt

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"missing: {missing()}")

PROMPT = "a red circle on a blue background"
PICTURE = ("--seed", "5", "--steps", "4", "--width", "128", "--height", "128", "--solo")
"""To the last bit, so that pictures can be compared."""

FIRST, OTHER, DIT = "192.0.2.1:50051", "192.0.2.3:50051", "192.0.2.2:50052"
ENCODERS = "encoders.test:50051"
"""What the DiT service knows: the name of FIRST and OTHER."""
AWAY = f"the encoder service at {ENCODERS} is not available"

_CONNECTS = """
import socket, sys, time
address, port = sys.argv[1].split(":")
began = time.monotonic()
socket.create_connection((address, int(port))).close()
print(time.monotonic() - began)
"""

_ENCODES = """
import sys, time
from zimage_client import Client
with Client(encoder=f"grpc://{sys.argv[1]}") as client:
    for _ in range(8):
        client.encode("x")
        time.sleep(0.1)
"""


def _host(address: str) -> str:
    return address.partition(":")[0]


@pytest.fixture(scope="module")
def sides() -> Iterator[Network]:
    """The encoders left, the DiT service right."""
    encoders = [_host(FIRST), _host(OTHER)]
    with network(encoders, [_host(DIT)], {_host(ENCODERS): encoders}) as joined:
        yield joined


@pytest.fixture(scope="module")
def dit(sides: Network, model_folder: Path) -> Iterator[Service]:
    flags = ("--model", str(model_folder), "--encoder", ENCODERS, "--insecure")
    with running("dit_service", *flags, listen=DIT, inside=sides.right) as service:
        yield service


class Encoders:
    """The encoder services, by their addresses; tests kill them."""

    def __init__(self, start: Callable[[str], Service]) -> None:
        self._start = start
        self._alive: dict[str, Service] = {}

    def at(self, address: str) -> Service:
        """The one there, ready."""
        if address not in self._alive:
            self._alive[address] = self._start(address)
        return self._alive[address]

    def kill(self, address: str) -> None:
        """With SIGKILL; its worker, which may have been stopped, finds its front gone and ends."""
        encoder = self._alive.pop(address)
        worker = encoder.worker
        encoder.process.kill()
        worker.resume()
        worker.wait(PATIENCE_SECONDS)
        encoder.wait_for_exit()

    def kill_all(self) -> None:
        """Until there is none."""
        for address in list(self._alive):
            self.kill(address)


@pytest.fixture(scope="module")
def encoders(
    sides: Network, dit: Service, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Encoders]:
    """None at first. The DiT service loads while one starts. They keep nothing: each call is at a
    worker for a while."""
    nothing = ("--cache-bytes", "0", "--prefix-cache-bytes", "0")
    flags = ("--model", str(model_folder), "--insecure", *nothing)
    with ExitStack() as services:

        def start(address: str) -> Service:
            service = running("encoder_service", *flags, listen=address, inside=sides.left)
            started = services.enter_context(service)
            started.wait_for_line("listens on")
            out = str(tmp_path_factory.mktemp("ready") / "out.embedding")
            _run(sides.left, "encode", "x", "--encoder", address, "-o", out)
            return started

        yield Encoders(start)


@dataclass(frozen=True)
class Made:
    embedding: Path
    pixels: str


@pytest.fixture(scope="module")
def without_link(
    sides: Network, dit: Service, encoders: Encoders, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """The prompt encoded left and its picture made right; a file went across, and no packet."""
    encoders.at(FIRST)
    dit.wait_for_line("listens on")
    folder = tmp_path_factory.mktemp("without-link")
    made, picture = folder / "prompt.embedding", folder / "picture.png"
    _run(sides.left, "encode", PROMPT, "--encoder", FIRST, "-o", str(made))
    where = ("--server", DIT, "-o", str(picture))
    _run(sides.right, "generate", "--embedding", str(made), *PICTURE, *where)
    return Made(made, read_receipt(picture).pixels_sha256)


def _run(inside: Sequence[str], *arguments: str, code: int = 0) -> str:
    """What the command line says, on both its streams."""
    done = subprocess.run(
        [*inside, *CLIENT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(Path("/nowhere")),
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@contextmanager
def _generating(inside: Sequence[str], output: Path) -> Iterator[Terminal]:
    where = ("--server", DIT, "-o", str(output))
    terminal = Terminal("generate", PROMPT, *PICTURE, *where, inside=inside)
    try:
        yield terminal
    finally:
        terminal.close()


def _pixels(terminal: Terminal, output: Path) -> str:
    """The picture that a command makes in the end."""
    assert terminal.end() == 0, terminal.shown
    return read_receipt(output).pixels_sha256


def _holder_of_a_call(sides: Network, *addresses: str) -> str:
    """The encoder at which a call has arrived, as soon as there is one."""
    flags = ("--timeout", str(PATIENCE_SECONDS), "--json")
    while True:
        for address in addresses:
            told = json.loads(_run(sides.left, "info", "--encoder", address, *flags))
            if told["worker"]["call_count"]:
                return address


def test_the_link_has_its_delay(sides: Network, encoders: Encoders) -> None:
    encoders.at(FIRST)
    command = [*sides.right, sys.executable, "-c", _CONNECTS, FIRST]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert float(told) >= 2 * DELAY_SECONDS


def test_a_link_changes_no_picture(sides: Network, without_link: Made, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    # The prompt goes right, to the DiT service, back left, to the encoder, and right again.
    _run(sides.left, "generate", PROMPT, *PICTURE, "--server", DIT, "-o", str(out))
    assert read_receipt(out).pixels_sha256 == without_link.pixels


def test_requests_outlive_an_encoder_that_comes_back(
    sides: Network, encoders: Encoders, without_link: Made, tmp_path: Path
) -> None:
    encoders.at(FIRST).worker.suspend()
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    with _generating(sides.left, first) as under_way:
        _holder_of_a_call(sides, FIRST)
        encoders.kill(FIRST)
        with _generating(sides.right, second) as begun_since:
            under_way.wait_for(AWAY)
            begun_since.wait_for(AWAY)
            encoders.at(FIRST)
            assert _pixels(under_way, first) == without_link.pixels
            assert _pixels(begun_since, second) == without_link.pixels


def test_requests_outlive_a_link_that_is_cut(
    sides: Network, encoders: Encoders, without_link: Made, tmp_path: Path
) -> None:
    encoders.at(FIRST)
    out = tmp_path / "out.png"
    sides.cut()
    try:
        with _generating(sides.right, out) as under_way:
            under_way.wait_for(AWAY)
            sides.mend()
            assert _pixels(under_way, out) == without_link.pixels
    finally:
        sides.mend()


def test_calls_go_round_the_addresses_of_a_name(sides: Network, encoders: Encoders) -> None:
    both = [encoders.at(FIRST), encoders.at(OTHER)]
    before = [_encoded(encoder) for encoder in both]
    command = [*sides.right, sys.executable, "-c", _ENCODES, ENCODERS]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS)
    assert all(_encoded(encoder) > old for encoder, old in zip(both, before, strict=True))


def _encoded(encoder: Service) -> int:
    return sum("Encode OK" in line for line in encoder.log)


def test_requests_go_on_with_another_encoder(
    sides: Network, encoders: Encoders, without_link: Made, tmp_path: Path
) -> None:
    both = {address: encoders.at(address).worker for address in (FIRST, OTHER)}
    for worker in both.values():
        worker.suspend()
    out = tmp_path / "out.png"
    with _generating(sides.right, out) as under_way:
        holder = _holder_of_a_call(sides, *both)
        encoders.kill(holder)
        both.pop(holder)
        [other] = both.values()
        other.resume()
        assert _pixels(under_way, out) == without_link.pixels
    with _generating(sides.right, tmp_path / "next.png") as begun_since:
        assert _pixels(begun_since, tmp_path / "next.png") == without_link.pixels


def test_without_any_encoder_the_user_is_told_and_embeddings_are_served(
    sides: Network, encoders: Encoders, without_link: Made, tmp_path: Path
) -> None:
    encoders.kill_all()
    out = ("--server", DIT, "-o", str(tmp_path / "out.png"))
    told = _run(sides.right, "generate", PROMPT, *PICTURE, *out, "--timeout", "8", code=4)
    first, *notes = told.splitlines()
    assert first.startswith(f"error: {AWAY}: ")
    assert all(note.startswith(("the timeout passed", "tried ")) for note in notes)
    _run(sides.right, "generate", "--embedding", str(without_link.embedding), *PICTURE, *out)
    assert read_receipt(tmp_path / "out.png").pixels_sha256 == without_link.pixels
