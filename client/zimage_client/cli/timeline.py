"""Pieces of work on a device as a picture of text, and in Chrome's trace format."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from zimage_client import Span

_MARKS = {"condition": "c", "denoise": "#", "decode": "d", "encode": "e"}
_OTHER, _WAITING, _IDLE = "?", ".", " "
_ID_LETTERS = 8
_MOST_LANES = 40
_DEVICE = ""
"""The lane of the device: no request is called so."""

Lane = list[tuple[float, float, str]]
"""From when to when, in seconds after the first, with a mark."""


def text(spans: Sequence[Span], width: int) -> Iterator[str]:
    """A lane for each request, in the order in which they came, below one for the device, which
    shows how many shared a step."""
    if not spans:
        yield "the device did nothing"
        return
    first = max(_began_ago(span) for span in spans)
    whole = first - min(span.ended_seconds_ago for span in spans)
    lanes: dict[str, Lane] = defaultdict(list)
    for span in spans:
        begin = first - _began_ago(span)
        mark = _MARKS.get(span.work, _OTHER)
        is_step = span.work == "denoise"
        here = begin, begin + span.took_seconds
        lanes[_DEVICE].append((*here, _digit(len(span.parts)) if is_step else mark))
        for part in span.parts:
            lanes[part.request_id].append((*here, mark))
    yield from _summary(spans, whole, len(lanes) - 1)
    columns = max(10, width - _ID_LETTERS - 3)
    shown = sorted(lanes.items(), key=lambda lane: (lane[0] != _DEVICE, lane[1][0][0]))
    for name, lane in shown[: _MOST_LANES + 1]:
        waits = _IDLE if name == _DEVICE else _WAITING
        yield f"{_title(name)[:_ID_LETTERS]:<{_ID_LETTERS}} |{_drawn(lane, whole, columns, waits)}|"
    if len(shown) > _MOST_LANES + 1:
        yield f"and {len(shown) - _MOST_LANES - 1} more; -o FILE has all of them"
    yield "c condition, # a step, d decode, e encode, . waits; device: how many shared a step"


def chrome(spans: Sequence[Span]) -> dict[str, object]:
    """What chrome://tracing and Perfetto read."""
    if not spans:
        return {"traceEvents": []}
    first = max(_began_ago(span) for span in spans)
    lanes = {_DEVICE: 0}
    events: list[dict[str, object]] = []
    for span in spans:
        at = {"ts": (first - _began_ago(span)) * 1e6, "dur": span.took_seconds * 1e6}
        together = {"requests": len(span.parts)}
        events.append({"ph": "X", "pid": 1, "tid": 0, "name": span.work, **at, "args": together})
        for part in span.parts:
            lane = lanes.setdefault(part.request_id, len(lanes))
            args = {"image": part.image_index, "step": part.step, **together}
            events.append({"ph": "X", "pid": 1, "tid": lane, "name": span.work, **at, "args": args})
    names = [
        {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": _title(name)}}
        for name, lane in lanes.items()
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *events]}


def _summary(spans: Sequence[Span], whole: float, requests: int) -> Iterator[str]:
    steps = [len(span.parts) for span in spans if span.work == "denoise"]
    shared = f", {sum(steps) / len(steps):.1f} requests in each" if steps else ""
    yield f"{whole:.2f} s, {requests} requests, {len(steps)} steps{shared}"
    busy: dict[str, float] = defaultdict(float)
    for span in spans:
        busy[span.work] += span.took_seconds
    if whole > 0:
        yield ", ".join(f"{work} {took / whole:.0%}" for work, took in sorted(busy.items()))


def _drawn(lane: Lane, whole: float, columns: int, waits: str) -> str:
    """What took the most of each column's time."""
    each = whole / columns or 1.0
    spent: list[dict[str, float]] = [defaultdict(float) for _ in range(columns)]
    for begin, end, mark in lane:
        first = min(int(begin / each), columns - 1)
        for column in range(first, columns):
            overlap = min(end, (column + 1) * each) - max(begin, column * each)
            if overlap <= 0 and column > first:
                break
            spent[column][mark] += max(overlap, 0.0)
    marked = [max(marks, key=marks.__getitem__) if marks else "" for marks in spent]
    there = [column for column, mark in enumerate(marked) if mark]
    return "".join(
        mark or (waits if there[0] < column < there[-1] else _IDLE)
        for column, mark in enumerate(marked)
    )


def _title(lane: str) -> str:
    return lane or "device"


def _digit(count: int) -> str:
    return str(count) if count < 10 else "+"


def _began_ago(span: Span) -> float:
    return span.ended_seconds_ago + span.took_seconds
