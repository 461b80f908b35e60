"""`zimage-client profile` against real services, and against those that it starts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.services import Service, running
from zimage_client._embedded.stack import demo_model
from zimage_client.cli.main import main as command

LINE = re.compile(r"\[PASS\] \d+\.\dms \| Memory: \d+ -> \d+ MB \(peak: \d+ MB\)")


@pytest.fixture(scope="module")
def encoder() -> Iterator[Service]:
    with running("encoder_service", "--model", str(demo_model())) as service:
        service.wait_until("SERVING")
        yield service


@pytest.fixture(scope="module")
def dit(encoder: Service) -> Iterator[Service]:
    flags = "--model", str(demo_model()), "--encoder", encoder.address
    with running("dit_service", *flags) as service:
        service.wait_until("SERVING")
        yield service


def test_running_services(
    encoder: Service, dit: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--isolated", "--server", dit.address, "--encoder", encoder.address]
    file = tmp_path / "profile.json"
    flags = ["--repeat", "2", "--steps", "3", "-o", str(file)]
    assert command(["profile", *at, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [bool(LINE.search(line)) for line in lines] == [True] * 6
    [row] = json.loads(file.read_text())
    assert row["summary"] | {"total_time_ms": 0, "peak_memory_mb": 0} == {
        "total_tests": 6,
        "passed": 6,
        "failed": 0,
        "total_time_ms": 0,
        "peak_memory_mb": 0,
    }
    by_name = {test["name"]: test for test in row["tests"]}
    assert by_name["encode_medium"]["extra"]["tokens"] > by_name["encode_short"]["extra"]["tokens"]
    picture = by_name["full_generation"]
    assert picture["extra"]["forwards"] == 3
    parts = sum(picture["extra"][part] for part in ("encode_ms", "denoise_ms", "decode_ms"))
    assert 0 < parts < picture["duration_ms"]
    assert picture["memory_peak_mb"] >= picture["memory_after_mb"] > 50
    assert row["system_info"]["service"]["attention_backend"] == "sdpa"


def test_what_the_services_are(
    dit: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--isolated", "--server", dit.address]
    assert command(["profile", *at, "--show-info"]) == 0
    told = capsys.readouterr().out
    assert "sdpa: available" in told
    assert "xformers: " in told
    assert "torch" in told


def test_without_an_encoder_of_its_own_pictures_are_profiled_alone(
    dit: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--isolated", "--server", dit.address]
    flags = ["--repeat", "1", "--steps", "2"]
    assert command(["profile", *at, *flags]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("full_generation")
    assert command(["profile", *at, *flags, "--tests", "encode_short"]) == 1
    assert "[FAIL]" in capsys.readouterr().out


@pytest.mark.timeout(180)
def test_ways_to_compute_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.json"
    sweep = "weights=int8,attention_backend=none_such"
    flags = ["--repeat", "1", "--steps", "4", "--sweep", sweep, "-o", str(file)]
    assert command(["profile", "--isolated", *flags]) == 0
    told = capsys.readouterr().out
    assert re.search(r"none_such +not available: attention_backend none_such: there is no", told)
    baseline, int8 = json.loads(file.read_text())
    assert baseline["system_info"]["service"]["weights"] == "full"
    assert int8["system_info"]["service"]["weights"] == "int8"
    [test] = int8["tests"]
    assert test["extra"]["psnr_db"] > 30
    assert 0.9 < test["extra"]["ssim"] <= 1
