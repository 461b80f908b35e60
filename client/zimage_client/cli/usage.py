"""What is wrong with a command line."""

from argparse import ArgumentTypeError

from zimage_client._options import check_timeout
from zimage_core.errors import InvalidRequest, InvalidSettings


def wrong(field: str, message: str) -> InvalidSettings:
    """The error of a flag or argument that cannot be used."""
    return InvalidSettings(message, reason="USAGE", fields={"field": field})


def seconds(text: str) -> float:
    """The value of a flag that takes seconds."""
    try:
        value = float(text)
        check_timeout(value, "seconds")
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no number of seconds") from None
    except InvalidRequest as error:
        raise ArgumentTypeError(error.message) from None
    return value
