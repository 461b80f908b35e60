"""The tensor codec: messages to plain tensors and back."""

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


def from_wire(message: types_pb2.Tensor, *, field: str) -> TensorData:
    """The tensor of a message; raises InvalidRequest unless type, shape and length agree."""
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
    shape, data = tuple(message.shape), message.data  # every look at `data` would copy it
    expected = byte_count(name, shape)
    if len(data) != expected:
        raise InvalidRequest(
            f"{field}.data: {len(data)} bytes given, {expected} needed for {name} {list(shape)}",
            reason="TENSOR_LENGTH",
            fields={
                "field": f"{field}.data",
                "given": str(len(data)),
                "allowed": str(expected),
            },
        )
    return TensorData(name, shape, data)
