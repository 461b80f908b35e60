"""The one table between our error classes and gRPC's statuses, and the way across, both ways."""

import itertools
from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from zimage_core import errors
from zimage_rpc.types.v1 import types_pb2

SERVED_BY_US = "zimage-status"
"""The trailer on every status that a server of ours sends. A broken call without it broke in the
transport, whatever code a proxy made of that, and may be replayed."""

_DETAILS = "grpc-status-details-bin"
_LONGEST_TEXT_BYTES = 1000
_LONGEST_FIELD_BYTES = 200
_MOST_FIELDS = 8
"""HTTP/2 peers refuse more than 16 KiB of metadata, and the text stands in it three times."""
_DOMAIN = "zimage"

CODES: dict[type[errors.ZImageError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.NotReady: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineTooShort: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code: cls for cls, code in CODES.items()}
_SUBCLASSES = {errors.DeviceLost.default_reason: errors.DeviceLost}
_CODE_NUMBERS = {code: code_pb2.Code.Value(code.name) for code in grpc.StatusCode}

_TLS = {
    "certificate has expired": ("TLS_EXPIRED", "the service's certificate has expired"),
    "Hostname Verification Check failed": (
        "TLS_WRONG_NAME",
        "the service's certificate is for other names than this address",
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        "TLS_UNTRUSTED",
        "the service's certificate is by none of the authorities in tls_ca",
    ),
    "WRONG_VERSION_NUMBER": ("TLS_NOT_SPOKEN", "the service speaks no TLS"),
}
"""What gRPC says of a handshake that failed at this end, with what it means. A handshake that
failed at the other end tells nothing."""

_HUNG_UP = (
    "it hung up at once: it may want TLS, or a certificate of yours that it believes; "
    "`zimage-client doctor` finds out"
)

Metadata = tuple[tuple[str, str | bytes], ...]


def code_of(error: errors.ZImageError) -> grpc.StatusCode:
    """The status code of an error's class or its nearest ancestor in the table."""
    return next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)


def text_of(error: errors.ZImageError) -> str:
    """The error's text as far as a status may carry it; it may quote what a caller sent."""
    return _clipped(error.message, _LONGEST_TEXT_BYTES)


def to_trailers(error: errors.ZImageError) -> Metadata:
    """The trailing metadata that carries an error."""
    fields = {
        name: _clipped(value, _LONGEST_FIELD_BYTES)
        for name, value in itertools.islice(error.fields.items(), _MOST_FIELDS)
    }
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=fields)
    details: list[any_pb2.Any] = [_packed(info)]
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=fields["field"], description=text_of(error)
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(
        code=_CODE_NUMBERS[code_of(error)], message=text_of(error), details=details
    )
    return ((_DETAILS, status.SerializeToString()), (SERVED_BY_US, error.reason.lower()))


def from_status(
    code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]]
) -> errors.ZImageError:
    """The error that a server of ours raised; or what the transport's break means to a caller."""
    known = dict(trailers)
    if SERVED_BY_US not in known:
        return _transport_error(code, message)
    cls = _CLASSES.get(code, errors.InternalError)
    details = known.get(_DETAILS)
    if not isinstance(details, bytes):
        return cls(message)
    status = status_pb2.Status.FromString(details)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    cls = _SUBCLASSES.get(info.reason, cls)
    return cls(
        status.message,
        reason=info.reason or None,
        fields=dict(info.metadata),
        retry_after=retry_after,
    )


def to_failure(error: errors.ZImageError) -> types_pb2.Failure:
    """The error of one item of a stream."""
    return types_pb2.Failure(
        code=_CODE_NUMBERS[code_of(error)],
        message=text_of(error),
        reason=error.reason,
        fields=error.fields,
    )


def from_failure(failure: types_pb2.Failure) -> errors.ZImageError:
    """The error that ended one item."""
    code = next((code for code, n in _CODE_NUMBERS.items() if n == failure.code), None)
    cls = errors.InternalError if code is None else _CLASSES.get(code, errors.InternalError)
    cls = _SUBCLASSES.get(failure.reason, cls)
    return cls(failure.message, reason=failure.reason or None, fields=dict(failure.fields))


def _was_cut(message: str) -> bool:
    """Whether the other side cancelled it: a proxy, or a server that stops as the call comes."""
    return "RST_STREAM" in message or message == "CANCELLED"


def _transport_error(code: grpc.StatusCode, message: str) -> errors.ZImageError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineTooShort("the deadline passed before the answer came")
    if code is grpc.StatusCode.CANCELLED and not _was_cut(message):
        return errors.Cancelled("the call was cancelled")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.Unimplemented(
            f"what answers at this address is no Z-Image service: {message}"
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # grpc's own size check, before our code
        return errors.InvalidRequest(f"message too large: {message}", reason="MESSAGE_TOO_LARGE")
    for text, (reason, meaning) in _TLS.items():
        if text in message:
            return errors.Unauthenticated(
                f"{meaning}: {message}", reason=reason, fields={"cause": message}
            )
    hint = f"; {_HUNG_UP}" if message.endswith("Socket closed") else ""
    return errors.Unavailable(
        f"the connection failed: {message}{hint}",
        reason="UNREACHABLE",
        fields={"grpc_code": code.name, "cause": message},
    )


def _clipped(text: str, longest_bytes: int) -> str:
    raw = text.encode(errors="replace")
    if len(raw) <= longest_bytes:
        return raw.decode()
    return raw[:longest_bytes].decode(errors="ignore") + " ..."


def _packed(
    message: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
