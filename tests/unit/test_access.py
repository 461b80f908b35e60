"""Tokens: who may call what, how often, and that nothing of a stranger's body is read."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from zimage_core.errors import (
    Forbidden,
    InvalidSettings,
    Overloaded,
    Unauthenticated,
    ZImageError,
)
from zimage_core.serving import access
from zimage_core.serving.access import ROLES, Access, charge, inside
from zimage_core.serving.interceptors import Around
from zimage_core.wire import status
from zimage_core.wire.limits import CHANNEL_OPTIONS, SERVER_OPTIONS
from zimage_rpc.blob.v1 import blob_pb2
from zimage_rpc.dit.v1 import dit_pb2, training_pb2
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.trainer.v1 import trainer_pb2

PAINTER, WRITER, CHIEF = ("p" * 20, "w" * 20, "c" * 20)
FILE = f"""
[[token]]
name = "painter"
token = "{PAINTER}"
roles = ["generate"]
calls_per_minute = 60
calls_at_once = 2

[[token]]
name = "writer"
sha256 = "{hashlib.sha256(WRITER.encode()).hexdigest()}"
roles = ["encode"]
project = "texts"

[[token]]
name = "chief"
token = "{CHIEF}"
roles = ["admin"]
"""
GENERATE = "/zimage_rpc.dit.v1.DitService/Generate"
ENCODE = "/zimage_rpc.encoder.v1.EncoderService/Encode"
DESCRIBE = "/zimage_rpc.dit.v1.DitService/Describe"
BODY_BYTES = 30 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    return path


def _with(token: str) -> dict[str, str | bytes]:
    return {"authorization": f"Bearer {token}"}


def test_every_method_needs_a_role_or_says_that_any_will_do() -> None:
    services = [
        service
        for file in (encoder_pb2, dit_pb2, training_pb2, trainer_pb2, blob_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    methods = {f"/{service.full_name}/{m.name}" for service in services for m in service.methods}
    assert set(ROLES) == methods


def test_a_role_opens_its_methods_and_an_admin_all(path: Path) -> None:
    tokens = Access(path)
    assert tokens.caller(GENERATE, _with(PAINTER)).token.name == "painter"
    assert tokens.caller(ENCODE, _with(WRITER)).token.project == "texts"
    for method in (GENERATE, ENCODE, DESCRIBE):
        tokens.caller(method, _with(CHIEF))
    tokens.caller(DESCRIBE, _with(WRITER))
    with pytest.raises(Forbidden, match=r"painter has the roles generate; this call needs encode"):
        tokens.caller(ENCODE, _with(PAINTER))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({}, "TOKEN_MISSING"),
        ({"authorization": "Bearer " + "x" * 20}, "TOKEN_INVALID"),
        ({"authorization": PAINTER}, "TOKEN_INVALID"),
        ({"authorization": b"Bearer \xff"}, "TOKEN_INVALID"),
        ({"authorization": ""}, "TOKEN_INVALID"),
    ],
)
def test_without_a_known_token_nothing_opens(
    path: Path, metadata: dict[str, str | bytes], reason: str
) -> None:
    with pytest.raises(Unauthenticated) as caught:
        Access(path).caller(DESCRIBE, metadata)
    assert caught.value.reason == reason
    assert PAINTER not in caught.value.message


def test_calls_a_minute_come_back_with_time(path: Path) -> None:
    clock = Clock()
    tokens = Access(path, clock)
    for _ in range(60):
        tokens.caller(GENERATE, _with(PAINTER))
    with pytest.raises(Overloaded, match="60 calls a minute") as caught:
        tokens.caller(GENERATE, _with(PAINTER))
    assert caught.value.retry_after == pytest.approx(1.0)
    clock.now += 1.0
    tokens.caller(GENERATE, _with(PAINTER))
    with pytest.raises(Overloaded):
        tokens.caller(GENERATE, _with(PAINTER))


def test_device_seconds_come_back_with_time(path: Path) -> None:
    path.write_text(
        f'[[token]]\nname = "x"\ntoken = "{PAINTER}"\nroles = ["generate"]\n'
        "device_seconds_per_hour = 36"
    )
    clock = Clock()
    tokens = Access(path, clock)
    with inside(tokens.caller(GENERATE, _with(PAINTER))):
        charge(30)
    with inside(tokens.caller(GENERATE, _with(PAINTER))):
        charge(10)
    with pytest.raises(Overloaded, match="36 s of the device an hour") as caught:
        tokens.caller(GENERATE, _with(PAINTER))
    assert caught.value.reason == "QUOTA_SPENT"
    assert caught.value.retry_after == pytest.approx(400)
    tokens.caller(DESCRIBE, _with(PAINTER))
    clock.now += 401
    tokens.caller(GENERATE, _with(PAINTER))


def test_calls_at_once_are_counted_while_they_run(path: Path) -> None:
    tokens = Access(path)
    first, second, third = (tokens.caller(GENERATE, _with(PAINTER)) for _ in range(3))
    with inside(first):
        with inside(second), pytest.raises(Overloaded) as caught, inside(third):
            pass  # all three were let in before any of them began
        assert "2 calls at once" in caught.value.message
        with inside(third):
            pass


def test_the_file_is_read_anew_and_a_broken_one_changes_nothing(path: Path) -> None:
    tokens = Access(path)
    path.write_text("[[token")
    tokens.caller(GENERATE, _with(PAINTER))
    path.write_text(FILE.replace(PAINTER, "n" * 20))
    with pytest.raises(Unauthenticated):
        tokens.caller(GENERATE, _with(PAINTER))
    tokens.caller(GENERATE, _with("n" * 20))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "token: Field required"),
        (FILE + FILE, "the same name"),
        (FILE.replace(CHIEF, PAINTER), "the same token"),
        (FILE.replace('"admin"', '"boss"'), "token.2.roles.0"),
        (FILE.replace("calls_at_once", "calls_at_twice"), "token.0.calls_at_twice"),
        (FILE.replace(f'token = "{CHIEF}"', ""), "either token or sha256"),
        (FILE.replace(CHIEF, "short"), "at least 16"),
    ],
)
def test_a_wrong_file_is_refused_without_showing_a_token(
    path: Path, content: str, said: str
) -> None:
    path.write_text(content)
    with pytest.raises(InvalidSettings) as caught:
        Access(path)
    assert said in caught.value.message
    assert CHIEF not in caught.value.message
    assert "short" not in caught.value.message


class _Counting(encoder_pb2_grpc.EncoderServiceServicer):
    def __init__(self) -> None:
        self.callers: list[str] = []

    async def Encode(  # noqa: N802
        self, request: encoder_pb2.EncodeRequest, context: object
    ) -> encoder_pb2.EncodeResponse:
        caller = access.current.get()
        assert caller is not None
        self.callers.append(caller.token.name)
        return encoder_pb2.EncodeResponse()


class _Relay:
    """Carries bytes to a port and counts them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.carried = 0
        self.connections: list[asyncio.Task[None] | None] = []

    async def serve(self, inward: asyncio.StreamReader, outward: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.current_task())
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        async with asyncio.TaskGroup() as ways:
            ways.create_task(self._carry(inward, writer, counts=True))
            ways.create_task(self._carry(reader, outward, counts=False))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counts: bool
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                self.carried += len(data) * counts
                writer.write(data)
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@asynccontextmanager
async def _served(tokens: Access) -> AsyncIterator[tuple[_Counting, _Relay, grpc.aio.Channel]]:
    servicer = _Counting()
    server = grpc.aio.server(interceptors=[Around(tokens)], options=SERVER_OPTIONS)
    encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
    relay = _Relay(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    between = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    port = between.sockets[0].getsockname()[1]
    async with between:
        try:
            options = CHANNEL_OPTIONS
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                yield servicer, relay, channel
        finally:
            await server.stop(None)
            await asyncio.gather(*filter(None, relay.connections))


async def _encode(channel: grpc.aio.Channel, token: str, text: str) -> ZImageError | None:
    request = encoder_pb2.EncodeRequest()
    request.prompts.add(text=text)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        await encoder_pb2_grpc.EncoderServiceStub(channel).Encode(request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return status.from_status(error.code(), error.details() or "", error.trailing_metadata())
    return None


async def test_a_strangers_body_stays_outside(path: Path) -> None:
    async with _served(Access(path)) as (servicer, relay, channel):
        for token in ("", "x" * 20):
            error = await _encode(channel, token, "x" * BODY_BYTES)
            assert isinstance(error, Unauthenticated)
        refused = await _encode(channel, PAINTER, "x" * BODY_BYTES)
        assert isinstance(refused, Forbidden)
        assert servicer.callers == []
        # What a refused caller has sent by then lies in windows and buffers, which the transport
        # widens as it measures the line; nobody asks for more. Read, it were three bodies.
        assert relay.carried < 2 * BODY_BYTES
        assert await _encode(channel, WRITER, "short") is None
        assert servicer.callers == ["writer"]
