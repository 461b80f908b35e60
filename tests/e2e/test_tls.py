"""TLS between real processes: who is let in, who is told why not, and certificates that change."""

import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest

from tests.e2e.services import PATIENCE_SECONDS, Service, free_address, running
from zimage_client import Client, Tls, Unauthenticated, Unavailable, ZImageError
from zimage_client.cli import certs as certificates
from zimage_client.cli.main import main as command

HOST = "127.0.0.1"
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 3}


def _made(folder: Path, *machines: str) -> Path:
    assert command(["certs", *machines, "-o", str(folder)]) == 0
    return folder


def _flags(folder: Path, name: str) -> list[str]:
    own = {"cert": f"{name}.pem", "key": f"{name}.key", "client-ca": "ca.pem"}
    return [part for what, file in own.items() for part in (f"--tls-{what}", str(folder / file))]


def _tls(folder: Path, name: str = "") -> Tls:
    own = (folder / f"{name}.pem", folder / f"{name}.key") if name else ()
    return Tls(folder / "ca.pem", *own)


def _refusal(service: Service, tls: Tls | None, host: str = HOST) -> Unauthenticated | Unavailable:
    """Why a client gets no picture."""
    address = service.address.replace(HOST, host)
    with (
        Client(address, tls=tls) as client,
        pytest.raises((Unauthenticated, Unavailable)) as caught,
    ):
        client.generate("x", retry=False, **SMALL)
    return caught.value


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory.mktemp("certs"), f"encoder,{HOST}", f"dit,{HOST}", "user")


@pytest.fixture(scope="module")
def encoder(certs: Path, model_folder: Path) -> Iterator[Service]:
    flags = ["--model", str(model_folder), *_flags(certs, "encoder")]
    with running("encoder_service", *flags, listen=free_address()) as service:
        yield service


@pytest.fixture(scope="module")
def dit(certs: Path, model_folder: Path, encoder: Service) -> Iterator[Service]:
    flags = ["--model", str(model_folder), *_flags(certs, "dit")]
    flags += ["--encoder", encoder.address, "--tls-ca", str(certs / "ca.pem")]
    with running("dit_service", *flags, listen=free_address()) as service:
        with Client(service.address, tls=_tls(certs, "user")) as client:
            client.generate("until it is loaded", **SMALL)
        yield service


def test_both_ways_are_mutual_tls_and_the_log_says_who_calls(
    encoder: Service, dit: Service
) -> None:
    assert "with mutual TLS" in dit.wait_for_line("listens on")
    assert " by user" in dit.wait_for_line("Generate OK")
    assert " by dit" in encoder.wait_for_line("Encode OK")


def test_the_command_line_takes_certificates_as_flags(
    certs: Path, dit: Service, tmp_path: Path
) -> None:
    own = ["--tls-ca", "ca.pem", "--tls-cert", "user.pem", "--tls-key", "user.key"]
    flags = [str(certs / part) if part.endswith((".pem", ".key")) else part for part in own]
    made = ["generate", "x", "-o", str(tmp_path / "x.png"), "--steps", "2"]
    assert command([*made, "--server", dit.address, *flags]) == 0
    assert command(["info", "--server", dit.address, *flags]) == 0


def test_a_service_of_another_authority_is_not_believed(dit: Service, tmp_path: Path) -> None:
    error = _refusal(dit, _tls(_made(tmp_path, "user"), "user"))
    assert (type(error), error.reason) == (Unauthenticated, "TLS_UNTRUSTED")
    assert "by none of the authorities in tls_ca" in error.message


def test_a_certificate_for_other_names_is_not_believed(certs: Path, dit: Service) -> None:
    for _ in range(20):  # gRPC also tries [::1], where nobody is; it tells of the last that failed
        error = _refusal(dit, _tls(certs, "user"), host="localhost")
        if error.reason != "UNREACHABLE":
            break
    assert (type(error), error.reason) == (Unauthenticated, "TLS_WRONG_NAME")


def _wait_for_handshake(service: Service, since: int) -> None:
    """Until the log tells of one that failed."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any("andshake failed" in line for line in service.log[since:]):
        assert time.monotonic() < deadline, service.log[since:]
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("most", "is_spoken"), [("TLSv1_3", True), ("TLSv1_2", True), ("TLSv1_1", False)]
)
def test_two_versions_of_tls_are_spoken(
    certs: Path, dit: Service, most: str, is_spoken: bool
) -> None:
    context = ssl.create_default_context(cafile=certs / "ca.pem")
    context.load_cert_chain(certs / "user.pem", certs / "user.key")
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is not this side that refuses
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion[most]
    host, _, port = dit.address.partition(":")
    refused = pytest.raises(ssl.SSLError)
    with (
        socket.create_connection((host, int(port))) as connection,
        nullcontext() if is_spoken else refused,
        context.wrap_socket(connection, server_hostname=host) as spoken,
    ):
        assert spoken.version() == most.replace("_", ".")


@pytest.mark.parametrize("tls", ["none", "no certificate", "another authority's", "expired"])
def test_who_cannot_prove_itself_is_pointed_to_doctor(
    certs: Path, dit: Service, tmp_path: Path, tls: str
) -> None:
    others = _made(tmp_path / "others", "user")
    authority = certificates.authority(certs)
    expired = certificates.issued(["user"], authority, timedelta(minutes=-30))
    certificates.write(expired, tmp_path / "old.pem", tmp_path / "old.key")
    shown = {
        "none": None,
        "no certificate": _tls(certs),
        "another authority's": Tls(certs / "ca.pem", others / "user.pem", others / "user.key"),
        "expired": Tls(certs / "ca.pem", tmp_path / "old.pem", tmp_path / "old.key"),
    }
    lines = len(dit.log)
    error = _refusal(dit, shown[tls])
    assert (type(error), error.reason) == (Unavailable, "UNREACHABLE")
    _wait_for_handshake(dit, lines)
    assert "zimage-client doctor" in error.message


def _reason(encoder: Service, certs: Path) -> str:
    """Why an encoder is not believed."""
    with (
        Client(encoder=encoder.address, tls=_tls(certs)) as client,
        pytest.raises(Unauthenticated) as caught,
    ):
        client.encode("x")
    return caught.value.reason


def test_a_service_without_tls_or_with_an_old_certificate_is_told(
    certs: Path, model_folder: Path, tmp_path: Path
) -> None:
    model = ["--model", str(model_folder)]
    with running("encoder_service", *model, listen=free_address()) as plain:
        plain.wait_for_line("listens on")
        assert _reason(plain, certs) == "TLS_NOT_SPOKEN"
        with Client(encoder=f"grpc://{plain.address}", tls=_tls(certs)) as client:
            client.encode("x")
    old = certificates.issued([HOST], certificates.authority(certs), timedelta(minutes=-30))
    certificates.write(old, tmp_path / "old.pem", tmp_path / "old.key")
    own = ["--tls-cert", str(tmp_path / "old.pem"), "--tls-key", str(tmp_path / "old.key")]
    with running("encoder_service", *model, *own, listen=free_address()) as service:
        service.wait_for_line("with TLS")
        assert _reason(service, certs) == "TLS_EXPIRED"


def _put(source: Path, folder: Path) -> None:
    """As a certificate manager does it: each file in one step."""
    scratch = folder / ".scratch"
    shutil.copy(source, scratch)
    scratch.replace(folder / source.name)


@contextmanager
def _loaded(address: str, tls: Tls) -> Iterator[Callable[[], None]]:
    """Four callers, two of whom ask for pictures and none of whom asks twice. What it yields waits
    until all have got through again; in the end nobody must have failed."""
    stop, calls, failed = threading.Event(), [0] * 4, list[ZImageError]()

    def call(number: int) -> None:
        with Client(address, tls=tls) as client:
            while not stop.is_set():
                try:
                    if number % 2:
                        client.generate("x", retry=False, **SMALL)
                    else:
                        client.describe()
                except ZImageError as error:
                    failed.append(error)
                calls[number] += 1

    def wait_for_calls() -> None:
        goals = [count + 5 for count in calls]
        while any(count < goal for count, goal in zip(calls, goals, strict=True)):
            time.sleep(0.01)

    threads = [threading.Thread(target=call, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield wait_for_calls
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_certificates_are_exchanged_under_load(model_folder: Path, tmp_path: Path) -> None:
    """A new authority is believed beside the old, certificates move to it, the old one goes."""
    machines = f"encoder,{HOST}", f"dit,{HOST}", "user"
    live, new = _made(tmp_path / "live", *machines), _made(tmp_path / "new", *machines)
    both = tmp_path / "both" / "ca.pem"
    both.parent.mkdir()
    both.write_bytes((live / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes())

    def flags(name: str) -> list[str]:
        return ["--model", str(model_folder), *_flags(live, name)]

    with running("encoder_service", *flags("encoder"), listen=free_address()) as encoder:
        towards = ["--encoder", encoder.address, "--tls-ca", str(live / "ca.pem")]
        with running("dit_service", *flags("dit"), *towards, listen=free_address()) as dit:
            with Client(dit.address, tls=_tls(live, "user")) as client:
                client.generate("until both are loaded", **SMALL)
            with _loaded(dit.address, _tls(live, "user")) as wait_for_calls:
                for file in (
                    both,
                    *(
                        new / f"{name}.{part}"
                        for part in ("key", "pem")
                        for name in ("encoder", "dit", "user")
                    ),
                    new / "ca.pem",
                ):
                    wait_for_calls()
                    _put(file, live)
                wait_for_calls()
            for service in (encoder, dit):
                service.wait_for_line("certificates were exchanged")
            with Client(dit.address, tls=_tls(new, "user")) as client:
                client.generate("with the new ones", **SMALL)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tls-cert", "dit.pem"], "tls_key is needed beside the other"),
        (["--tls-client-ca", "ca.pem"], "needs tls_cert and tls_key"),
        (["--tls-cert", "dit.pem", "--tls-key", "user.key"], "is not the key of"),
        (["--tls-cert", "dit.pem", "--tls-key", "none.key"], "No such file"),
        (["--tls-cert", "dit.pem", "--tls-key", "dit.key", "--tls-client-ca", "dit.key"], "PEM"),
    ],
)
def test_files_that_do_not_fit_end_the_start(
    certs: Path, model_folder: Path, flags: list[str], said: str
) -> None:
    start = [sys.executable, "-m", "dit_service", "--model", str(model_folder), "--probes", ""]
    done = subprocess.run(
        [*start, "--listen", free_address(), *flags],
        cwd=certs,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def _examined(
    capsys: pytest.CaptureFixture[str], address: str, *flags: str
) -> tuple[int, dict[str, dict[str, str]]]:
    """What doctor finds at a DiT service, by the name of the check."""
    capsys.readouterr()
    code = command(["doctor", "--json", "--server", address, *flags])
    lines = capsys.readouterr().out.splitlines()
    return code, {found["check"]: found for found in map(json.loads, lines)}


def test_doctor_finds_nothing_wrong(
    certs: Path, dit: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--tls-ca", str(certs / "ca.pem"), "--tls-cert", str(certs / "user.pem")]
    code, found = _examined(capsys, dit.address, *own, "--tls-key", str(certs / "user.key"))
    assert code == 0
    assert {check: finding["verdict"] for check, finding in found.items()} == dict.fromkeys(
        ("name", "port", "TLS", "version", "model", "round trip", "bandwidth", "picture"), "ok"
    )
    assert found["TLS"]["said"].startswith("TLSv1.3, a certificate for dit, 127.0.0.1, 36")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("none", ("HTTP/2", "it speaks TLS", "--tls-ca")),
        ("no certificate", ("TLS", "hung up", "want a certificate of yours")),
        ("another authority's", ("TLS", "hung up", "unable to get local issuer certificate")),
        ("expired", ("TLS", "hung up", "certificate has expired")),
        ("believes others", ("TLS", "unable to get local issuer", "must hold the authority")),
        ("another name", ("TLS", "not valid for 'localhost'", "must include this address")),
    ],
)
def test_doctor_tells_what_tls_hides(
    certs: Path,
    dit: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shown: str,
    expected: tuple[str, str, str],
) -> None:
    others = _made(tmp_path / "others", "user")
    authority = certificates.authority(certs)
    expired = certificates.issued(["user"], authority, timedelta(minutes=-30))
    certificates.write(expired, tmp_path / "user.pem", tmp_path / "user.key")

    def flags(believed: Path, own: Path | None) -> list[str]:
        pair = ["--tls-cert", f"{own}/user.pem", "--tls-key", f"{own}/user.key"] if own else []
        return ["--tls-ca", str(believed / "ca.pem"), *pair]

    given = {
        "none": [],
        "no certificate": flags(certs, None),
        "another authority's": flags(certs, others),
        "expired": flags(certs, tmp_path),
        "believes others": flags(others, certs),
        "another name": flags(certs, certs),
    }
    host = "localhost" if shown == "another name" else HOST
    code, found = _examined(capsys, dit.address.replace(HOST, host), *given[shown])
    assert code == 1
    [wrong] = [finding for finding in found.values() if finding["verdict"] == "wrong"]
    check, said, advice = expected
    assert wrong["check"] == check
    assert said in wrong["said"]
    assert advice in wrong["advice"]


def test_doctor_names_the_link_that_is_missing(
    certs: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _examined(capsys, "nowhere.invalid:1")
    assert (code, found["name"]["verdict"]) == (1, "wrong")
    code, found = _examined(capsys, free_address())
    assert (code, found["port"]["verdict"]) == (1, "wrong")
    code, found = _examined(capsys, "unix:/nowhere/at/all")
    assert (code, found["socket"]["verdict"]) == (1, "wrong")
    with running("encoder_service", "--model", str(model_folder), listen=free_address()) as encoder:
        encoder.wait_for_line("listens on")
        tls = ["--tls-ca", str(certs / "ca.pem")]
        code, found = _examined(capsys, encoder.address, *tls)
        assert "speaks no TLS" in found["TLS"]["said"]
        code, found = _examined(capsys, encoder.address)
        assert code == 1
        assert "--server is for a DiT service" in found["service"]["advice"]
