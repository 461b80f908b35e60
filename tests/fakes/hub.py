"""A hub on this machine: answers huggingface_hub for one folder of files, as the real one does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
_LARGE_BYTES = 10_000
"""From there on files are kept apart from git, by their SHA-256."""


class Hub(ThreadingHTTPServer):
    """One repository at one revision; breaks connections where told to."""

    def __init__(self, repository: str, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repository, self.folder = repository, folder
        self.revision = REVISION
        self.stops_after: dict[str, int] = {}
        """Bytes of a file, after which nothing more comes, the first time that it is asked for."""
        self.stopped = threading.Event()
        self.goes_on = threading.Event()
        self.asked: list[tuple[str, str]] = []
        """Files, and the ranges that were asked for."""
        self.spoilt: set[str] = set()
        """Files of which other bytes come than were promised."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def listed(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [_described(path.relative_to(self.folder).as_posix(), path) for path in files]

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break on purpose."""


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        repository, path = self.server.repository, self.path.split("?")[0]
        if path.startswith("/api/models/"):
            revisions = (
                f"/api/models/{repository}/revision/{name}" for name in ("v1", self.server.revision)
            )
            if path == f"/api/models/{repository}" or path in revisions:
                self._list()
            elif path.startswith(f"/api/models/{repository}/"):
                self._refuse("RevisionNotFound")
            else:
                self._refuse("RepoNotFound")
            return
        name = path.removeprefix(f"/{repository}/resolve/{self.server.revision}/")
        if (self.server.folder / name).is_file():
            self._file(name)
        else:
            self._refuse("EntryNotFound")

    def _list(self) -> None:
        said = {
            "id": self.server.repository,
            "sha": self.server.revision,
            "siblings": self.server.listed(),
        }
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        asked = self.headers.get("Range", "")
        self.server.asked.append((name, asked))
        body = (self.server.folder / name).read_bytes()
        if name in self.server.spoilt:
            body = bytes(len(body))
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        end = self.server.stops_after.pop(name, None)
        self.wfile.write(body[begin:end])
        if end is not None:
            self.server.stopped.set()
            self.server.goes_on.wait(60)
            self.close_connection = True

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def _described(name: str, path: Path) -> dict[str, object]:
    data = path.read_bytes()
    said: dict[str, object] = {
        "rfilename": name,
        "size": len(data),
        "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest(),
    }
    if len(data) >= _LARGE_BYTES:
        sha256 = hashlib.sha256(data).hexdigest()
        said["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return said


@contextmanager
def serving(repository: str, folder: Path) -> Iterator[Hub]:
    with Hub(repository, folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.goes_on.set()
            hub.shutdown()
            thread.join()
