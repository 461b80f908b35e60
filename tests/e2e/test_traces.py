"""One trace from the command line to the device and back, in a collector that is really asked."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.e2e.services import clean_environment, running
from zimage_core.tracing import Span

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []

    def Export(self, request: Any, context: object) -> Any:  # noqa: N802 - gRPC's name
        for resource in request.resource_spans:
            [service] = [
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            ]
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def _collecting() -> Iterator[tuple[Collector, str]]:
    server, collector = grpc.server(futures.ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_one_trace_shows_every_hop(model_folder: Path, tmp_path: Path) -> None:
    common = "--model", str(model_folder)
    with (
        _collecting() as (collector, at),
        running("encoder_service", *common, "--traces", at) as encoder,
    ):
        flags = *common, "--encoder", encoder.address, "--traces", at
        with running("dit_service", *flags) as dit:
            encoder.wait_until("SERVING")
            dit.wait_until("SERVING")
            command = [sys.executable, "-m", "zimage_client.cli.main", "generate", "a circle"]
            output = tmp_path / "x.png"
            to = ["--server", dit.address, "--traces", at, "--steps", "2", "-o", str(output)]
            subprocess.run([*command, *to], env=clean_environment(tmp_path), check=True)
            for service in (dit, encoder):  # what is left goes out with the process
                service.process.terminate()
                assert service.wait_for_exit() == 0
    named = {(service, span.name): span for service, span in collector.spans}
    hops = [
        ("zimage-client", "generate"),
        ("zimage-dit", "DitService/Generate"),
        ("zimage-dit", "encode"),
        ("zimage-encoder", "EncoderService/Encode"),
    ]
    spans = [named[hop] for hop in hops]
    assert len({span.trace_id for span in spans}) == 1
    assert not spans[0].parent_span_id
    for above, below in pairwise(spans):
        assert below.parent_span_id == above.span_id
    for name in ("queue", "denoise", "decode"):
        part = named["zimage-dit", name]
        assert part.parent_span_id == spans[1].span_id
        assert spans[1].start_time_unix_nano <= part.start_time_unix_nano
        assert part.start_time_unix_nano < part.end_time_unix_nano
        assert part.end_time_unix_nano <= spans[1].end_time_unix_nano
    steps = [span for service, span in collector.spans if span.name == "steps"]
    told = [{one.key: one.value.int_value for one in span.attributes} for span in steps]
    assert [n for one in told for n in range(one["first"], one["last"] + 1)] == [1, 2]
    assert all(span.parent_span_id == spans[1].span_id for span in steps)


def test_without_a_collector_a_trace_is_handed_on() -> None:
    assert Span("x", PARENT, "SERVER").traceparent == PARENT
    assert Span("x").traceparent == ""
