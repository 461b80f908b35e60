"""Everything at once, for as long as is asked for: nothing grows.

`make soak MINUTES=10`. What stands after a third of the time is warm; from the second third to the
last, memory may grow by 2 %, and nothing else at all.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.services import PATIENCE_SECONDS, Service, running
from zimage_client import (
    Client,
    DecodedImage,
    Embedding,
    InvalidRequest,
    NotFound,
    Options,
    Progress,
)
from zimage_client._embedded.stack import demo_model

pytestmark = pytest.mark.timeout(0)

GROWTH = 1.02
NOT_GIVEN_BACK_BYTES = 4 << 20
WARM_MINUTES = 3.0
"""Memory is judged in runs as long as this; before, caches fill. `make test` judges all else."""
STARTED_LATE = 6
"""Threads that a pool starts when so many pieces of work come together for the first time."""
SIDES = (64, 96, 128)
WORDS = ("red", "green", "blue", "circle", "square", "star", "large", "small", "on", "a", "grey")

Sample = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    model = "--model", str(demo_model())  # whose tokenizer, as the real one, knows where words end
    store = "--store", str(tmp_path_factory.mktemp("store"))
    with (
        running("encoder_service", *model) as encoder,
        running("dit_service", *model, *store, "--encoder", encoder.address) as dit,
    ):
        for service in (encoder, dit):
            service.wait_until("SERVING")
            assert service.probes  # read from the log
            service.log = _Troubles()
        yield {"encoder": encoder, "DiT": dit}


class _Troubles(list[str]):
    """A log of which nothing is kept but what should not be there: this process would grow by the
    lines of thousands of calls."""

    def append(self, line: str) -> None:
        if "Traceback" in line:
            super().append(line)


class Life:
    """What people do, over and over, each with a client of their own."""

    def __init__(self, services: dict[str, Service], folder: Path) -> None:
        self._dit = services["DiT"].address
        self._encoder = services["encoder"].address
        self._chance = random.Random(0)
        self._folder = folder
        self._files = [folder / f"{number}" for number in range(8)]
        for number, file in enumerate(self._files):
            file.write_bytes(os.urandom((number + 1) << 18))
        with Client(encoder=self._encoder) as client:
            self._long: Embedding = client.encode("a red circle " * 35)

    @property
    def every(self) -> list[Callable[[], None]]:
        return [self.draws, self.gives_up, self.encodes, self.converts, self.keeps, self.errs]

    def draws(self) -> None:
        with Client(self._dit) as client:
            client.generate(self._text(), previews="vae", preview_interval=2, **self._wish())
            client.generate(self._long, **self._wish())

    def gives_up(self) -> None:
        with Client(self._dit, self._chance.choice(["", self._encoder])) as client:
            for event in client.stream(self._text(), steps=200):
                if isinstance(event, Progress) and event.step:
                    break

    def encodes(self) -> None:
        with Client(encoder=self._encoder) as client:
            assert sum(1 for _ in client.encode_stream([self._text() for _ in range(20)])) == 20

    def converts(self) -> None:
        with Client(self._dit) as client:
            picture = client.generate(self._text(), **self._wish()).pictures[0].data
            every = [latents for _, latents in client.encode_images([picture] * 3)]
            drawn = [image for _, image in client.decode_latents(every)]
            assert [type(image) for image in drawn] == 3 * [DecodedImage]

    def keeps(self) -> None:
        file = self._chance.choice(self._files)
        with Client(self._dit) as client:
            sha256 = client.put_blob(file)
            client.get_blob(sha256, file.with_suffix(".back"))

    def errs(self) -> None:
        with Client(self._dit) as client:
            with pytest.raises(InvalidRequest):
                client.generate(self._text(), width=17)
            with pytest.raises(NotFound):
                client.get_blob("0" * 64, self._folder / "nothing")
            client.describe()

    def _text(self) -> str:
        return " ".join(self._chance.choices(WORDS, k=self._chance.randrange(1, 60)))

    def _wish(self) -> Options:
        width, height = self._chance.choices(SIDES, k=2)
        count, steps = self._chance.randrange(1, 4), self._chance.randrange(1, 9)
        return Options(width=width, height=height, count=count, steps=steps)


def test_nothing_grows(
    services: dict[str, Service], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    minutes = pytestconfig.getoption("--minutes")
    life = Life(services, tmp_path)
    samples: list[Sample] = []
    for _ in range(3):
        _live(life, minutes * 60 / 3)
        samples.append(_settled(services))
    _, before, after = samples
    sys.stdout.write(f"{before}\n{after}\n")
    assert before.keys() == after.keys(), "processes"
    for process, counts in after.items():
        for what, count in counts.items():
            allowed = before[process][what]
            if what == "bytes" and minutes < WARM_MINUTES:
                continue
            if what == "bytes":
                allowed = GROWTH * allowed + NOT_GIVEN_BACK_BYTES
            if what == "threads":
                allowed += STARTED_LATE
            assert count <= allowed, f"{process}: {what}"
    assert all(_values(one)["zimage_worker_starts_total"] == 1 for one in services.values())


def _live(life: Life, seconds: float) -> None:
    over = threading.Event()

    def repeat(one: Callable[[], None]) -> int:
        count = 0
        while not over.is_set():
            one()
            count += 1
        return count

    with ThreadPoolExecutor(len(life.every)) as pool:
        jobs = [pool.submit(repeat, one) for one in life.every]
        try:
            over.wait(seconds)
        finally:
            over.set()
        done = {one.__name__: job.result() for one, job in zip(life.every, jobs, strict=True)}
    sys.stdout.write(f"{done}\n")


def _settled(services: dict[str, Service]) -> Sample:
    """What there is when all clients are gone."""
    until = time.monotonic() + PATIENCE_SECONDS
    for service in services.values():
        while _values(service)["zimage_queue_calls"]:
            assert time.monotonic() < until
            time.sleep(0.1)
    time.sleep(2)  # what was closed last is being put away
    for service in services.values():
        assert service.log == []
    found = {"here": _of(psutil.Process())}
    for name, service in services.items():
        front = psutil.Process(service.process.pid)
        found[f"{name}'s front"] = _of(front) | {"tasks": _values(service)["zimage_tasks"]}
        for number, child in enumerate(front.children(recursive=True)):
            found[f"{name}'s child {number}"] = _of(child)
    return found


def _of(process: psutil.Process) -> dict[str, float]:
    return {
        "bytes": process.memory_full_info().uss,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def _values(service: Service) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(service.metrics_page())
        for sample in family.samples
        if not sample.labels
    }
