"""Through real proxies, with the files of deploy/proxies: previews, large bodies, silence, cancel,
drain, death."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from tests.e2e.services import PATIENCE_SECONDS, free_address
from tests.fault.conftest import Rows
from tests.fault.stack import Supervised
from zimage_client import Client, Options, Picture, Preview, Progress, Waiting

pytestmark = pytest.mark.timeout(0)

CONFIGS = Path(__file__).parents[2] / "deploy" / "proxies"
COMMANDS = {
    "nginx": ("nginx.conf", ["nginx", "-g", "daemon off; pid {folder}/pid;", "-c"]),
    "haproxy": ("haproxy.cfg", ["haproxy", "-f"]),
    "envoy": (
        "envoy.yaml",
        [str(Path(sys.executable).with_name("envoy")), "--concurrency", "1", "-l", "error", "-c"],
    ),
}
PROMPT = "a red circle"
WISH = Options(seed=3, steps=30, packing="solo")
SILENT_SECONDS, SHORT_SILENCE_SECONDS = 61.0, 16.0
"""More than nginx and haproxy's usual limit; more than Envoy's, which every push sees."""
ENVOY_LOOKS_SECONDS = 3.0


class Proxy(NamedTuple):
    """One that stands before both services."""

    name: str
    address: str


@pytest.fixture(scope="module")
def dits(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Supervised]]:
    """Two, with one store and one encoder."""
    store = str(tmp_path_factory.mktemp("store"))
    common = "--model", str(model_folder)
    with ExitStack() as closing:
        encoder = Supervised("encoder_service", free_address(), *common)
        closing.callback(encoder.close)
        flags = *common, "--encoder", encoder.address, "--store", store
        patient = {"ZIMAGE_DIT__WATCHDOG__LEAST_SECONDS": "300"}
        both = [
            Supervised("dit_service", free_address(), *flags, "--probes", free_address(), **patient)
            for _ in range(2)
        ]
        for one in both:
            closing.callback(one.close)
        for one in (encoder, *both):
            one.wait_until_serving()
        yield both


@pytest.fixture(scope="module")
def proxies(
    dits: list[Supervised], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The addresses of those that stand before both services, by their names."""
    found = {}
    with ExitStack() as closing:
        for name, (file, command) in COMMANDS.items():
            if shutil.which(command[0]) is None:
                continue
            folder, address = tmp_path_factory.mktemp(name), free_address()
            (folder / file).write_text(_configured(CONFIGS / file, address, dits))
            filled = [part.format(folder=folder) for part in (*command, str(folder / file))]
            process = closing.enter_context(subprocess.Popen(filled, start_new_session=True))
            closing.callback(process.terminate)
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(PATIENCE_SECONDS)
            found[name] = address
        time.sleep(ENVOY_LOOKS_SECONDS)
        yield found


def _configured(file: Path, address: str, dits: list[Supervised]) -> str:
    """The file as it is, but for the addresses."""
    config = file.read_text().replace("127.0.0.1:8443", address)
    config = config.replace("port_value: 8443", f"port_value: {address.partition(':')[2]}")
    for number, dit in enumerate(dits):
        host, _, port = dit.address.partition(":")
        config = config.replace(f"dit-{number}:50052", dit.address)
        probes = dit.service.probes.partition(":")[2]
        config = config.replace("check port 9465", f"check port {probes}", 1)
        there = f"address: dit-{number}, port_value: 50052"
        config = config.replace(there, f"address: {host}, port_value: {port}")
    assert not re.search(r"dit-\d[:,]|8443|50052|9465", re.sub("#.*", "", config))
    return config


@pytest.fixture(params=COMMANDS)
def proxy(request: pytest.FixtureRequest, proxies: dict[str, str]) -> Proxy:
    if request.param not in proxies:
        pytest.skip(f"{request.param} is not installed")
    return Proxy(request.param, proxies[request.param])


@pytest.fixture(scope="module")
def expected(dits: list[Supervised]) -> str:
    """The picture's digest without a proxy."""
    with Client(dits[0].address) as direct:
        return direct.generate(PROMPT, **WISH).pictures[0].pixels_sha256


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "strike" in metafunc.fixturenames:
        is_short = metafunc.config.getoption("--times") == 1
        every = [signal.SIGKILL] if is_short else [signal.SIGKILL, signal.SIGTERM]
        metafunc.parametrize("strike", every)


def test_previews_and_large_bodies_go_through(proxy: Proxy, expected: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(range(256)) * (12 << 12))
    with Client(proxy.address) as client:
        events = list(client.stream(PROMPT, previews="vae", preview_interval=10, **WISH))
        assert sum(isinstance(event, Preview) for event in events) == 2
        assert [e.pixels_sha256 for e in events if isinstance(e, Picture)] == [expected]
        sha256 = client.put_blob(tmp_path / "large")
        client.get_blob(sha256, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()


def test_a_cancelled_request_ends_behind_it(
    proxy: Proxy, dits: list[Supervised], rows: Rows
) -> None:
    took = []
    for _ in range(rows.times):
        with Client(proxy.address) as client:
            for event in client.stream("x", steps=1000, seed=1):
                if isinstance(event, Progress) and event.step:
                    break
        began = time.monotonic()
        while any(_call_count(dit) for dit in dits):
            assert time.monotonic() < began + PATIENCE_SECONDS
            time.sleep(0.05)
        took.append(time.monotonic() - began)
    rows.enter(f"a request cancelled behind {proxy.name}: its place is free", took)


def test_a_minute_of_silence_is_no_end(
    proxies: dict[str, str], dits: list[Supervised], expected: str, rows: Rows
) -> None:
    """The workers stand still, as those do that compile; their watchdogs are patient."""
    silence = SILENT_SECONDS if rows.times > 1 else SHORT_SILENCE_SECONDS

    def draw(address: str) -> tuple[str, float]:
        with Client(address) as client:
            picture = client.generate(PROMPT, retry=False, **WISH).pictures[0]
            return picture.pixels_sha256, time.monotonic()

    workers: list[Any] = [dit.service.worker for dit in dits]
    for worker in workers:
        worker.suspend()
    try:
        with ThreadPoolExecutor(rows.times * len(proxies)) as pool:
            jobs = {
                name: [pool.submit(draw, address) for _ in range(rows.times)]
                for name, address in proxies.items()
            }
            time.sleep(silence)
            for worker in workers:
                worker.resume()
            began = time.monotonic()
            for name, behind in jobs.items():
                done = [job.result() for job in behind]
                assert {sha256 for sha256, _ in done} == {expected}
                took = [at - began for _, at in done]
                rows.enter(f"{silence:.0f} s of silence behind {name}; not made anew", took)
    finally:
        for worker in workers:
            worker.resume()


def test_a_backend_that_goes_is_left_for_the_other(
    proxy: Proxy,
    strike: signal.Signals,
    dits: list[Supervised],
    expected: str,
    rows: Rows,
) -> None:
    """Killed, its request is made anew; drained, it ends in peace. Whoever comes next is served."""
    took = []
    for _ in range(rows.times):
        hit, waits, struck = None, list[Waiting](), 0.0
        with Client(proxy.address) as client:
            for event in client.stream(PROMPT, **WISH):
                if isinstance(event, Progress) and event.step > 5 and hit is None:
                    hit = next(dit for dit in dits if _call_count(dit))
                    front = hit.service
                    hit.hit(strike)
                    struck = time.monotonic()
                if isinstance(event, Waiting):
                    waits.append(event)
                if isinstance(event, Picture):
                    assert event.pixels_sha256 == expected
            assert client.generate(PROMPT, **WISH).pictures[0].pixels_sha256 == expected
        took.append(time.monotonic() - struck)
        assert hit is not None
        assert bool(waits) == (strike == signal.SIGKILL), waits
        hit.wait_for_successor(front)
        time.sleep(ENVOY_LOOKS_SECONDS)
    rows.enter(f"{strike.name} for the DiT behind {proxy.name} while denoising; then another", took)


def _call_count(dit: Supervised) -> int:
    with Client(dit.address) as client:
        return client.describe().worker.call_count
