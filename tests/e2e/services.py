"""Our services as the processes they are, for tests that talk to them over real sockets."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from zimage_core.errors import ZImageError
from zimage_core.wire import status
from zimage_core.wire.limits import CHANNEL_OPTIONS

PATIENCE_SECONDS = 40.0
"""Longest wait for anything, on a busy machine."""

T = TypeVar("T")


class Service:
    """A running service: its process, its log, a channel to it."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        self.address = address
        self.process = process
        self.channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.log: list[str] = []
        self._grown = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until(self, state: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Waits for gRPC's health service to say SERVING or NOT_SERVING."""
        health = health_pb2_grpc.HealthStub(self.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=seconds)
        wanted = health_pb2.HealthCheckResponse.ServingStatus.Value(state)
        try:
            assert any(answer.status == wanted for answer in watch), f"never {state}"
        finally:
            watch.cancel()

    def wait_for_line(self, *texts: str) -> str:
        """The first line of the log that holds all of these texts."""

        def found() -> str | None:
            return next((line for line in self.log if all(text in line for text in texts)), None)

        with self._grown:
            line = self._grown.wait_for(found, PATIENCE_SECONDS)
        assert line is not None, f"no {texts} in the log:\n" + "".join(self.log)
        return line

    @property
    def worker(self) -> psutil.Process:
        """The worker process of the moment."""
        children = psutil.Process(self.process.pid).children()
        [worker] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return worker

    @cached_property
    def probes(self) -> str:
        """The address that it answers at over HTTP."""
        found = re.search(r"probes on (\S+?:\d+)", self.wait_for_line("probes on"))
        assert found
        return found[1]

    def metrics_page(self) -> str:
        """What Prometheus reads of it."""
        with self._get("metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            page: str = answer.read().decode()
        return page

    def probe(self, name: str) -> int:
        """The status of what is asked over HTTP."""
        try:
            with self._get(name) as answer:
                status: int = answer.status
                return status
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def _get(self, page: str) -> Any:
        return urllib.request.urlopen(f"http://{self.probes}/{page}", timeout=10)

    def wait_for_exit(self) -> int:
        """The exit code, once there is one."""
        code = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        return code

    def close(self) -> None:
        """Lets go of what the process has left."""
        self.channel.close()
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._grown:
                self.log.append(line)
                self._grown.notify_all()


@contextmanager
def running(
    module: str, *flags: str, listen: str = "", inside: Sequence[str] = (), **environment: str
) -> Iterator[Service]:
    """Starts `python -m module`, on a socket of its own, and ends it with the block in any case;
    `inside` is a command that runs it."""
    folder = Path(tempfile.mkdtemp(prefix="zimage-"))  # pytest's folders are too long for a socket
    address = listen or f"unix:{folder}/socket"
    command = [sys.executable, "-m", module, "--listen", address, "--probes", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*inside, *command, *flags],
        env={**clean_environment(folder), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    service = Service(address, process)
    try:
        yield service
    except BaseException:
        sys.stderr.write("".join(service.log))  # pytest shows it with the failure
        raise
    finally:
        with suppress(ProcessLookupError):  # with its worker, which the test may have stopped
            os.killpg(process.pid, signal.SIGKILL)
        service.wait_for_exit()
        service.close()
        shutil.rmtree(folder, ignore_errors=True)


def free_address() -> str:
    """A port of this machine that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def answer(call: Callable[..., T], request: Any, **options: Any) -> T:
    """What a call returns; raises the error that a user of the SDK would see."""
    try:
        return call(request, timeout=PATIENCE_SECONDS, **options)
    except grpc.RpcError as error:
        raise typed(error) from None


def typed(error: Any) -> ZImageError:
    """The error of ours that a status carries."""
    return status.from_status(error.code(), error.details(), error.trailing_metadata() or ())


def clean_environment(folder: Path) -> dict[str, str]:
    """No settings, caches and, which gRPC heeds, proxies of whoever runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ZIMAGE_", "GRPC_")) and not name.endswith("_proxy")
    }
    homes = {f"XDG_{name.upper()}_HOME": str(folder / name) for name in ("cache", "config", "data")}
    return kept | homes
