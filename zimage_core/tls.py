"""TLS as files: what proves who we are, and whom we believe. The files may change while we run."""

import ssl
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

from zimage_core.errors import InvalidSettings
from zimage_core.files import Stamp, stamp


@dataclass(frozen=True, slots=True)
class Pems:
    """What stands in the files."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of one end of a connection."""

    ca: Path | None = None
    """Authorities that the other end's certificate must come from."""
    cert: Path | None = None
    """Our own certificate, with those between it and its authority."""
    key: Path | None = None
    """The key to it."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise _invalid("tls_key" if self.cert else "tls_cert", "", "is needed beside the other")

    def read(self) -> Pems:
        """The files as they are now; raises InvalidSettings unless they can be used together."""
        while True:
            stamp = self.stamp()
            pems = Pems(*(_content(self, field.name) for field in fields(self)))
            if self.ca:
                _verify_authorities(self.ca)
            if self.cert and self.key:
                _verify_pair(self.cert, self.key)
            if self.stamp() == stamp:  # what was read is what was verified
                return pems

    def stamp(self) -> tuple[Stamp, ...]:
        """Another one after every change of the files."""
        return tuple(stamp(path) for path in (self.ca, self.cert, self.key) if path)


def machine_authorities() -> bytes | None:
    """Those that this machine believes; None where they cannot be listed, for gRPC's own."""
    known = ssl.create_default_context().get_ca_certs(binary_form=True)
    return "".join(map(ssl.DER_cert_to_PEM_cert, known)).encode() or None


class Credentials(TypedDict, total=False):
    """What a client shows, and what it asks to be shown."""

    tls: Tls | None
    """For every "host:port"; None for none."""
    token: str | Path
    """The token, or the file that it stands in."""


def _content(tls: Tls, name: str) -> bytes | None:
    path: Path | None = getattr(tls, name)
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise _invalid(f"tls_{name}", str(path), error.strerror or str(error)) from error


def _verify_authorities(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise _invalid("tls_ca", str(path), "holds no certificates in PEM form") from error


def _verify_pair(cert: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError) as error:
        why = "is not the key of" if "MISMATCH" in str(error) else "cannot be used with"
        raise _invalid("tls_key", str(key), f"{why} {cert}: {error}") from error


def _no_password() -> str:
    return ""  # or openssl would ask at the terminal


def _invalid(field: str, given: str, why: str) -> InvalidSettings:
    return InvalidSettings(
        f"{field} {given} {why}".replace("  ", " "),
        reason="TLS_FILES",
        fields={"field": field, "given": given},
    )
