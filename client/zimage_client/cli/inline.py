"""Pictures among the lines of a terminal, in whichever of three ways it can show them."""

import base64
import io
from collections.abc import Mapping
from enum import Enum

_MOST_COLUMNS, _MOST_ROWS = 64, 32
_KITTY_PIECE = 4096  # the longest payload of one of its escape codes


class Way(Enum):
    """How a terminal shows pictures."""

    KITTY = "kitty"
    ITERM = "iterm"
    BLOCKS = "blocks"
    """Two pixels in each character: its upper half in one colour, its lower in another."""


def way(environment: Mapping[str, str]) -> Way | None:
    """What the terminal says that it can do; None for a plain one."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not term.startswith(("screen", "tmux")):  # those pass no pictures on
        if "kitty" in term or "ghostty" in (term.removeprefix("xterm-"), program):
            return Way.KITTY
        if program in ("iTerm.app", "WezTerm"):
            return Way.ITERM
    return Way.BLOCKS if environment.get("COLORTERM") in ("truecolor", "24bit") else None


def cells(size: tuple[int, int], terminal: tuple[int, int]) -> tuple[int, int]:
    """Columns and rows for a picture of `size` (width, height), which keeps its shape in cells that
    are twice as high as wide."""
    width, height = size
    most_columns = max(1, min(_MOST_COLUMNS, terminal[0] - 1))
    most_rows = max(1, min(_MOST_ROWS, terminal[1] - 2))  # room for the live line
    columns = max(1, min(most_columns, round(2 * most_rows * width / height)))
    return columns, max(1, min(most_rows, round(columns * height / width / 2)))


def text(way: Way, png: bytes, columns: int, rows: int) -> str:
    """What shows the picture in so many cells and ends at the beginning of the line below."""
    match way:
        case Way.KITTY:
            return _kitty(png, columns, rows)
        case Way.ITERM:
            data = base64.b64encode(png).decode("ascii")
            given = f"inline=1;width={columns};height={rows};size={len(png)}"
            return f"\x1b]1337;File={given}:{data}\a\r\n"
        case Way.BLOCKS:
            return _blocks(png, columns, rows)


def _kitty(png: bytes, columns: int, rows: int) -> str:
    data = base64.b64encode(png).decode("ascii")
    pieces = [data[at : at + _KITTY_PIECE] for at in range(0, len(data), _KITTY_PIECE)]
    codes = []
    for number, piece in enumerate(pieces):
        first = f"a=T,f=100,c={columns},r={rows},q=2," if number == 0 else ""
        more = int(number < len(pieces) - 1)
        codes.append(f"\x1b_G{first}m={more};{piece}\x1b\\")
    return "".join(codes) + "\r\n"


def _blocks(png: bytes, columns: int, rows: int) -> str:
    from PIL import Image  # only whoever looks at pictures pays for the import

    image = Image.open(io.BytesIO(png)).convert("RGB").resize((columns, 2 * rows))
    pixels = image.tobytes()

    def colour(x: int, y: int) -> str:
        at = 3 * (y * columns + x)
        return ";".join(map(str, pixels[at : at + 3]))

    lines = (
        "".join(f"\x1b[38;2;{colour(x, y)};48;2;{colour(x, y + 1)}m\u2580" for x in range(columns))
        for y in range(0, 2 * rows, 2)
    )
    return "".join(f"{line}\x1b[0m\r\n" for line in lines)
