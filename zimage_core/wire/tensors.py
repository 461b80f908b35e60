"""The tensor codec: messages to plain tensors and back."""

from dataclasses import replace

from zimage_core import digests
from zimage_core.errors import InvalidRequest
from zimage_core.tensors import TensorData, byte_count
from zimage_rpc.types.v1 import types_pb2

_MOST_DIMENSIONS = 8
_LARGEST_SIZE = 2**31 - 1

_TO_WIRE = {
    "float32": types_pb2.ELEMENT_TYPE_FLOAT32,
    "bfloat16": types_pb2.ELEMENT_TYPE_BFLOAT16,
    "float16": types_pb2.ELEMENT_TYPE_FLOAT16,
}
_FROM_WIRE = {number: name for name, number in _TO_WIRE.items()}


def element_type_to_wire(name: str) -> types_pb2.ElementType.ValueType:
    """The wire's enum value for "float32", "bfloat16" or "float16"."""
    return _TO_WIRE[name]


def element_type_from_wire(value: int, *, field: str) -> str:
    """The name of a wire enum value; raises InvalidRequest when it names none."""
    name = _FROM_WIRE.get(value)  # type: ignore[call-overload]
    if name is None:
        raise InvalidRequest(
            f"{field}: element type {value} is not known; allowed: {', '.join(_TO_WIRE)}",
            reason="ELEMENT_TYPE",
            fields={"field": field, "given": str(value), "allowed": ", ".join(_TO_WIRE)},
        )
    return str(name)


def to_wire(tensor: TensorData) -> types_pb2.Tensor:
    """The message of a tensor."""
    return types_pb2.Tensor(
        element_type=_TO_WIRE[tensor.element_type], shape=tensor.shape, data=tensor.data
    )


def named_to_wire(tensor: TensorData) -> types_pb2.Tensor:
    """The message of a tensor without its elements, which are sent where they are needed."""
    return types_pb2.Tensor(
        element_type=_TO_WIRE[tensor.element_type], shape=tensor.shape, digest=digest(tensor)
    )


def digest(tensor: TensorData, named: types_pb2.Digest | None = None) -> types_pb2.Digest:
    """The name of its elements, by what somebody called them where they are missing still."""
    return types_pb2.Digest(
        sha256=named.sha256 if named else tensor.sha256,
        size_bytes=byte_count(tensor.element_type, tensor.shape),
        media_type=tensor.media_type,
    )


def from_wire(message: types_pb2.Tensor, *, field: str) -> TensorData:
    """The tensor of a message; raises InvalidRequest unless type, shape and length agree."""
    if message.HasField("digest"):
        raise InvalidRequest.given(f"{field}.digest", "one", "the elements themselves", "TENSOR")
    hollow, expected = _hollow(message, field)
    data = message.data  # every look at it would copy it
    _refuse_length(f"{field}.data", len(data), expected, hollow)
    return replace(hollow, data=data)


def named_from_wire(message: types_pb2.Tensor, *, field: str) -> TensorData:
    """The tensor of a message that may name its elements: then they are missing still."""
    if not message.HasField("digest"):
        return from_wire(message, field=field)
    if message.data:
        raise InvalidRequest.given(f"{field}.data", "some", "none beside a digest", "TENSOR")
    digests.check(message.digest.sha256, f"{field}.digest.sha256")
    hollow, expected = _hollow(message, field)
    _refuse_length(f"{field}.digest.size_bytes", message.digest.size_bytes, expected, hollow)
    return hollow


def _hollow(message: types_pb2.Tensor, field: str) -> tuple[TensorData, int]:
    """The tensor without its elements, and how many bytes they have."""
    name = element_type_from_wire(message.element_type, field=f"{field}.element_type")
    if len(message.shape) > _MOST_DIMENSIONS or not all(
        0 <= size <= _LARGEST_SIZE for size in message.shape
    ):  # before they are multiplied: products of many large numbers take hours
        allowed = f"at most {_MOST_DIMENSIONS} sizes from 0 to {_LARGEST_SIZE}"
        raise InvalidRequest(
            f"{field}.shape: allowed are {allowed}",
            reason="TENSOR_SHAPE",
            fields={"field": f"{field}.shape", "allowed": allowed},
        )
    shape = tuple(message.shape)
    return TensorData(name, shape, b""), byte_count(name, shape)


def _refuse_length(field: str, given: int, expected: int, tensor: TensorData) -> None:
    if given != expected:
        raise InvalidRequest(
            f"{field}: {given} bytes given, {expected} needed for {tensor.element_type} "
            f"{list(tensor.shape)}",
            reason="TENSOR_LENGTH",
            fields={"field": field, "given": str(given), "allowed": str(expected)},
        )
