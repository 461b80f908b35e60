"""Settings for cards: they fit, they load, and the shipped ones are those that are advised."""

import math
from pathlib import Path

import pytest

from zimage_client.cli.main import main as command
from zimage_core import settings
from zimage_core.formats.published import DIT_SHAPE
from zimage_core.planning.advice import CARDS, advise
from zimage_core.planning.memory import weight_bytes
from zimage_core.settings import DitSettings, EncoderSettings

SHIPPED = Path(__file__).parents[2] / "deploy" / "cards.toml"
WEIGHTS = weight_bytes(DIT_SHAPE, 2)
GIB = 2**30


@pytest.mark.parametrize("side_px", [512, 1024, 2048])
def test_a_larger_card_is_never_told_to_do_with_less(side_px: int) -> None:
    rooms = []
    for tenths in range(40, 400):
        advice = advise(tenths / 10 * GIB, side_px)
        if not advice.settings:
            assert "is the least" in advice.reasons[0]
            rooms.append(0)
            continue
        room = advice.settings.get("dit", {}).get("max_weight_bytes", math.inf)
        assert isinstance(room, int | float)
        assert WEIGHTS.least <= room
        assert min(room, WEIGHTS.all) < tenths / 10 * GIB - 2 * GIB
        rooms.append(room)
    assert rooms == sorted(rooms)
    assert rooms[0] == 0
    assert rooms[-1] == math.inf


def test_the_least_card_that_is_named_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    [why] = advise(3 * GIB, 1024).reasons
    least = float(why.split()[3])
    assert not advise((least - 0.1) * GIB, 1024).settings
    assert advise((least + 0.1) * GIB, 1024).settings


def test_shipped_profiles_are_those_advised_and_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["advise", "--cards", "--isolated"]) == 0
    assert capsys.readouterr().out == SHIPPED.read_text()
    for profile, gib in CARDS.items():
        flags = {"config": SHIPPED, "profile": profile, "model": "x"}
        advised = advise(gib * GIB, 1024).settings
        of_dit = settings.load(DitSettings, flags, {}).values
        assert of_dit.max_weight_bytes == advised.get("dit", {}).get("max_weight_bytes")
        of_encoder = settings.load(EncoderSettings, flags, {}).values
        assert of_encoder.device == advised["encoder"]["device"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "give the card's memory in GiB"),
        (["--vram", "-1"], "give the card's memory in GiB"),
        (["--vram", "nan"], "give the card's memory in GiB"),
        (["--vram", "12", "--side", "100"], "--side 100: a multiple of 16 up to 4096"),
    ],
)
def test_what_is_no_card_is_refused(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["advise", "--isolated", *flags]) == 2
    assert complaint in capsys.readouterr().err
