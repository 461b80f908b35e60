"""Every error that a user can meet, one class per thing that a caller would do differently.

    ZImageError
      InvalidRequest       fix the call
        InvalidModel         fix the model folder or file (raised while a service starts)
        InvalidSettings      fix the settings (raised while a program starts)
      NotFound             fix the name
      NotReady             change a state first
      Overloaded           wait, or ask for less
      Unavailable          try again (the SDK does)
        DeviceLost           the same, after a worker died
      DeadlineTooShort     raise the deadline
      Unauthenticated      bring credentials
      Forbidden            ask for the right
      Unimplemented        talk to a newer server
      Cancelled            nothing: somebody wanted it
      InternalError        report it, with the request id

The server raises the class, the client gets the same class: `wire/status.py` carries it across.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class ZImageError(Exception):
    """Base of all; `reason` is a stable word for programs, `fields` the values in the text."""

    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        fields: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.fields = dict(fields or {})
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross the pipe between front and worker."""
        return _rebuild, (type(self), self.message, self.reason, self.fields, self.retry_after)


class InvalidRequest(ZImageError):
    """The call is wrong; `field` names the part that is, when there is one."""

    default_reason = "INVALID_REQUEST"

    @classmethod
    def given(
        cls, field: str, given: object, allowed: str, reason: str, nearest: str = ""
    ) -> "InvalidRequest":
        """The error of a field with a value that is not allowed."""
        hint = f"; nearest {nearest}" if nearest else ""
        fields = {"field": field, "given": str(given), "allowed": allowed, "nearest": nearest}
        return InvalidRequest(
            f"{field}: {given} given, allowed is {allowed}{hint}",
            reason=reason,
            fields={name: value for name, value in fields.items() if value or name != "nearest"},
        )

    @property
    def field(self) -> str:
        """The path of the wrong field, empty when the whole call is wrong."""
        return self.fields.get("field", "")


class InvalidModel(InvalidRequest):
    """A model folder or file that cannot be what was asked for."""

    default_reason = "INVALID_MODEL"

    @classmethod
    def at(cls, path: Path, what: str, reason: str = "FILE_CORRUPT") -> Self:
        """The error of a file or folder that is not what it should be."""
        return cls(f"{path}: {what}", reason=reason, fields={"path": str(path)})


class InvalidSettings(InvalidRequest):
    """A settings file, a flag or an environment variable that is wrong."""

    default_reason = "INVALID_SETTINGS"


class NotFound(ZImageError):
    """The thing named does not exist."""

    default_reason = "NOT_FOUND"


class NotReady(ZImageError):
    """The system's state forbids this; another state would allow it."""

    default_reason = "NOT_READY"


class Overloaded(ZImageError):
    """There is no room now; `retry_after` says when to look again."""

    default_reason = "QUEUE_FULL"


class Unavailable(ZImageError):
    """The service cannot be reached or is not ready; trying again is right."""

    default_reason = "UNAVAILABLE"


class DeviceLost(Unavailable):
    """The worker died with the call in flight and is being replaced."""

    default_reason = "DEVICE_LOST"


class DeadlineTooShort(ZImageError):
    """The call's deadline passed, or cannot be met."""

    default_reason = "DEADLINE_EXCEEDED"


class Unauthenticated(ZImageError):
    """No credentials, or wrong ones."""

    default_reason = "UNAUTHENTICATED"


class Forbidden(ZImageError):
    """The credentials do not allow this."""

    default_reason = "FORBIDDEN"


class Unimplemented(ZImageError):
    """The server does not know this call."""

    default_reason = "UNIMPLEMENTED"


class Cancelled(ZImageError):
    """The call was cancelled by its caller."""

    default_reason = "CANCELLED"


class InternalError(ZImageError):
    """A fault of ours; the text holds no internals, the server's log does."""

    default_reason = "INTERNAL"


def _rebuild(
    cls: type[ZImageError],
    message: str,
    reason: str,
    fields: dict[str, str],
    retry_after: float | None,
) -> ZImageError:
    return cls(message, reason=reason, fields=fields, retry_after=retry_after)
