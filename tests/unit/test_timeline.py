"""What a device did, as lanes of text."""

from zimage_client import Span, SpanPart
from zimage_client.cli import timeline

OTHER = "b" * 32
WIDTH = 10 + 8 + 3
"""Ten columns, a second each."""


def _span(work: str, began: int, seconds: int, *who: str) -> Span:
    parts = tuple(SpanPart(one, 0, 1) for one in who)
    return Span(work, 10.0 - began - seconds, float(seconds), parts)


def _lanes(*spans: Span) -> dict[str, str]:
    lines = [line for line in timeline.text(spans, WIDTH) if "|" in line]
    return {line.split("|")[0].strip(): line.split("|")[1] for line in lines}


def test_lanes_show_who_joined_whom_and_who_left() -> None:
    lanes = _lanes(
        _span("condition", 0, 1, "a"),
        _span("denoise", 1, 2, "a"),
        _span("condition", 3, 1, OTHER),
        _span("denoise", 4, 2, "a", OTHER),
        _span("decode", 6, 1, OTHER),
        _span("denoise", 8, 2, "a"),
    )
    assert lanes == {
        "device": "c11c22d 11",
        "a": "c##.##..##",
        "bbbbbbbb": "   c##d   ",
    }


def test_a_column_shows_what_took_most_of_it() -> None:
    steps = [_span("denoise", second, 1, "a") for second in range(0, 90, 9)]
    fillers = [_span("decode", second + 1, 8, "a") for second in range(0, 90, 9)]
    [*_, lane] = _lanes(*steps, *fillers).values()
    assert lane == "d" * 10


def test_what_took_no_time_is_seen() -> None:
    assert _lanes(_span("denoise", 0, 0, "a")) == {"device": "1" + 9 * " ", "a": "#" + 9 * " "}
    lanes = _lanes(_span("denoise", 0, 10, "a"), _span("condition", 5, 0, OTHER))
    assert lanes["bbbbbbbb"] == "     c    "


def test_nothing_is_said_of_nothing() -> None:
    assert list(timeline.text([], 80)) == ["the device did nothing"]
    assert timeline.chrome([]) == {"traceEvents": []}


def test_a_crowd_is_cut_and_said_to_be() -> None:
    spans = [_span("denoise", 0, 1, *(f"{number:08}" for number in range(60)))]
    lines = list(timeline.text(spans, 80))
    assert any("20 more" in line for line in lines)
    assert next(line for line in lines if line.startswith("device")).count("+") > 0
