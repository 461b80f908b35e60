"""Blobs over the wire: broken connections, beginnings that are there, names that are none."""

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.relay import relaying
from tests.e2e.services import Service, running
from zimage_client import Client, InvalidRequest, NotFound

MIB = 1 << 20


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def dit(model_folder: Path, store: Path) -> Iterator[Service]:
    with running("dit_service", "--model", str(model_folder), "--store", str(store)) as service:
        service.wait_until("SERVING")
        yield service


def _file(path: Path, size: int) -> str:
    """A file of random bytes; its digest."""
    chance, digest = random.Random(size), hashlib.sha256()
    with open(path, "wb") as file:
        for first in range(0, size, MIB):
            piece = chance.randbytes(min(MIB, size - first))
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


@pytest.mark.timeout(180)
def test_a_large_blob_over_a_connection_that_breaks_five_times(
    dit: Service, tmp_path: Path
) -> None:
    size = 512 * MIB
    sha256 = _file(tmp_path / "large", size)
    with relaying(dit.address) as relay, Client(relay.address) as client:
        relay.cut_after(*(share * size // 7 for share in range(1, 6)))
        assert client.put_blob(tmp_path / "large") == sha256
        assert relay.cut_count == 5
        assert relay.sent_bytes <= 1.1 * size
        sent = relay.sent_bytes
        assert client.put_blob(tmp_path / "large") == sha256  # it is there
        assert relay.sent_bytes - sent < MIB
        client.get_blob(sha256, tmp_path / "back")
    with open(tmp_path / "back", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_a_blob_goes_on_where_it_ended_in_either_direction(
    dit: Service, store: Path, tmp_path: Path
) -> None:
    size = 3 * MIB + 5
    sha256 = _file(tmp_path / "file", size)
    data = (tmp_path / "file").read_bytes()
    incoming = store / "incoming"
    incoming.mkdir(exist_ok=True)
    (incoming / sha256).write_bytes(data[: 2 * MIB])
    with relaying(dit.address) as relay, Client(relay.address) as client:
        assert client.find_blobs([sha256]) == set()
        client.put_blob(tmp_path / "file")
        assert relay.sent_bytes < 1.5 * MIB
        assert client.find_blobs([sha256, "0" * 64]) == {sha256}
        (tmp_path / f"back.{sha256[:16]}.part").write_bytes(data[: 2 * MIB])
        client.get_blob(sha256, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_an_empty_blob_and_one_that_is_not_there(dit: Service, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with Client(dit.address) as client:
        sha256 = client.put_blob(tmp_path / "empty")
        client.get_blob(sha256, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b""
        with pytest.raises(NotFound, match="no blob"):
            client.get_blob("0" * 64, tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()
        with pytest.raises(InvalidRequest, match="64 hexadecimal digits"):
            client.find_blobs(["../../etc/passwd"])
        with pytest.raises(InvalidRequest, match="No such file"):
            client.put_blob(tmp_path / "missing")
