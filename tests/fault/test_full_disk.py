"""A disk that fills up while a blob comes in: an error that says so, and nothing else suffers."""

import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.services import Service, running
from tests.fault.conftest import Rows
from zimage_client import Client, Overloaded

pytestmark = pytest.mark.timeout(0)

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def dit(model_folder: Path, disk: Path) -> Iterator[Service]:
    with running("dit_service", "--model", str(model_folder), "--store", str(disk)) as service:
        service.wait_until("SERVING")
        yield service


def test_a_blob_that_finds_no_room_goes_on_when_there_is_some(
    dit: Service, disk: Path, tmp_path: Path, rows: Rows
) -> None:
    took = []
    with Client(dit.address) as client:
        for number in range(rows.times):
            data = os.urandom(3 * MIB)
            (tmp_path / "blob").write_bytes(data)
            (disk / "other").write_bytes(bytes(2 * MIB))
            with pytest.raises(Overloaded) as refusal:
                client.put_blob(tmp_path / "blob")
            assert refusal.value.reason == "STORE_FULL", number
            assert client.describe().ready
            began = time.monotonic()
            (disk / "other").unlink()
            sha256 = client.put_blob(tmp_path / "blob")
            client.get_blob(sha256, tmp_path / "back")
            took.append(time.monotonic() - began)
            assert (tmp_path / "back").read_bytes() == data
            assert sha256 == hashlib.sha256(data).hexdigest()
            (disk / "blobs" / sha256[:2] / sha256).unlink()
    rows.enter("the store's disk is full while a blob comes in; then there is room", took)
