"""What doctor says of services that differ from this version."""

import json

import pytest

from tests.fakes.services import FakeDit, serving_aside
from zimage_client.cli.main import main as command


def test_an_older_service_is_told_by_its_version_and_what_it_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = FakeDit()
    old.description.version = "0.0.9"
    old.description.features.extend(["shared_steps", "previews"])
    with serving_aside(old) as at:
        command(["doctor", "--json", "--server", at.server])
    found = {one["check"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found["version"]["verdict"] == found["features"]["verdict"] == "note"
    assert found["version"]["said"].startswith("0.0.9, here ")
    assert "blobs, " in found["features"]["said"]
    assert "shared_steps" not in found["features"]["said"]
