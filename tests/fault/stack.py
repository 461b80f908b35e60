"""Services that come back when they die, as a cluster would see to it."""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.e2e.services import PATIENCE_SECONDS, Service, running

_HUNG_AFTER_SECONDS = 3


class Supervised:
    """A service at one address, started again whenever it ends."""

    def __init__(self, module: str, address: str, *flags: str, **environment: str) -> None:
        self.address = address
        self._run: Callable[[], AbstractContextManager[Service]] = lambda: running(
            module, *flags, listen=address, **environment
        )
        self._service: Service | None = None
        self._changed = threading.Condition()
        self._is_over = False
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()

    @property
    def service(self) -> Service:
        """The process of the moment."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._service, PATIENCE_SECONDS)
            assert self._service
            return self._service

    def wait_until_serving(self) -> None:
        """Also after it was started again."""
        self.service.wait_until("SERVING")

    def hit(self, number: signal.Signals) -> None:
        """A signal for the front."""
        self.service.process.send_signal(number)

    def hit_worker(self, number: signal.Signals) -> None:
        """A signal for the worker."""
        psutil.Process(self.service.worker.pid).send_signal(number)

    def wait_for_successor(self, of: Service) -> None:
        """Waits until another process serves than the one of before."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._service not in (None, of), PATIENCE_SECONDS)
        self.wait_until_serving()

    def close(self) -> None:
        """Ends it for good."""
        self._is_over = True
        with self._changed:
            if self._service:
                self._service.process.kill()
        self._keeper.join()

    def _keep(self) -> None:
        while not self._is_over:
            with self._run() as service:
                with self._changed:
                    self._service = service
                    self._changed.notify_all()
                if self._is_over:
                    service.process.kill()
                service.process.wait()
                with self._changed:
                    self._service = None


@contextmanager
def supervised(
    model: Path, dits: int = 1, encoders: int = 1, hung_after_seconds: int = _HUNG_AFTER_SECONDS
) -> Iterator[tuple[list[Supervised], list[Supervised]]]:
    """DiT services and the encoders that they ask, in this order, when all of them serve."""
    folder = Path(tempfile.mkdtemp(prefix="zimage-"))
    watchdog = {
        f"ZIMAGE_{program}__WATCHDOG__{name}_SECONDS": str(hung_after_seconds)
        for program in ("DIT", "ENCODER")
        for name in ("LEAST", "SILENCE")
    }
    with ExitStack() as closing:
        closing.callback(shutil.rmtree, folder, ignore_errors=True)

        def start(module: str, name: str, *flags: str) -> Supervised:
            at = f"unix:{folder}/{name}"
            one = Supervised(module, at, "--model", str(model), *flags, **watchdog)
            closing.callback(one.close)
            return one

        asked = [start("encoder_service", f"e{number}") for number in range(encoders)]
        at = ",".join(one.address for one in asked)
        drawing = [start("dit_service", f"d{number}", "--encoder", at) for number in range(dits)]
        for one in (*asked, *drawing):
            one.wait_until_serving()
        yield drawing, asked
