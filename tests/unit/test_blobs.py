"""Blobs arrive whole or not at all, go on after a break, and go when nobody wants them."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from zimage_core.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from zimage_core.store.blobs import Blobs, Found

DATA = bytes(range(256)) * 100
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["folder", "memory://"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"


def _blobs(url: str, quota: int = 1 << 20, keep: float = 1000.0) -> Blobs:
    return Blobs(url, quota, keep)


def _put(blobs: Blobs, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    incoming = blobs.receive(sha256, len(data))
    incoming.add(data[incoming.stored_bytes :])
    incoming.finish()
    return sha256


def test_a_blob_comes_in_over_two_lives(url: str) -> None:
    first = _blobs(url)
    incoming = first.receive(SHA256, len(DATA))
    incoming.add(DATA[:10_000])
    incoming.close()
    second = _blobs(url)
    assert second.find(SHA256) == Found(complete=False, stored_bytes=10_000)
    incoming = second.receive(SHA256, len(DATA))
    assert incoming.stored_bytes == 10_000
    incoming.add(DATA[10_000:])
    incoming.finish()
    assert first.find(SHA256) == Found(complete=True, stored_bytes=len(DATA))
    with first.open(SHA256) as file:
        file.seek(5)
        assert file.read() == DATA[5:]


def test_the_later_of_two_puts_goes_on(url: str) -> None:
    blobs = _blobs(url)
    early = blobs.receive(SHA256, len(DATA))
    early.add(DATA[:100])
    late = blobs.receive(SHA256, len(DATA))
    with pytest.raises(Unavailable, match="another call"):
        early.add(DATA[100:200])
    assert late.stored_bytes == 100
    with pytest.raises(Unavailable, match="elsewhere"):
        _blobs(url).receive(SHA256, len(DATA))
    late.add(DATA[100:])
    late.finish()
    assert blobs.find(SHA256).complete


def test_what_is_not_what_it_says_is_refused_and_forgotten(url: str) -> None:
    blobs = _blobs(url)
    wrong = hashlib.sha256(b"other").hexdigest()
    incoming = blobs.receive(wrong, len(DATA))
    with pytest.raises(InvalidRequest, match="allowed"):
        incoming.add(DATA + b"more")
    with pytest.raises(InvalidRequest) as refusal:
        incoming.finish()
    assert refusal.value.reason == "BLOB_INCOMPLETE"
    incoming.add(DATA)
    with pytest.raises(InvalidRequest) as refusal:
        incoming.finish()
    assert refusal.value.reason == "BLOB_DIGEST"
    assert blobs.find(wrong) == Found(complete=False, stored_bytes=0)
    for name in ("", "x", SHA256.upper(), f"../{SHA256}", SHA256 + "\n"):
        with pytest.raises(InvalidRequest):
            blobs.find(name)
    with pytest.raises(NotFound):
        blobs.open(wrong)


def test_names_keep_blobs(url: str) -> None:
    blobs = _blobs(url)
    kept, lost = _put(blobs, b"kept"), _put(blobs, b"lost")
    blobs.point("adapter", "style.v1", kept)
    blobs.sweep()
    assert blobs.find(lost).complete
    blobs = _blobs(url, keep=-1.0)  # everything is old
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
    for name in ("", "..", "a/b", ".hidden", "a" * 129, "x\n"):
        with pytest.raises(InvalidRequest):
            blobs.point("adapter", name, kept)


def test_a_full_store_makes_room_from_what_nobody_used_of_late(tmp_path: Path) -> None:
    blobs = _blobs(str(tmp_path), quota=1000)
    old, new = _put(blobs, b"o" * 400), _put(blobs, b"n" * 400)
    with pytest.raises(Overloaded) as refusal:
        _put(blobs, b"x" * 400)
    assert refusal.value.reason == "STORE_FULL"
    assert refusal.value.fields["allowed"] == "1000"
    path = tmp_path / "blobs" / old[:2] / old
    long_ago = time.time() - 900
    os.utime(path, (long_ago, long_ago))
    assert blobs.find(_put(blobs, b"x" * 400)).complete
    assert (blobs.find(old).complete, blobs.find(new).complete) == (False, True)


def test_what_is_under_way_counts(tmp_path: Path) -> None:
    blobs = _blobs(str(tmp_path), quota=1000)
    incoming = blobs.receive(SHA256, 900)
    with pytest.raises(Overloaded):
        blobs.receive(hashlib.sha256(b"").hexdigest(), 200)
    incoming.close()
    again = blobs.receive(SHA256, 900)
    assert again.stored_bytes == 0
    again.close()
