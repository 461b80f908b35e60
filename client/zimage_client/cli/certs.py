"""`zimage-client certs`: a private authority, and a certificate for each machine."""

import importlib.util
import ipaddress
import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import NotReady
from zimage_core.files import write_whole
from zimage_core.settings import ClientSettings

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_AUTHORITY = "ca"
_AUTHORITY_DAYS = 3650
_CLOCKS_DIFFER = timedelta(hours=1)
_NAME = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument(
        "machines",
        nargs="+",
        metavar="MACHINE",
        help="name or address of a machine, as others reach it; more than one, joined by commas",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("certs"), metavar="FOLDER", help="default: certs"
    )
    parser.add_argument("--days", type=int, default=365, help="until they expire (default: 365)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")


async def run(args: Namespace, _settings: ClientSettings, terminal: Terminal) -> None:
    """Makes the authority where there is none, and the certificates anew."""
    if importlib.util.find_spec("cryptography") is None:
        raise NotReady(
            "certificates need cryptography; install it with\n  pip install 'zimage-grpc[certs]'",
            reason="EXTRAS_MISSING",
            fields={"missing": "cryptography"},
        )
    if not 1 <= args.days <= _AUTHORITY_DAYS:
        raise wrong("--days", f"--days {args.days}: give 1 to {_AUTHORITY_DAYS}")
    machines = [_names(machine) for machine in args.machines]
    args.output.mkdir(mode=0o700, parents=True, exist_ok=True)
    own = authority(args.output)
    for names in machines:
        cert, key = args.output / f"{names[0]}.pem", args.output / f"{names[0]}.key"
        made = issued(names, own, timedelta(days=args.days))
        write(made, cert, key)
        if args.json:
            ends = made.cert.not_valid_after_utc.isoformat()
            shown = {"names": names, "cert": str(cert), "key": str(key), "expires": ends}
            terminal.result(json.dumps(shown))
        else:
            terminal.result(f"{cert}  {key}  for {', '.join(names)}, {args.days} days")
    terminal.note(
        f"{args.output / 'ca.pem'} goes to every machine, a machine's own .pem and .key to that "
        f"machine alone, and {args.output / 'ca.key'} nowhere"
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its key."""

    cert: "x509.Certificate"
    key: "EllipticCurvePrivateKey"


def _names(machine: str) -> list[str]:
    names = machine.split(",")
    for name in names:
        if not (_NAME.fullmatch(name) or _is_address(name)) or name == _AUTHORITY:
            raise wrong("MACHINE", f"{name!r} cannot be the name or the address of a machine")
    return names


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def authority(folder: Path) -> Pair:
    """The one in the folder, else a new one."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    cert, key = folder / f"{_AUTHORITY}.pem", folder / f"{_AUTHORITY}.key"
    if cert.exists() or key.exists():
        try:
            loaded: Any = load_pem_private_key(key.read_bytes(), None)
            return Pair(x509.load_pem_x509_certificate(cert.read_bytes()), loaded)
        except (OSError, ValueError, TypeError) as error:
            raise wrong("--output", f"{folder} holds half of an authority: {error}") from error
    made = issued(["Z-Image private authority"], None, timedelta(days=_AUTHORITY_DAYS))
    write(made, cert, key)
    return made


def issued(names: list[str], by: Pair | None, lifetime: timedelta) -> Pair:
    """A certificate by the authority for a machine that serves and calls; or the authority's."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(by.cert.subject if by else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + lifetime)
    )
    signer = by.key if by else key
    for extension, is_critical in _extensions(names, key, signer, is_authority=by is None):
        builder = builder.add_extension(extension, is_critical)
    return Pair(builder.sign(signer, hashes.SHA256()), key)


def _extensions(
    names: list[str],
    key: "EllipticCurvePrivateKey",
    signer: "EllipticCurvePrivateKey",
    *,
    is_authority: bool,
) -> "Iterator[tuple[x509.ExtensionType, bool]]":
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as purposes  # noqa: N813

    yield x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), True
    yield x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False
    yield x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
    usage = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    allowed = {"key_cert_sign", "crl_sign"} if is_authority else {"digital_signature"}
    yield x509.KeyUsage(**usage | dict.fromkeys(allowed, True)), True
    if not is_authority:
        yield x509.ExtendedKeyUsage([purposes.SERVER_AUTH, purposes.CLIENT_AUTH]), False
        yield x509.SubjectAlternativeName(list(map(_general_name, names))), False


def _general_name(name: str) -> "x509.GeneralName":
    from cryptography import x509

    return x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)


def write(pair: Pair, cert: Path, key: Path) -> None:
    """First the key: a service that sees the new certificate finds the key to it."""
    from cryptography.hazmat.primitives import serialization as form

    secret = pair.key.private_bytes(
        form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
    )
    write_whole(key, secret, mode=0o600)
    write_whole(cert, pair.cert.public_bytes(form.Encoding.PEM))
