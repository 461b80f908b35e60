"""What the device did of late, on the wire."""

import time

from dit_service import messages
from zimage_core.errors import InvalidRequest
from zimage_rpc.dit.v1 import dit_pb2


def last_seconds(asked: dit_pb2.TraceRequest) -> float | None:
    """How far back; raises InvalidRequest for what is no time."""
    if not asked.HasField("last"):
        return None
    seconds = asked.last.ToNanoseconds() / 1e9
    if seconds < 0:
        raise InvalidRequest.given("last", f"{seconds:g} s", "0 s or more", "TIME")
    return seconds


def response(recalled: messages.Recalled) -> dit_pb2.TraceResponse:
    """In the time of day, as it is now: whatever clocks did meanwhile, lengths and order stay."""
    answer = dit_pb2.TraceResponse(
        memory_bytes=recalled.memory_bytes, peak_memory_bytes=recalled.peak_memory_bytes
    )
    until = time.time()
    answer.until.FromNanoseconds(_nanoseconds(until))
    for span in recalled.spans:
        said = answer.spans.add(work=span.work)
        said.began.FromNanoseconds(_nanoseconds(until - recalled.until + span.began))
        said.took.FromNanoseconds(_nanoseconds(span.seconds))
        for part in span.parts:
            said.parts.add(request_id=part.request_id, image_index=part.image_index, step=part.step)
    return answer


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
