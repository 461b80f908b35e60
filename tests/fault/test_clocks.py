"""The clock of the wall jumps, as it does when a machine finds out what time it is. Only that of
our processes does: never the machine's."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.services import Service, running
from tests.fault.conftest import Rows
from zimage_client import Client, Options, Picture, Progress

pytestmark = pytest.mark.timeout(0)

WISH = Options(seed=3, steps=30, packing="solo")
PROMPT = "a red circle"
JUMPS = ("+2d", "-2d", "+0")
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Clock:
    """Of the processes that were started with it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump("+0")
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def jump(self, to: str) -> None:
        """By so much from the right time."""
        beside = self._file.with_suffix(".new")
        beside.write_text(f"{to}\n")
        os.replace(beside, self._file)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    if LIBRARY is None:
        pytest.skip("libfaketime is not installed")
    return Clock(tmp_path_factory.mktemp("clock") / "clock")


@pytest.fixture(scope="module")
def dit(
    model_folder: Path, clock: Clock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    model = "--model", str(model_folder)
    store = "--store", str(tmp_path_factory.mktemp("store"))
    with (
        running("encoder_service", *model, **clock.environment) as encoder,
        running(
            "dit_service", *model, *store, "--encoder", encoder.address, **clock.environment
        ) as dit,
    ):
        for service in (encoder, dit):
            service.wait_until("SERVING")
        yield dit


def test_nothing_waits_longer_or_is_lost_for_it(
    dit: Service, clock: Clock, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(os.urandom(1 << 20))
    took = []
    with Client(dit.address) as client:
        expected = client.generate(PROMPT, **WISH).pictures[0].pixels_sha256
        sha256 = client.put_blob(tmp_path / "blob")
        for number in range(rows.times):
            struck = 0.0
            for event in client.stream(PROMPT, retry=False, timeout=60, **WISH):
                if isinstance(event, Progress) and event.step >= 5 and not struck:
                    clock.jump(JUMPS[number % len(JUMPS)])
                    struck = time.monotonic()
                if isinstance(event, Picture):
                    assert event.pixels_sha256 == expected
            assert struck
            took.append(time.monotonic() - struck)
            assert client.describe(timeout=10).ready
            assert client.find_blobs([sha256]) == {sha256}
    ours = [json.loads(line) for line in dit.log if line.startswith("{")]
    assert len({line["time"][:10] for line in ours}) > 1  # they saw it
    rows.enter("the services' clocks jump by two days or four while denoising", took)
