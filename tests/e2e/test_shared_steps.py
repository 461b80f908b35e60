"""Requests that share their steps: each gets its own pictures, and nobody waits for a long one."""

import io
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests import adapter_files
from tests.e2e.services import PATIENCE_SECONDS, Service, running
from zimage_client import (
    Client,
    Completed,
    DeadlineTooShort,
    InvalidRequest,
    Options,
    Picture,
    Progress,
)
from zimage_client.cli.main import main as command

CLIENTS = 8
LITTLE_ROOM = "15000000"
REQUESTS = 30
WORDS = [
    "a",
    "red",
    "circle",
    "on",
    "a",
    "blue",
    "background",
    "under",
    "three",
    "green",
    "squares",
    "and",
    "one",
    "small",
    "star",
]


@pytest.fixture(scope="module")
def encoder(base_folder: Path) -> Iterator[Service]:
    with running("encoder_service", "--model", str(base_folder)) as service:
        service.wait_until("SERVING")
        yield service


def _dit(encoder: Service, folder: Path, *flags: str) -> Iterator[Service]:
    usual = "--model", str(folder), "--encoder", encoder.address
    usual = *usual, "--max-queue-length", str(REQUESTS)
    with running("dit_service", *usual, *flags) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(encoder: Service, base_folder: Path) -> Iterator[Service]:
    yield from _dit(encoder, base_folder)


@pytest.fixture(scope="module")
def streamed(encoder: Service, base_folder: Path) -> Iterator[Service]:
    """Most blocks take turns on the device."""
    yield from _dit(encoder, base_folder, "--max-weight-bytes", LITTLE_ROOM)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One for blocks alone, one for what is made once for a prompt or a schedule, too."""
    folder, changes = tmp_path_factory.mktemp("loras"), adapter_files.random_lora
    few = changes({f"layers.{block}.attention.to_v": (192, 192) for block in range(4)}, size=0.1)
    many = {
        "layers.2.feed_forward.w2": (192, 512),
        "noise_refiner.0.attention.to_q": (192, 192),
        "context_refiner.0.feed_forward.w1": (512, 192),
        "cap_embedder.1": (192, 128),
        "layers.0.adaLN_modulation.0": (768, 192),
    }
    return [
        adapter_files.write(folder / "few.safetensors", few, "bare"),
        adapter_files.write(folder / "many.safetensors", changes(many, rank=8, size=0.1), "peft"),
    ]


def _wish(chance: random.Random, loras: list[Path]) -> tuple[str, Options]:
    """Any request: some guided, some not, of any size and length, with adapters or without."""
    few, many = loras
    options = Options(
        width=16 * chance.randint(2, 12),
        height=16 * chance.randint(2, 12),
        steps=chance.randint(1, 12),
        guidance=chance.choice([0.0, 1.0, 4.0]),
        seed=chance.randrange(2**32),
        count=chance.choice([1, 1, 1, 2]),
        adapters=chance.choice([{}, {}, {few: 1.0}, {many: 0.7}, {many: -0.4, few: 0.8}]),
    )
    return " ".join(chance.choices(WORDS, k=chance.randint(0, 60))), options


def _pixels(picture: Picture) -> Any:
    return np.asarray(Image.open(io.BytesIO(picture.data))).astype(int)


def _drawn(
    client: Client, prompt: str, options: Options, leave_after: float | None
) -> tuple[list[Picture], Completed | None]:
    """The pictures and the last event, or what had come when the request was left."""
    began, pictures, completed = time.monotonic(), [], None
    for event in client.stream(prompt, **options):
        if leave_after is not None and time.monotonic() - began > leave_after:
            break
        match event:
            case Picture():
                pictures.append(event)
            case Completed():
                assert completed is None, "one final event each"
                completed = event
    return pictures, completed


def _leftovers(process: psutil.Process) -> tuple[int, int]:
    return process.num_threads(), process.num_fds()


def _is_all_given_back(
    before: tuple[tuple[int, int], ...], after: tuple[tuple[int, int], ...]
) -> bool:
    pairs = zip(before, after, strict=True)
    return all(
        threads_after <= threads + 8 and files_after <= files + 2  # pools grow to their size once
        for (threads, files), (threads_after, files_after) in pairs
    )


@pytest.mark.timeout(300)  # 100 runs of the model, on a machine that may be busy
@pytest.mark.parametrize("name", ["dit", "streamed"])
def test_any_requests_of_eight_clients_are_drawn_as_if_each_were_alone(
    name: str, loras: list[Path], request: pytest.FixtureRequest
) -> None:
    dit: Service = request.getfixturevalue(name)
    chance = random.Random(20)
    wishes = [_wish(chance, loras) for _ in range(REQUESTS)]
    leave = [chance.uniform(0.0, 0.5) if chance.random() < 0.3 else None for _ in wishes]
    front, worker = psutil.Process(dit.process.pid), dit.worker
    with Client(dit.address) as one:
        one.generate("warm up", steps=1, seed=1)
        before = _leftovers(front), _leftovers(worker)
        clients = [Client(dit.address) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            jobs = [
                pool.submit(_drawn, clients[i % CLIENTS], *wish, leave[i])
                for i, wish in enumerate(wishes)
            ]
            drawn = [job.result() for job in jobs]
        for client in clients:
            client.close()

        shared = []
        for (prompt, options), (pictures, completed), left in zip(
            wishes, drawn, leave, strict=True
        ):
            if completed is None:
                assert left is not None, "only who leaves gets no final event"
                continue
            shared.append(completed.usage.mean_occupancy)
            assert completed.numeric_plan.packing == "shared"
            alone = one.generate(prompt, **options, packing="solo")
            assert alone.completed.numeric_plan.packing == "solo"
            assert alone.completed.usage.mean_occupancy == 1
            assert [picture.seed for picture in pictures] == [p.seed for p in alone.pictures]
            for ours, theirs in zip(pictures, alone.pictures, strict=True):
                assert np.abs(_pixels(ours) - _pixels(theirs)).max() <= 1
        assert len(shared) >= REQUESTS / 2
        assert sum(shared) / len(shared) >= 2
        assert (dit.process.poll(), dit.worker.pid) == (None, worker.pid)
        events = one.stream("nobody is left in the house", steps=1, seed=1)
        assert next(events).queue_position == 0  # type: ignore[union-attr]
        events.close()
        until = time.monotonic() + PATIENCE_SECONDS
        while not _is_all_given_back(before, (_leftovers(front), _leftovers(worker))):
            assert time.monotonic() < until, (before, _leftovers(front), _leftovers(worker))
            time.sleep(0.1)  # connections end after their clients


def test_a_short_request_after_a_long_one_ends_first(dit: Service) -> None:
    ended: list[str] = []
    under_way = threading.Event()

    def draw(name: str, steps: int) -> None:
        with Client(dit.address) as client:
            for event in client.stream(name, seed=1, steps=steps, guidance=0.0):
                if isinstance(event, Progress) and event.step > 0:
                    under_way.set()
        ended.append(name)

    long = threading.Thread(target=draw, args=["long", 150])
    long.start()
    assert under_way.wait(30)
    draw("short", 4)
    long.join()
    assert ended == ["short", "long"]
    with Client(dit.address) as client:
        trace = client.trace()
    members = [
        {part.request_id for part in span.parts} for span in trace.spans if span.work == "denoise"
    ]
    assert trace.peak_memory_bytes >= trace.memory_bytes > 0
    changes = [(len(after - before), len(before - after)) for before, after in pairwise(members)]
    assert (1, 0) in changes, "one joined those who were there, between two steps"
    assert (0, 1) in changes, "one left those who went on"


def test_the_trace_can_be_looked_at(
    dit: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(dit.address) as client:
        client.generate("a red circle", seed=1, steps=3, count=2, guidance=0.0)
        with pytest.raises(InvalidRequest, match=r"last_seconds: nan given"):
            client.trace(float("nan"))
    file = tmp_path / "trace.json"
    assert command(["trace", "--server", dit.address, "--last", "600", "-o", str(file)]) == 0
    head, shares, device, *lanes, _legend = capsys.readouterr().out.splitlines()
    assert re.search(r"\d+ requests, \d+ steps, \d\.\d requests in each", head)
    assert "denoise" in shares
    assert device.startswith("device")
    assert any(lane.count("#") and lane.count("d") for lane in lanes)
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    of_last = [event for event in events if event["tid"] == max(names.values())]
    steps = [event["args"] for event in of_last if event["name"] == "denoise"]
    assert [(at["image"], at["step"]) for at in steps] == [
        (i, n) for i in (0, 1) for n in (1, 2, 3)
    ]
    began = [event["ts"] for event in of_last if event["ph"] == "X"]
    assert began == sorted(began)


def test_who_wants_to_be_alone_is(dit: Service) -> None:
    with Client(dit.address) as client, ThreadPoolExecutor(3) as pool:
        solo = Options(seed=5, steps=20, guidance=1.0, packing="solo")
        alone = client.generate("x", **solo).pictures[0].pixels_sha256
        jobs = [pool.submit(client.generate, "y", seed=i, steps=100) for i in range(2)]
        beside = client.generate("x", **solo)
        assert beside.completed.usage.mean_occupancy == 1
        assert beside.pictures[0].pixels_sha256 == alone
        assert max(job.result().completed.usage.mean_occupancy for job in jobs) > 1


def test_what_is_urgent_steps_alone_and_what_is_not_goes_on(dit: Service) -> None:
    under_way, ended = threading.Event(), []

    def draw_in_the_background() -> None:
        with Client(dit.address) as client:
            for event in client.stream("idle", seed=1, steps=200, priority="background"):
                if isinstance(event, Progress) and event.step > 0:
                    under_way.set()
        ended.append("background")

    background = threading.Thread(target=draw_in_the_background)
    background.start()
    assert under_way.wait(30)
    with Client(dit.address) as client:
        urgent = client.generate("urgent", seed=1, steps=12, priority="interactive")
        beside = client.generate("like most", seed=1, steps=12)
    assert not ended
    background.join()
    assert ended == ["background"]
    assert urgent.accepted.priority == "interactive"
    assert urgent.completed.usage.mean_occupancy < 1.2  # one step in sixteen is shared
    assert 1.1 < beside.completed.usage.mean_occupancy < 1.5  # one in four: 2 to 4 of 12


def test_what_was_made_tells_what_will_take_how_long(dit: Service) -> None:
    wish = Options(seed=1, steps=10, guidance=0.0)
    with Client(dit.address) as client:
        client.generate("so that it is known", **wish)
        *_, queued = (e for e in client.stream("x", **wish) if isinstance(e, Progress))
        took = client.generate("x", **wish)
        assert took.accepted.expected_seconds is not None
        assert queued.expected_seconds is not None
        assert queued.expected_seconds < took.accepted.expected_seconds
        with pytest.raises(DeadlineTooShort) as refusal:
            client.generate("x", steps=1000, count=8, timeout=5.0, guidance=0.0)
        assert refusal.value.reason == "DEADLINE_UNREACHABLE"
