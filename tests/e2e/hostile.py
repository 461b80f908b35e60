"""Messages that no client of ours sends, from the descriptors of those that it does."""

from collections.abc import Callable
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_DEPTH = 4
_WORDS = ("", "a", "0" * 64, "f" * 64, "../../etc/passwd", "\0", "\u202e", "PNG", "x" * 5000)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: 31,
    FieldDescriptor.CPPTYPE_INT64: 63,
}


def hostile(base: Message) -> st.SearchStrategy[bytes]:
    """Bytes instead of this message: it changed in some places, another of its kind, its bytes
    damaged, or no message at all."""
    whole = base.SerializeToString()
    return st.one_of(
        _changed(base).map(lambda message: message.SerializeToString()),
        _changed(base).map(lambda message: message.SerializeToString()),
        _any(base.DESCRIPTOR, _DEPTH).map(lambda message: message.SerializeToString()),
        _damaged(whole),
        st.binary(max_size=200),
    )


@st.composite
def _changed(draw: Any, base: Message) -> Message:
    changed = type(base)()
    changed.CopyFrom(base)
    for _ in range(draw(st.integers(1, 3))):
        _change(draw, changed)
    return changed


def _change(draw: Any, message: Message) -> None:
    """Clears a field, fills it with anything, or goes down into it."""
    if not message.DESCRIPTOR.fields:
        return
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    is_message = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE
    is_repeated = field.is_repeated
    choice = draw(st.integers(0, 5))
    if choice > 1 and is_message and not is_repeated and message.HasField(field.name):
        _change(draw, getattr(message, field.name))
    elif choice > 1 and is_message and is_repeated and not _is_map(field):
        if getattr(message, field.name):
            _change(draw, draw(st.sampled_from(list(getattr(message, field.name)))))
    elif choice == 0:
        message.ClearField(field.name)
    else:
        _fill(draw, message, field, _DEPTH)


@st.composite
def _any(draw: Any, descriptor: Descriptor, depth: int) -> Message:
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.booleans()):
            _fill(draw, message, field, depth)
    return message


def _fill(draw: Any, message: Message, field: FieldDescriptor, depth: int) -> None:
    if _is_map(field):
        kind, entries = field.message_type.fields_by_name["value"], getattr(message, field.name)
        name = draw(st.sampled_from(["embeddings", "", "other"]))
        if kind.message_type is None:
            entries[name] = draw(_value(kind))
        elif depth:
            entries[name].CopyFrom(draw(_any(kind.message_type, depth - 1)))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if depth:
            inner = draw(_any(field.message_type, depth - 1))
            target = getattr(message, field.name)
            (target.add() if field.is_repeated else target).CopyFrom(inner)
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_value(field), max_size=4)))
    else:
        setattr(message, field.name, draw(_value(field)))


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _BOUNDS:
        most = 2 ** _BOUNDS[kind] - 1
        usual = st.sampled_from([0, 1, 2, 16, 64, -1, most, -most - 1])
        return st.one_of(usual, st.integers(-most - 1, most))
    kinds: dict[int, Callable[[], st.SearchStrategy[Any]]] = {
        FieldDescriptor.CPPTYPE_ENUM: lambda: st.integers(-1, 6),
        FieldDescriptor.CPPTYPE_BOOL: st.booleans,
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats,
        FieldDescriptor.CPPTYPE_FLOAT: lambda: st.floats(width=32),
    }
    if kind in kinds:
        return kinds[kind]()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.one_of(st.binary(max_size=100), st.just(bytes(5000)))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return st.one_of(st.sampled_from(_WORDS), text)


@st.composite
def _damaged(draw: Any, whole: bytes) -> bytes:
    damaged = bytearray(whole)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(damaged)))
        if draw(st.booleans()):
            damaged[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        else:
            damaged[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(damaged)
