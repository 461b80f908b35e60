"""Traces across all hops: W3C's traceparent in the metadata of every call, and spans where
OpenTelemetry is installed and somebody collects them. Without, what a caller sends is handed on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from zimage_core.errors import InvalidSettings

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # the extra is not installed
    trace = None  # type: ignore[assignment]

KEY = "traceparent"
"""The metadata key that carries it."""

_NANOSECONDS = 1e9


class Span:
    """A stretch of work."""

    def __init__(self, name: str, parent: str = "", kind: str = "INTERNAL") -> None:
        """`parent` is a traceparent; without one the span belongs to whatever the program traces
        at the moment. `kind` is a name of OpenTelemetry's: CLIENT, SERVER or INTERNAL."""
        self.traceparent = parent
        """For what is done on its behalf elsewhere; empty where nothing is traced."""
        self._span: Any = None
        if trace is None:
            return
        propagator = TraceContextTextMapPropagator()
        above = propagator.extract({KEY: parent}) if parent else None
        tracer = trace.get_tracer("zimage")
        self._span = tracer.start_span(name, above, trace.SpanKind[kind])
        self._context = trace.set_span_in_context(self._span)
        carrier: dict[str, str] = {}
        propagator.inject(carrier, self._context)
        self.traceparent = carrier.get(KEY, parent)

    def part(self, name: str, began: float, **attributes: float | str) -> None:
        """A stretch within it that began at a time of `time.monotonic` and ends now."""
        if self._span is None or not self._span.is_recording():
            return
        now = time.time_ns()
        start = now - round((time.monotonic() - began) * _NANOSECONDS)
        tracer = trace.get_tracer("zimage")
        part = tracer.start_span(name, self._context, start_time=start, attributes=attributes)
        part.end(now)

    def end(self, error: BaseException | None = None) -> None:
        """It is over."""
        if self._span is None:
            return
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        self._span.end()


current: ContextVar[Span | None] = ContextVar("span", default=None)
"""The call that a service answers."""


@contextmanager
def within(name: str, kind: str = "CLIENT") -> Iterator[Span]:
    """A span for a block, beneath the call that a service answers, if there is one."""
    span = beneath(name, kind)
    try:
        yield span
    except BaseException as error:
        span.end(error)
        raise
    span.end()


def beneath(name: str, kind: str = "CLIENT") -> Span:
    """A span beneath the call that a service answers, if there is one; whoever asks ends it."""
    above = current.get()
    return Span(name, above.traceparent if above else "", kind)


@contextmanager
def collected(service: str, endpoint: str) -> Iterator[None]:
    """Sends the spans of this process to a collector, by OTLP over gRPC; nowhere without one."""
    if not endpoint:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidSettings(
            f"traces {endpoint}: this needs OpenTelemetry; pip install 'zimage-grpc[traces]'",
            reason="EXTRAS_MISSING",
            fields={"field": "traces", "given": endpoint},
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    insecure = not endpoint.startswith("https://")
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=insecure)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
