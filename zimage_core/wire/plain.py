"""Messages from plain values, as files hold them: names are those of fields, and what does not fit
is refused by its path."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from zimage_core.errors import InvalidRequest

_WHOLE = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_BROKEN = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)


def fill(message: Message, values: Mapping[str, object], path: str = "") -> None:
    """Sets the fields that are named; raises InvalidRequest for others, naming the nearest one."""
    known = message.DESCRIPTOR.fields_by_name
    for name, value in values.items():
        here = f"{path}.{name}" if path else name
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise InvalidRequest.given(here, _short(value), ", ".join(known), "FIELD", *nearest)
        _set(message, cast("FieldDescriptor", known[name]), value, here)


def values(message: Message) -> dict[str, Any]:
    """The fields that are set, as `fill` takes them."""
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.is_repeated:
            found[field.name] = [_plain(field, one) for one in value]
        else:
            found[field.name] = _plain(field, value)
    return found


def _plain(field: Any, value: Any) -> Any:
    if field.message_type:
        return values(value)
    if field.enum_type:
        prefix = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        name: str = field.enum_type.values_by_number[value].name
        return name.removeprefix(prefix).lower().replace("_", "-")
    return value


def _set(message: Message, field: FieldDescriptor, value: object, path: str) -> None:
    if field.is_repeated:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidRequest.given(path, _short(value), "a list", "FIELD")
        into: Any = getattr(message, field.name)
        for index, one in enumerate(value):
            at = f"{path}[{index}]"
            if field.message_type:
                fill(into.add(), _table(one, at), at)
            else:
                into.append(_scalar(field, one, at))
    elif field.message_type:
        within = getattr(message, field.name)
        within.SetInParent()
        fill(within, _table(value, path), path)
    else:
        setattr(message, field.name, _scalar(field, value, path))


def _table(value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise InvalidRequest.given(path, _short(value), "a table", "FIELD")
    return value


def _scalar(field: FieldDescriptor, value: object, path: str) -> object:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _enumerated(cast("EnumDescriptor", field.enum_type), value, path)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        fits, allowed = isinstance(value, bool), "true or false"
    elif kind in _WHOLE:
        bits = 31 if kind == FieldDescriptor.CPPTYPE_INT32 else 63
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        fits = is_whole and -(2**bits) <= value < 2**bits
        allowed = f"a whole number, below 2^{bits}"
    elif kind in _BROKEN:
        fits, allowed = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        fits, allowed = isinstance(value, str), "a text"
    if not fits:
        raise InvalidRequest.given(path, _short(value), allowed, "FIELD")
    return value


def _enumerated(enum: EnumDescriptor, value: object, path: str) -> int:
    """The number of a name as people write it: "one-cycle" for COURSE_ONE_CYCLE."""
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    known = {
        one.name.removeprefix(prefix).lower().replace("_", "-"): one.number
        for one in enum.values
        if one.number
    }
    written = value.lower().replace("_", "-") if isinstance(value, str) else ""
    if written not in known:
        nearest = difflib.get_close_matches(written, known, n=1)
        raise InvalidRequest.given(path, _short(value), ", ".join(known), "FIELD", *nearest)
    return int(known[written])


def _short(value: object) -> str:
    return str(value)[:100] or "nothing"
