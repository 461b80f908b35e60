"""What is wrong with a command line."""

from zimage_core.errors import InvalidSettings


def wrong(field: str, message: str) -> InvalidSettings:
    """The error of a flag or argument that cannot be used."""
    return InvalidSettings(message, reason="USAGE", fields={"field": field})
