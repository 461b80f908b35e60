from argparse import ArgumentParser
from pathlib import Path

import pytest

from zimage_core.errors import InvalidSettings
from zimage_core.settings import ClientSettings, DitSettings, add_flags, load

FILE = """
[default.dit]
model = "/models/turbo"
device = "cpu"
max_image_count = 4

[big.dit]
max_image_count = 8
watchdog = { factor = 20 }
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def test_each_place_wins_over_the_next(config: Path) -> None:
    environment = {"ZIMAGE_DIT__DEVICE": "cuda", "ZIMAGE_DIT__WATCHDOG__SILENCE_SECONDS": "5"}
    flags = {"config": config, "profile": "big", "device": "mps"}
    loaded = load(DitSettings, flags, environment)
    assert loaded.values.model == Path("/models/turbo")  # [default]
    assert loaded.values.max_image_count == 8  # the profile
    assert loaded.values.watchdog.factor == 20
    assert loaded.values.watchdog.silence_seconds == 5  # merged into the profile's table
    assert loaded.values.device == "mps"  # the flag
    assert loaded.values.max_queue_length == 64  # built in
    assert loaded.origins["device"] == "flag"
    assert loaded.origins["max_image_count"] == f"[big.dit] in {config}"
    assert "max_queue_length = 64  # built in" in str(loaded)


def test_the_usual_file_and_profile_come_from_the_environment(config: Path) -> None:
    environment = {"ZIMAGE_CONFIG": str(config), "ZIMAGE_PROFILE": "big"}
    assert load(DitSettings, {}, environment).values.max_image_count == 8


def test_the_clients_addresses_have_short_names() -> None:
    environment = {"ZIMAGE_SERVER": "gpu:50052", "ZIMAGE_ENCODER": "mac:50051"}
    values = load(ClientSettings, {}, environment).values
    assert (values.server, values.encoder) == ("gpu:50052", "mac:50051")


@pytest.mark.parametrize(
    ("flags", "environment", "text", "says"),
    [
        ({}, {}, None, "model is not set; give --model"),
        ({"device": "gpu"}, {}, FILE, "device (flag)"),
        ({}, {"ZIMAGE_DIT__DEVICES": "cpu"}, FILE, "did you mean device?"),
        ({}, {"ZIMAGE_DIT__MAX_IMAGE_COUNT": "many"}, FILE, "max_image_count (environment)"),
        ({}, {}, "[default.dit]\nmodle = '/m'\n", "did you mean model?"),
        ({}, {}, "[default.dti]\nmodel = '/m'\n", "did you mean dit?"),
        ({}, {}, "model = '/m'\n", "outside of a table"),
        ({}, {}, "[default.dit\n", "Expected"),
        ({"profile": "bigg"}, {}, FILE, "did you mean big?"),
        ({}, {}, "[default.dit]\nmodel='/m'\nwatchdog={fctor=1}\n", "did you mean factor?"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, flags: dict[str, str], environment: dict[str, str], text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / "c.toml").write_text(text)
        flags = {**flags, "config": str(tmp_path / "c.toml")}
    with pytest.raises(InvalidSettings) as refusal:
        load(DitSettings, flags, environment)
    assert says in refusal.value.message


def test_a_profile_without_a_file_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="there is no settings file"):
        load(ClientSettings, {"profile": "x"}, {})


def test_flags_that_were_not_given_change_nothing(config: Path) -> None:
    parser = ArgumentParser()
    add_flags(parser, DitSettings)
    flags = vars(parser.parse_args(["--config", str(config), "--no-insecure", "--device", "mps"]))
    loaded = load(DitSettings, flags, {})
    assert loaded.values.max_image_count == 4
    assert loaded.values.device == "mps"
    assert loaded.origins["insecure"] == "flag"
