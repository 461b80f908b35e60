"""What the device did of late, on the wire."""

from dit_service import messages
from zimage_rpc.dit.v1 import dit_pb2


def response(recalled: messages.Recalled, asked: dit_pb2.TraceRequest) -> dit_pb2.TraceResponse:
    """As far back as is asked for."""
    answer = dit_pb2.TraceResponse()
    answer.until.FromNanoseconds(_nanoseconds(recalled.until))
    since = 0.0
    if asked.HasField("last"):
        since = recalled.until - asked.last.ToNanoseconds() / 1e9
    for span in recalled.spans:
        if span.began + span.seconds < since:
            continue
        said = answer.spans.add(work=span.work)
        said.began.FromNanoseconds(_nanoseconds(span.began))
        said.took.FromNanoseconds(_nanoseconds(span.seconds))
        for part in span.parts:
            said.parts.add(request_id=part.request_id, image_index=part.image_index, step=part.step)
    return answer


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
