"""Refuses messages that say more than this build understands, at any depth: an old server must not
ignore a new field and answer something else than was asked."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from zimage_core.errors import InvalidRequest

_MOST_PARTS = 10_000


def refuse_unknown(message: Message) -> None:
    """Raises InvalidRequest naming the parent's path and the number, if anything is unknown; also
    for a message of more parts than anyone means, which would take long to look through."""
    parts = count(1)
    for path, number, kind in _unknown(message, message.DESCRIPTOR.name, parts):
        raise InvalidRequest(
            f"{path}: {kind} {number} is unknown to this server; "
            "a newer client must talk to a newer server or leave it out",
            reason="UNKNOWN_FIELD",
            fields={"field": path, "given": f"{kind} {number}"},
        )


def _unknown(message: Message, path: str, parts: Iterator[int]) -> Iterator[tuple[str, int, str]]:
    if next(parts) > _MOST_PARTS:
        raise InvalidRequest(f"the message has more than {_MOST_PARTS} parts", reason="MALFORMED")
    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield path, field.field_number, "field"
    for descriptor, value in message.ListFields():
        enum = descriptor.enum_type
        if enum is None and descriptor.message_type is None:
            continue  # numbers and texts, of which there may be very many
        for item_path, item in _items(descriptor, f"{path}.{descriptor.name}", value):
            if isinstance(item, Message):
                yield from _unknown(item, item_path, parts)
            elif enum is not None and item not in enum.values_by_number:
                yield item_path, item, "enum value"


def _items(descriptor: FieldDescriptor, path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in a field, each with its path: of a list, of a map, or the only one."""
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif descriptor.is_repeated:
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    else:
        yield path, value
