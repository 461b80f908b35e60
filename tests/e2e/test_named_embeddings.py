"""Large embeddings go by their names: their bytes only where they are not there yet."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.relay import relaying
from tests.e2e.services import Service, answer, running
from zimage_client import Client, Embedding, InvalidRequest, NotFound, Options
from zimage_core.wire import embeddings
from zimage_core.wire.limits import CHUNK_BYTES, INLINE_BYTES
from zimage_rpc.dit.v1 import dit_pb2, dit_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

WISH = Options(steps=2, seed=1, width=64, height=64, packing="solo")
_OTHER_BYTES = 16 << 10
"""More than a request without elements and the acknowledgements of its answers take."""


@pytest.fixture(scope="module")
def encoded(model_folder: Path) -> Callable[[str], Embedding]:
    """An embedding that is too large to go along."""
    with running("encoder_service", "--model", str(model_folder)) as service:
        service.wait_until("SERVING")
        with Client(encoder=service.address) as client:
            texts = "circle", "square", "star", "ring"
            every = client.encode([f"a red {text} " * 35 for text in texts])
    made = dict(zip(texts, every, strict=True))
    assert all(len(one.tensor.data) > INLINE_BYTES for one in every)
    return made.__getitem__


@pytest.fixture(scope="module")
def dit(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    store = str(tmp_path_factory.mktemp("store"))
    with running("dit_service", "--model", str(model_folder), "--store", store) as service:
        service.wait_until("SERVING")
        yield service


def _request(embedding: Embedding, *, named: bool) -> dit_pb2.GenerateRequest:
    message = embeddings.embedding_to_wire(embedding, named=named)
    side = types_pb2.Conditioning(segments=[types_pb2.Segment(embedding=message)])
    spec = dit_pb2.GenerateSpec(positive=side, step_count=2, seed=1, width_px=64, height_px=64)
    spec.packing = types_pb2.PACKING_SOLO
    return dit_pb2.GenerateRequest(spec=spec)


def _chunk(sha256: str, data: bytes) -> dit_pb2.GenerateRequest:
    return dit_pb2.GenerateRequest(chunk=dit_pb2.BlobChunk(sha256=sha256, data=data))


def _answers(dit: Service, *requests: dit_pb2.GenerateRequest) -> list[dit_pb2.GenerateResponse]:
    stub = dit_pb2_grpc.DitServiceStub(dit.channel)
    return answer(lambda sent, **options: list(stub.Generate(sent, **options)), iter(requests))


def test_its_bytes_are_sent_once(dit: Service, encoded: Callable[[str], Embedding]) -> None:
    embedding = encoded("circle")
    whole = _answers(dit, _request(embedding, named=False))[-1].completed
    with relaying(dit.address) as relay, Client(relay.address) as client:
        first = client.generate(embedding, **WISH).pictures[0]
        sent = relay.sent_bytes
        assert sent > len(embedding.tensor.data)
        second = client.generate(embedding, **WISH).pictures[0]
        assert relay.sent_bytes - sent < _OTHER_BYTES
    assert {first.pixels_sha256, second.pixels_sha256} == {whole.artifacts[0].pixels_sha256}
    named = [one.WhichOneof("event") for one in _answers(dit, _request(embedding, named=True))]
    assert "need" not in named
    assert named[-1] == "completed"


def test_a_connection_that_breaks_on_the_way_costs_nothing_else(
    dit: Service, encoded: Callable[[str], Embedding]
) -> None:
    embedding = encoded("square")
    whole = _answers(dit, _request(embedding, named=False))[-1].completed
    with relaying(dit.address) as relay, Client(relay.address) as client:
        relay.cut_after(len(embedding.tensor.data) // 2)
        picture = client.generate(embedding, **WISH).pictures[0]
        assert relay.cut_count == 1
    assert picture.pixels_sha256 == whole.artifacts[0].pixels_sha256


def test_a_negative_that_nobody_uses_is_not_asked_for(
    dit: Service, encoded: Callable[[str], Embedding]
) -> None:
    with relaying(dit.address) as relay, Client(relay.address) as client:
        client.generate(encoded("circle"), negative=encoded("ring"), **WISH)
        sent = relay.sent_bytes
        client.generate(encoded("circle"), negative=encoded("ring"), **WISH)
        assert relay.sent_bytes - sent < _OTHER_BYTES


def test_a_store_without_room_costs_only_the_second_sending(
    model_folder: Path, encoded: Callable[[str], Embedding], tmp_path: Path
) -> None:
    embedding = encoded("circle")
    flags = "--store", str(tmp_path), "--store-quota-bytes", "1000"
    with running("dit_service", "--model", str(model_folder), *flags) as dit:
        dit.wait_until("SERVING")
        with relaying(dit.address) as relay, Client(relay.address) as client:
            client.generate(embedding, **WISH)
            sent = relay.sent_bytes
            client.generate(embedding, **WISH)
            assert relay.sent_bytes - sent > len(embedding.tensor.data)


@pytest.mark.parametrize("sent", [0.0, 0.5])
def test_a_client_that_has_nothing_more_to_say_is_told_what_is_missing(
    dit: Service, encoded: Callable[[str], Embedding], sent: float
) -> None:
    tensor = encoded("star").tensor
    half = tensor.data[: int(sent * len(tensor.data))]
    chunks = [_chunk(tensor.sha256, half)] if half else []
    with pytest.raises(NotFound) as error:
        _answers(dit, _request(encoded("star"), named=True), *chunks)
    assert error.value.reason == "BLOB_NOT_FOUND"
    assert str(len(half)) in error.value.message


def test_only_what_is_needed_is_taken(dit: Service, encoded: Callable[[str], Embedding]) -> None:
    tensor = encoded("star").tensor
    named = _request(encoded("star"), named=True)
    size = len(tensor.data)
    for reason, *chunks in (
        ("BLOB_DIGEST", _chunk(tensor.sha256, bytes(size))),
        ("GRAMMAR", _chunk(tensor.sha256, bytes(size + 1))),
        ("GRAMMAR", _chunk(tensor.sha256, b"")),
        ("GRAMMAR", _chunk(tensor.sha256, bytes(CHUNK_BYTES + 1))),
        ("GRAMMAR", _chunk(encoded("ring").tensor.sha256, tensor.data)),
        ("GRAMMAR", named),
        ("GRAMMAR", _chunk(tensor.sha256, tensor.data), _chunk(tensor.sha256, b"x")),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            _answers(dit, named, *chunks)
        assert refusal.value.reason == reason


def test_one_name_is_of_one_size(dit: Service, encoded: Callable[[str], Embedding]) -> None:
    """Else a tensor would be filled with more than it holds."""
    request, other = (_request(encoded(text), named=True) for text in ("star", "ring"))
    tensors = [
        one.spec.positive.segments[0].embedding.tensors["embeddings"] for one in (request, other)
    ]
    tensors[1].shape[0] = other.spec.positive.segments[0].embedding.token_count = 1
    tensors[1].digest.sha256 = tensors[0].digest.sha256
    tensors[1].digest.size_bytes = tensors[0].digest.size_bytes // tensors[0].shape[0]
    request.spec.guidance_scale = 2.0
    request.spec.z_image.force_guidance = True
    for positive, negative in ((request, other), (other, request)):
        spec = dit_pb2.GenerateSpec()
        spec.CopyFrom(request.spec)
        spec.positive.CopyFrom(positive.spec.positive)
        spec.negative.CopyFrom(negative.spec.positive)
        with pytest.raises(InvalidRequest) as refusal:
            _answers(dit, dit_pb2.GenerateRequest(spec=spec))
        assert refusal.value.reason == "DIGEST"


def test_what_rots_in_the_store_is_asked_for_anew(
    dit: Service, encoded: Callable[[str], Embedding]
) -> None:
    embedding = encoded("circle")
    with Client(dit.address) as client:
        whole = client.generate(embedding, **WISH).pictures[0].pixels_sha256
        [store] = [Path(flag) for flag in dit.process.args if "store" in str(flag)][-1:]
        [kept] = store.glob(f"blobs/*/{embedding.tensor.sha256}")
        kept.write_bytes(bytes(len(embedding.tensor.data)))
        assert client.generate(embedding, **WISH).pictures[0].pixels_sha256 == whole


def test_a_name_must_fit(dit: Service, encoded: Callable[[str], Embedding]) -> None:
    embedding = encoded("star")
    short = _request(embedding, named=True)
    tensors = short.spec.positive.segments[0].embedding.tensors
    tensors["embeddings"].digest.size_bytes -= 1
    both = _request(embedding, named=True)
    tensors = both.spec.positive.segments[0].embedding.tensors
    tensors["embeddings"].data = embedding.tensor.data
    strange = _request(embedding, named=True)
    tensors = strange.spec.positive.segments[0].embedding.tensors
    tensors["embeddings"].digest.sha256 = "../../etc/passwd"
    for reason, request in (
        ("TENSOR_LENGTH", short),
        ("TENSOR", both),
        ("DIGEST", strange),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            _answers(dit, request)
        assert refusal.value.reason == reason
