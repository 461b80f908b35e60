"""Who calls, as the certificate says that the caller has shown."""

from collections.abc import Iterable, Mapping

_NAMES = ("peer_uri", "peer_dns", "x509_common_name")
"""Where a certificate says whose it is, the most exact first."""


def name(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """Empty for callers without a certificate."""
    for key in _NAMES:
        for value in auth_context.get(key, ()):
            return value.decode(errors="backslashreplace")
    return ""
