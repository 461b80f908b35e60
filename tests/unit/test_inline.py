"""Pictures in terminals: who can show them, how large, and that one takes the other's place."""

import base64
import io
import re

import pytest
from PIL import Image

from zimage_client.cli import inline
from zimage_client.cli.inline import Way
from zimage_client.cli.terminal import Terminal


class Screen(io.StringIO):
    """A terminal as far as writing goes."""

    def isatty(self) -> bool:
        return True


def _png(size: tuple[int, int]) -> bytes:
    noise = Image.effect_noise(size, 100).convert("RGB")
    noise.putpixel((0, 0), (1, 2, 3))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-kitty"}, Way.KITTY),
        ({"TERM": "xterm-ghostty"}, Way.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, Way.ITERM),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, Way.BLOCKS),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "24bit"}, Way.BLOCKS),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-256color"}, None),
        ({}, None),
    ],
)
def test_terminals_say_what_they_can(environment: dict[str, str], way: Way | None) -> None:
    assert inline.way(environment) == way


@pytest.mark.parametrize("size", [(128, 128), (1024, 16), (16, 1024), (1, 1), (160, 96)])
@pytest.mark.parametrize("terminal", [(80, 24), (200, 60), (10, 4), (1, 1)])
def test_a_picture_fits_and_keeps_its_shape(
    size: tuple[int, int], terminal: tuple[int, int]
) -> None:
    columns, rows = inline.cells(size, terminal)
    assert 1 <= columns <= max(1, terminal[0] - 1)
    assert 1 <= rows <= max(1, terminal[1] - 2)
    if min(columns, rows) > 8:
        assert columns / (2 * rows) == pytest.approx(size[0] / size[1], rel=0.15)


def test_blocks_hold_two_pixels_each() -> None:
    text = inline.text(Way.BLOCKS, _png((4, 4)), 4, 2)
    lines = text.split("\r\n")
    assert [line.count("\u2580") for line in lines] == [4, 4, 0]
    assert lines[0].startswith("\x1b[38;2;1;2;3;48;2;")


@pytest.mark.parametrize("way", [Way.KITTY, Way.ITERM])
def test_the_file_travels_whole(way: Way) -> None:
    png = _png((64, 64))
    text = inline.text(way, png, 20, 10)
    if way is Way.KITTY:
        payload = "".join(re.findall(r"\x1b_G[^;]*;([^\x1b]*)\x1b\\", text))
        assert re.findall(r"m=([01])", text)[-1] == "0"
        assert max(map(len, re.findall(r";([^\x1b]*)\x1b", text))) <= 4096
    else:
        payload = text.partition(":")[2].partition("\a")[0]
    assert base64.b64decode(payload) == png


def test_a_preview_takes_the_place_of_the_last_one() -> None:
    out, screen = io.StringIO(), Screen()
    terminal = Terminal(out, screen, Way.BLOCKS)
    terminal.picture(_png((8, 8)), (8, 8))
    terminal.live("step 1/2")
    terminal.picture(_png((8, 8)), (8, 8))
    rows = inline.cells((8, 8), (80, 24))[1]
    assert screen.getvalue().count(f"\x1b[{rows}A") == 1
    terminal.note("a line for the reader")
    terminal.picture(_png((8, 8)), (8, 8))
    assert screen.getvalue().count(f"\x1b[{rows}A") == 1
    assert not out.getvalue()


def test_files_and_pipes_get_no_pictures() -> None:
    assert not Terminal(io.StringIO(), io.StringIO(), Way.KITTY).shows_pictures
