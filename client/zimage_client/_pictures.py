"""Pieces of files from the wire as whole, verified pictures."""

import hashlib
import logging

from zimage_client._events import Picture
from zimage_client._reading import malformed
from zimage_core.errors import InternalError
from zimage_rpc.dit.v1 import dit_pb2

_log = logging.getLogger(__name__)


class Assembly:
    """The pictures of one try; they come one after the other."""

    def __init__(self) -> None:
        self._index = 0
        self._data = bytearray()

    def add(self, piece: dit_pb2.ArtifactChunk) -> Picture | None:
        """The picture that this piece completes, if it does."""
        if not self._data:
            self._index = piece.image_index
        if (piece.image_index, piece.offset) != (self._index, len(self._data)):
            raise malformed(
                f"picture {piece.image_index} goes on at byte {piece.offset}, expected was "
                f"picture {self._index} at byte {len(self._data)}"
            )
        self._data += piece.data
        if not piece.HasField("artifact"):
            return None
        digest = piece.artifact.digest
        data, self._data = bytes(self._data), bytearray()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != digest.sha256:
            raise InternalError(
                f"picture {self._index} was damaged on its way: its checksum is wrong",
                reason="CHECKSUM",
                fields={"expected": digest.sha256, "received": sha256},
            )
        return Picture(
            index=self._index,
            seed=piece.artifact.seed,
            data=data,
            media_type=digest.media_type,
            sha256=sha256,
            pixels_sha256=piece.artifact.pixels_sha256,
        )


class Delivered:
    """Which pictures of a request its caller already has, over all tries."""

    def __init__(self) -> None:
        self._sha256: dict[int, str] = {}

    def is_new(self, picture: Picture) -> bool:
        """Whether to hand it out; says so when another try made another picture."""
        if picture.index not in self._sha256:
            self._sha256[picture.index] = picture.sha256
            return True
        if self._sha256[picture.index] != picture.sha256:
            _log.warning(
                "picture %d came out differently when the request was sent again; "
                "the first one stands",
                picture.index,
            )
        return False

    def are_all(self, count: int) -> bool:
        """Whether these are the pictures of a request for so many."""
        return self._sha256.keys() == set(range(count))
