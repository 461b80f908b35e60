"""Where models come from: a hub's repository, or a folder or file of this machine."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from zimage_core.errors import (
    Forbidden,
    InvalidModel,
    InvalidSettings,
    NotFound,
    NotReady,
    Unavailable,
)

_CHUNK_BYTES = 8 << 20

Told = Callable[[int], None]
"""Hears how many bytes more there are."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as its source describes it."""

    name: str
    """With slashes."""
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""
    """Of small files, which a hub keeps as git does; neither where the source names none."""


class Source(Protocol):
    """All of a model's files, at one revision of it."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def origin(self) -> str:
        """What tells it from another of that name."""

    @property
    def revision(self) -> str:
        """Empty for what has none."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """What there is, whether it is of use or not."""

    def copy(self, file: SourceFile, to: Path, told: Told) -> None:
        """Goes on with what is there of it, as far as the source can."""


class Folder:
    """Files of this machine."""

    revision = ""

    def __init__(self, path: Path) -> None:
        self._root = path if path.is_dir() else path.parent
        self.name = path.absolute().name
        self.origin = str(path.resolve())
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.files = [
            SourceFile(one.relative_to(self._root).as_posix(), one.stat().st_size)
            for one in found
            if one.is_file()
        ]

    def copy(self, file: SourceFile, to: Path, told: Told) -> None:
        """From the beginning: it does not take long enough to be interrupted."""
        told(0)
        with (self._root / file.name).open("rb") as source, to.open("wb") as target:
            shutil.copyfileobj(source, _Counted(target, told), _CHUNK_BYTES)


class Hub:
    """A repository of a hub, with the endpoint and the token that huggingface_hub finds."""

    def __init__(self, name: str, revision: str | None) -> None:
        """Asks for its list of files."""
        from huggingface_hub import HfApi

        with _explained(name, revision):
            found = HfApi().model_info(name, revision=revision, files_metadata=True)
        self.name = self.origin = name
        self.revision = found.sha or ""
        self.files = [
            SourceFile(
                one.rfilename,
                one.size or 0,
                one.lfs.sha256 if one.lfs else "",
                "" if one.lfs else one.blob_id or "",
            )
            for one in found.siblings or ()
        ]

    def copy(self, file: SourceFile, to: Path, told: Told) -> None:
        """By plain HTTP, which can go on in the middle of a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
        there = to.stat().st_size if to.exists() else 0
        if there > file.size_bytes:
            there = 0
        url = hf_hub_url(self.name, file.name, revision=self.revision)
        with _explained(self.name, self.revision), to.open("ab" if there else "wb") as target:
            told(there)
            http_get(
                url,
                _Counted(target, told),  # type: ignore[arg-type]
                resume_size=there,
                headers=build_hf_headers(),
                expected_size=file.size_bytes,
            )


def check(file: SourceFile, path: Path) -> str:
    """The SHA-256 of a file that came; raises InvalidModel unless it is what its source has."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    sha1.update(f"blob {path.stat().st_size}\0".encode())
    for chunk in read(path):
        sha256.update(chunk)
        if file.git_sha1:
            sha1.update(chunk)
    for expected, found in (
        (file.sha256, sha256.hexdigest()),
        (file.git_sha1, sha1.hexdigest()),
    ):
        if expected and found != expected:
            what = (
                f"its digest is {found}, its source says {expected}; it is fetched anew next time"
            )
            raise InvalidModel.at(path, what)
    return sha256.hexdigest()


def read(path: Path) -> Iterator[bytes]:
    """A large file in parts."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


class _Counted:
    """A file that tells what is written to it."""

    def __init__(self, file: IO[bytes], told: Told) -> None:
        self._file = file
        self._told = told

    def write(self, data: bytes) -> int:
        self._told(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as ours."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    at = f"{name} at {revision}" if revision else name
    fields = {"given": at}
    try:
        yield
    except errors.GatedRepoError as error:
        what = f"{at}: its owner asks for consent first: give it on its page, and set HF_TOKEN"
        raise Forbidden(what, reason="MODEL_GATED", fields=fields) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        what = (
            f"{name}: no such folder, file or repository; repositories are named OWNER/NAME, and "
            "private ones need HF_TOKEN"
        )
        raise NotFound(what, reason="MODEL_NOT_FOUND", fields=fields) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        what = f"{at}: no such revision or file"
        raise NotFound(what, reason="MODEL_NOT_FOUND", fields=fields) from error
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        what = f"{at}: the hub does not answer as it should: {error}"
        raise Unavailable(what, reason="HUB", fields=fields) from error


def source(given: str, revision: str | None) -> Source:
    """What is named: a path that exists, else a repository."""
    path = Path(given).expanduser()
    if path.exists():
        if revision:
            what = f"--revision {revision}: a folder of this machine has none"
            raise InvalidSettings(what, reason="USAGE", fields={"field": "--revision"})
        return Folder(path)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise NotReady(
            f"{given} is no path here, and repositories need huggingface_hub; install it with\n"
            "  pip install 'zimage-grpc[models]'",
            reason="EXTRAS_MISSING",
            fields={"missing": "huggingface_hub"},
        ) from error
    return Hub(given, revision)
