"""Errors cross the wire whole; what broke in the transport is told from what a server said."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_core import errors
from zimage_core.wire import status

CLASSES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.ZImageError) and cls in status.CODES
]
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(
    cls=st.sampled_from([*CLASSES, errors.DeviceLost]),
    message=WORDS,
    fields=st.dictionaries(WORDS, WORDS, max_size=3),
    retry_after=st.none() | st.integers(0, 100_000).map(lambda ms: ms / 1000),
)
def test_every_class_comes_back(
    cls: type[errors.ZImageError],
    message: str,
    fields: dict[str, str],
    retry_after: float | None,
) -> None:
    error = cls(message, fields=fields, retry_after=retry_after)
    back = status.from_status(status.code_of(error), message, status.to_trailers(error))
    assert type(back) is cls
    assert (back.message, back.reason, back.fields) == (message, error.reason, fields)
    assert back.retry_after == (None if retry_after is None else pytest.approx(retry_after))


def test_what_a_caller_sent_cannot_burst_the_status() -> None:
    long = "\N{SNOWMAN}" * 100_000
    error = errors.InvalidRequest(long, fields={"field": long, **{str(i): long for i in range(99)}})
    trailers = status.to_trailers(error)
    assert sum(len(value) for _, value in trailers) < 8_000
    assert len(status.text_of(error).encode()) < 1_100
    back = status.from_status(status.code_of(error), status.text_of(error), trailers)
    assert type(back) is errors.InvalidRequest
    assert back.message.startswith("\N{SNOWMAN}")


def test_every_class_has_a_status() -> None:
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.ZImageError):
            assert cls is errors.ZImageError or status.code_of(cls("x"))


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN]
)
def test_a_break_without_our_trailer_is_the_transports(code: grpc.StatusCode) -> None:
    error = status.from_status(code, "RST_STREAM", [("server", "nginx")])
    assert type(error) is errors.Unavailable
    assert error.reason == "UNREACHABLE"
    assert error.fields["grpc_code"] == code.name


@pytest.mark.parametrize("message", ["CANCELLED", "Received RST_STREAM with error code 8"])
def test_who_cancels_a_call_at_the_other_side_breaks_it(message: str) -> None:
    error = status.from_status(grpc.StatusCode.CANCELLED, message, [])
    assert (type(error), error.reason) == (errors.Unavailable, "UNREACHABLE")
    mine = status.from_status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", [])
    assert type(mine) is errors.Cancelled


def test_a_foreign_server_is_named() -> None:
    error = status.from_status(grpc.StatusCode.UNIMPLEMENTED, "Method not found", [])
    assert isinstance(error, errors.Unimplemented)


def test_errors_survive_the_pipe() -> None:
    import pickle

    error = errors.Overloaded("full", reason="QUEUE_FULL", fields={"a": "b"}, retry_after=2.0)
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(back), back.message, back.fields, back.retry_after) == (
        errors.Overloaded,
        "full",
        {"a": "b"},
        2.0,
    )
