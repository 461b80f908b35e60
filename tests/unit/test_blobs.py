"""Blobs arrive whole or not at all, go on after a break, and go when nobody wants them."""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from zimage_core.errors import InvalidRequest, InvalidSettings, NotFound, Overloaded, Unavailable
from zimage_core.serving.blobs import BlobServicer
from zimage_core.store.blobs import Blobs, Found
from zimage_core.store.incoming import Incoming

DATA = bytes(range(256)) * 100
SHA256 = hashlib.sha256(DATA).hexdigest()
Maker = Callable[..., Blobs]


@pytest.fixture(params=["folder", "memory"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    """Makes services that share one store."""
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"
    return lambda quota=1 << 20, keep=1000.0: Blobs(url, tmp_path / "scratch", quota, keep)


def _begun(blobs: Blobs, sha256: str = SHA256, size: int = len(DATA)) -> Incoming:
    incoming = blobs.receive(sha256, size)
    assert incoming is not None
    return incoming


def _put(blobs: Blobs, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    with closing(_begun(blobs, sha256, len(data))) as incoming:
        incoming.add(data[incoming.stored_bytes :])
        blobs.complete(sha256, incoming)
    return sha256


def test_a_blob_comes_in_over_two_lives(made: Maker) -> None:
    first = made()
    with closing(_begun(first)) as incoming:
        incoming.add(DATA[:10_000])
    second = made()
    assert second.find(SHA256) == Found(complete=False, stored_bytes=10_000)
    with closing(_begun(second)) as incoming:
        assert incoming.stored_bytes == 10_000
        incoming.add(DATA[10_000:])
        second.complete(SHA256, incoming)
    assert first.find(SHA256) == Found(complete=True, stored_bytes=len(DATA))
    assert first.receive(SHA256, len(DATA)) is None
    with pytest.raises(InvalidRequest, match="25600"):
        first.receive(SHA256, 5)
    with first.open(SHA256) as file:
        file.seek(5)
        assert file.read() == DATA[5:]


def test_the_later_of_two_puts_goes_on(made: Maker) -> None:
    blobs = made()
    early = _begun(blobs)
    early.add(DATA[:100])
    with closing(_begun(blobs)) as late:
        for late_word in (lambda: early.add(b"x"), lambda: blobs.complete(SHA256, early)):
            with pytest.raises(Unavailable, match="another call") as refusal:
                late_word()
            assert refusal.value.reason == "BLOB_BUSY"
        early.close()  # which takes nothing from the later one
        assert late.stored_bytes == 100
        with pytest.raises(Unavailable, match="another call"):
            made().receive(SHA256, len(DATA))  # in a process of its own
        late.add(DATA[100:])
        blobs.complete(SHA256, late)
    assert blobs.find(SHA256).complete


def test_what_is_not_what_it_says_is_refused_and_forgotten(made: Maker) -> None:
    blobs = made()
    wrong = hashlib.sha256(b"other").hexdigest()
    with closing(_begun(blobs, wrong)) as incoming:
        with pytest.raises(InvalidRequest) as refusal:
            incoming.add(DATA + b"more")
        assert refusal.value.reason == "BLOB_SIZE"
        with pytest.raises(InvalidRequest) as refusal:
            blobs.complete(wrong, incoming)
        assert refusal.value.reason == "BLOB_INCOMPLETE"
        incoming.add(DATA)
        with pytest.raises(InvalidRequest) as refusal:
            blobs.complete(wrong, incoming)
        assert refusal.value.reason == "BLOB_DIGEST"
    assert blobs.find(wrong) == Found(complete=False, stored_bytes=0)
    for name in ("", "x", SHA256.upper(), f"../{SHA256}", SHA256 + "\n"):
        with pytest.raises(InvalidRequest):
            blobs.find(name)
    with pytest.raises(NotFound):
        blobs.open(wrong)


def test_a_wrong_beginning_is_not_held_against_whoever_goes_on(made: Maker) -> None:
    blobs = made()
    with closing(_begun(blobs)) as incoming:
        incoming.add(b"wrong")
    with closing(_begun(blobs)) as incoming:
        incoming.add(DATA[5:-1] + b"x")
        with pytest.raises(Unavailable):
            blobs.complete(SHA256, incoming)
    with closing(_begun(blobs, size=3)) as incoming:  # a lie about the size
        incoming.add(b"abc")
    with closing(_begun(blobs)) as incoming:
        assert incoming.stored_bytes == 3
    assert _put(made(), b"next")


def test_names_keep_blobs(made: Maker) -> None:
    blobs = made()
    kept, lost = _put(blobs, b"kept"), _put(blobs, b"lost")
    blobs.point("adapter", "style.v1", kept)
    blobs.sweep()
    assert blobs.find(lost).complete
    blobs = made(keep=-1.0)  # everything is old
    blobs.sweep()
    assert (blobs.find(kept).complete, blobs.find(lost).complete) == (True, False)
    assert blobs.names("adapter") == ["style.v1"]
    assert blobs.pointed_at("adapter", "style.v1") == kept
    blobs.forget("adapter", "style.v1")
    blobs.sweep()
    assert not blobs.find(kept).complete
    with pytest.raises(NotFound):
        blobs.pointed_at("adapter", "style.v1")
    with pytest.raises(NotFound):
        blobs.point("adapter", "x", kept)
    assert blobs.names("adapter") == []
    for name in ("", "..", "a/b", ".hidden", "a" * 129, "x\n"):
        with pytest.raises(InvalidRequest):
            blobs.point("adapter", name, kept)


def test_a_name_that_nobody_can_read_keeps_everything(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path), tmp_path, 1 << 20, keep_seconds=-1.0)
    (tmp_path / "names/adapter").mkdir(parents=True)
    (tmp_path / "names/adapter/half").write_text('{"sha')
    first = _put(blobs, b"first")
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON
        blobs.sweep()
    assert blobs.find(first).complete


def test_a_full_store_makes_room_from_what_nobody_used_of_late(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path), tmp_path, 1000, 10_000)
    old, new = _put(blobs, b"o" * 400), _put(blobs, b"n" * 400)
    with pytest.raises(Overloaded) as refusal:
        _put(blobs, b"x" * 400)
    assert refusal.value.reason == "STORE_FULL"
    assert refusal.value.fields["allowed"] == "1000"
    path = tmp_path / "blobs" / old[:2] / old
    long_ago = time.time() - 900
    os.utime(path, (long_ago, long_ago))
    for too_much in (900, 1001, 2**62):  # which would not fit then either: nothing goes
        with pytest.raises(Overloaded):
            blobs.receive(SHA256, too_much)
        assert blobs.find(old).complete
    assert blobs.find(_put(blobs, b"x" * 400)).complete
    assert (blobs.find(old).complete, blobs.find(new).complete) == (False, True)


def test_beginnings_make_room_for_what_comes_whole(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path), tmp_path, 1000, 10_000)
    with closing(_begun(blobs, size=900)) as incoming:
        incoming.add(b"b" * 700)
    with pytest.raises(Overloaded):
        _put(blobs, b"x" * 400)
    beginning = tmp_path / "incoming" / SHA256
    long_ago = time.time() - 900
    os.utime(beginning, (long_ago, long_ago))
    assert blobs.find(_put(blobs, b"x" * 400)).complete
    assert not beginning.exists()


def test_beginnings_are_not_without_number(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path), tmp_path, 1 << 20, 10_000)
    with closing(_begun(blobs)):
        pass
    assert list((tmp_path / "incoming").iterdir()) == []  # there is nothing to go on from
    for number in range(1100):
        sha256 = hashlib.sha256(str(number).encode()).hexdigest()
        (tmp_path / "incoming" / sha256).write_bytes(b"x")
        os.utime(tmp_path / "incoming" / sha256, (number, number))
    with closing(_begun(blobs)) as incoming:
        incoming.add(b"x")
    left = {path.name for path in (tmp_path / "incoming").iterdir()}
    assert len(left) == 1001
    assert {sha256, SHA256} <= left


def test_what_is_under_way_counts_until_its_call_ends(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path), tmp_path, 1000, 10_000)
    other = hashlib.sha256(b"").hexdigest()
    with closing(_begun(blobs, size=900)) as incoming:
        incoming.add(b"x" * 300)
        with pytest.raises(Overloaded):
            blobs.receive(other, 200)
    with pytest.raises(Overloaded):
        blobs.receive(other, 800)  # what came is there
    _begun(blobs, other, 700).close()


def test_a_store_of_an_unknown_kind_is_an_error_of_the_settings(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="nosuchkind"):
        Blobs("nosuchkind://x", tmp_path, 1, 1)


async def test_a_blob_that_the_disk_has_changed_is_asked_for_again(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path / "store"), tmp_path, 1 << 20, keep_seconds=1000.0)
    servicer = BlobServicer(blobs)
    _put(blobs, DATA)
    assert await servicer.load(SHA256, len(DATA) - 1) is None  # a wrong size changes nothing
    assert await servicer.load(SHA256, len(DATA)) == DATA
    [file] = (tmp_path / "store" / "blobs").rglob(SHA256)
    file.write_bytes(bytes(len(DATA)))
    assert await servicer.load(SHA256, len(DATA)) is None
    _put(blobs, DATA)
    assert await servicer.load(SHA256, len(DATA)) == DATA
