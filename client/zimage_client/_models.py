"""Models on this machine: of each what its services need, checked as it came and whenever somebody
asks, and halved where it takes twice the room for nothing."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage_client import _sources
from zimage_client._embedded.locks import Lock
from zimage_client._sources import Source, SourceFile
from zimage_core.errors import InvalidModel, NotFound, NotReady, Overloaded, ZImageError
from zimage_core.files import write_whole
from zimage_core.formats.halving import halve

_log = logging.getLogger(__name__)

ENCODER, DIT, SINGLE = "encoder", "dit", "file"
PARTS = (ENCODER, DIT)

_WEIGHTS = r"(-\d{5}-of-\d{5})?\.safetensors"
_INDEX = r"\.safetensors\.index\.json"
_MODULE = "diffusion_pytorch_model"
_NEEDED = {
    ENCODER: (
        r"text_encoder/config\.json",
        rf"text_encoder/model{_WEIGHTS}",
        r"tokenizer/tokenizer\.json",
    ),
    DIT: (
        r"transformer/config\.json",
        rf"transformer/{_MODULE}{_WEIGHTS}",
        r"vae/config\.json",
        rf"vae/{_MODULE}{_WEIGHTS}",
        r"scheduler/scheduler_config\.json",
    ),
}
"""Patterns of which each must have a file."""
_PLAIN_ENCODER = (r"config\.json", rf"model{_WEIGHTS}", r"tokenizer\.json")
"""A Qwen3 as it was published, without a picture model around it."""
_BESIDE = {
    ENCODER: rf"(text_encoder/)?model{_INDEX}",
    DIT: rf"(transformer|vae)/{_MODULE}{_INDEX}|model_index\.json",
}
"""What may be there as well."""
_SINGLE_SUFFIXES = (".safetensors", ".gguf")

_LIST = "zimage-model.json"
_INCOMING, _LOCK = ".incoming", "lock"
_SAFETENSORS = ".safetensors"
_DIGITS = 16
_SPARE_BYTES = 64 << 20

Told = Callable[[SourceFile, int], None]
"""Hears of a file and how much of it is there."""


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that is here."""

    part: str
    size_bytes: int
    sha256: str
    source_sha256: str
    """Before it was halved."""
    source_git_sha1: str
    """Empty where the source has none."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A model that is here, or some of it."""

    name: str
    path: Path
    origin: str
    """The repository, or the path on this machine."""
    revision: str
    files: dict[str, KeptFile] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What there is of it."""
        return sorted({file.part for file in self.files.values()})

    @property
    def served(self) -> Path:
        """What a service takes: the folder, or the single file in it."""
        singles = [name for name, file in self.files.items() if file.part == SINGLE]
        return self.path / singles[0] if len(singles) == len(self.files) == 1 else self.path

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum(file.size_bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be fetched."""

    source: Source
    parts: dict[str, str]
    """The part of each file, by its name."""

    @property
    def files(self) -> list[SourceFile]:
        """As the source describes them."""
        return [file for file in self.source.files if file.name in self.parts]


def wanted(source: Source, parts: Sequence[str], names: Sequence[str] = ()) -> Wanted:
    """The files of those parts, or those of these names; raises NotFound for what is not there."""
    known = {file.name for file in source.files if _is_harmless(file.name)}
    if names or (len(known) == 1 and next(iter(known)).endswith(_SINGLE_SUFFIXES)):
        chosen = dict.fromkeys(names or known, SINGLE)
        if missing := chosen.keys() - known:
            raise _not_found(source, f"no {', '.join(sorted(missing))} in it")
        return Wanted(source, chosen)
    chosen = {}
    for part in parts:
        chosen |= dict.fromkeys(_of_part(part, known, source), part)
    return Wanted(source, chosen)


def _is_harmless(name: str) -> bool:
    """A hub may say anything; nothing is written outside of the model's folder, or as its list."""
    parts = re.split(r"[/\\]", name)
    return name != _LIST and ":" not in name and not any(part[:1] in ("", ".") for part in parts)


def _of_part(part: str, known: set[str], source: Source) -> list[str]:
    patterns = _NEEDED[part]
    if part == ENCODER and not any(name.startswith("text_encoder/") for name in known):
        patterns = _PLAIN_ENCODER
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in known):
            like = re.sub(r"\(.*?\)\??|\\", "", pattern)
            raise _not_found(source, f"no {part} in it: it lacks {like}")
    every = (*patterns, _BESIDE[part])
    found = [name for name in known if any(re.fullmatch(one, name) for one in every)]
    sharded = {name.split(".safetensors")[0] for name in found if name.endswith(".index.json")}
    # Beside shards and their index, the same weights may lie in one file.
    return [name for name in found if name.removesuffix(".safetensors") not in sharded]


class Models:
    """A folder of them, each in a folder by its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Kept]:
        """By name, but for those whose lists are broken."""
        found = []
        for path in (*self.folder.glob(f"*/{_LIST}"), *self.folder.glob(f"*/*/{_LIST}")):
            try:
                found.append(_read(self.folder, path.parent))
            except InvalidModel as error:
                _log.warning("%s", error.message)
        return sorted(found, key=lambda kept: kept.name)

    def get(self, name: str) -> Kept:
        """Raises NotFound where there is none of that name."""
        if _is_harmless(name) and (self.folder / name / _LIST).exists():
            return _read(self.folder, self.folder / name)
        names = ", ".join(kept.name for kept in self.all()) or "none"
        raise NotFound(
            f"{name}: no such model in {self.folder}; there are {names}",
            reason="MODEL_NOT_FOUND",
            fields={"given": name, "allowed": names},
        )

    def missing(self, want: Wanted) -> list[SourceFile]:
        """What is not here yet. Raises NotReady where another model of this name is, or other parts
        of it are of another revision."""
        kept = self._kept(want.source)
        if kept.origin != want.source.origin:
            raise NotReady(
                f"{kept.name}: another model of that name is here, from {kept.origin}; remove it "
                "first, or give another folder with --models",
                reason="MODEL_NAME",
                fields={"given": want.source.origin, "allowed": kept.origin},
            )
        others = sorted({file.part for file in kept.files.values()} - set(want.parts.values()))
        if others and kept.revision != want.source.revision:
            raise NotReady(
                f"{kept.name}: its {', '.join(others)} is here at {kept.revision}, and this is "
                f"{want.source.revision}; give --revision, or remove it first",
                reason="MODEL_REVISION",
                fields={"given": want.source.revision, "allowed": kept.revision},
            )
        return [file for file in want.files if not _is_here(kept, file)]

    def add(self, want: Wanted, told: Told) -> Kept:
        """Fetches what is missing, a file at a time; what came is kept if the next one fails. What
        another revision had of these parts goes in the end. Raises Overloaded where the disk has no
        room for it, or another process adds the same model."""
        path = self.folder / want.source.name
        (path / _INCOMING).mkdir(parents=True, exist_ok=True)
        with _alone(path):
            missing, kept = self.missing(want), self._kept(want.source)
            _write(kept)
            _refuse_without_room(path / _INCOMING, missing)
            for file in missing:
                kept.files[file.name] = _fetched(want, file, path, told)
                _write(kept)
            parts = set(want.parts.values()) - {SINGLE}
            old = [name for name, one in kept.files.items() if one.part in parts]
            kept = replace(kept, revision=want.source.revision)
            self.forget(kept, [name for name in old if name not in want.parts])
        return kept

    def verify(self, kept: Kept, told: Told) -> list[str]:
        """Reads every file; the names of those that are not what came."""
        torn = []
        for name, file in kept.files.items():
            described = SourceFile(name, file.size_bytes, file.sha256)
            told(described, 0)
            try:
                _sources.check(described, kept.path / name)
            except (InvalidModel, FileNotFoundError):
                torn.append(name)
        return torn

    def forget(self, kept: Kept, names: Sequence[str]) -> None:
        """Takes files away, so that adding the model fetches them."""
        for name in names:
            (kept.path / name).unlink(missing_ok=True)
            del kept.files[name]
        _write(kept)

    def remove(self, kept: Kept) -> None:
        """All that came of it; what else lies in its folder stays."""
        self.forget(kept, list(kept.files))
        (kept.path / _LIST).unlink()
        shutil.rmtree(kept.path / _INCOMING, ignore_errors=True)
        folders = sorted((path for path in kept.path.rglob("*") if path.is_dir()), reverse=True)
        for folder in (*folders, kept.path, kept.path.parent):
            if folder != self.folder and not any(folder.iterdir()):
                folder.rmdir()

    def _kept(self, source: Source) -> Kept:
        path = self.folder / source.name
        if (path / _LIST).exists():
            return _read(self.folder, path)
        return Kept(source.name, path, source.origin, source.revision)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process adds the same model."""
    lock = Lock.taken(path / _INCOMING / _LOCK)
    if lock is None:
        raise Overloaded(f"{path.name}: another process is adding it", reason="MODEL_BUSY")
    with lock:
        yield


def _is_here(kept: Kept, file: SourceFile) -> bool:
    """By what was noted when it came; the file itself need only be as large. What comes without a
    digest, from this machine, is copied again."""
    here, path = kept.files.get(file.name), kept.path / file.name
    if here is None or not path.is_file() or path.stat().st_size != here.size_bytes:
        return False
    noted = here.source_sha256 if file.sha256 else here.source_git_sha1
    return noted == (file.sha256 or file.git_sha1) != ""


def _fetched(want: Wanted, file: SourceFile, folder: Path, told: Told) -> KeptFile:
    scratch = _scratch(folder / _INCOMING, file)
    there = 0

    def count(more: int) -> None:
        nonlocal there
        there += more
        told(file, there)

    want.source.copy(file, scratch, count)
    try:
        came = _sources.check(file, scratch)
        final = folder / file.name
        final.parent.mkdir(parents=True, exist_ok=True)
        sha256 = came
        if file.name.endswith(_SAFETENSORS) and (halved := _halved(scratch)):
            scratch.unlink()
            scratch = halved
            sha256 = _sources.check(SourceFile(file.name, 0), scratch)
    except ZImageError:
        scratch.unlink()
        raise
    scratch.replace(final)
    return KeptFile(want.parts[file.name], final.stat().st_size, sha256, came, file.git_sha1)


def _scratch(incoming: Path, file: SourceFile) -> Path:
    """What was begun of it, and of no other file that had its name."""
    digest = (file.sha256 or file.git_sha1)[:_DIGITS]
    return incoming / f"{digest}--{file.name.replace('/', '--')}"


def _halved(path: Path) -> Path | None:
    """None where there is nothing to halve, or no room for both."""
    to = path.with_name(path.name + ".halved")
    try:
        return to if halve(path, to) else None
    except OSError as error:
        to.unlink(missing_ok=True)
        _log.warning("%s stays as large as it came: %s", path.name, error.strerror)
        return None


def _refuse_without_room(folder: Path, files: Sequence[SourceFile]) -> None:
    begun = (_scratch(folder, file) for file in files)
    there = sum(path.stat().st_size for path in begun if path.exists())
    size_bytes = sum(file.size_bytes for file in files)
    free = shutil.disk_usage(folder).free
    if size_bytes - there + _SPARE_BYTES > free:
        raise Overloaded(
            f"{folder.parent}: {size_bytes / 1e9:.1f} GB are to come, and {free / 1e9:.1f} GB are "
            "free; give another folder with --models",
            reason="DISK_FULL",
            fields={"given": str(size_bytes), "allowed": str(free)},
        )


def _read(root: Path, path: Path) -> Kept:
    at = path / _LIST
    try:
        said: dict[str, Any] = json.loads(at.read_bytes())
        files = {name: KeptFile(**file) for name, file in said["files"].items()}
        name = path.relative_to(root).as_posix()
        return Kept(name, path, str(said["origin"]), str(said["revision"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidModel.at(at, f"this list of files cannot be read: {error}") from error


def _write(kept: Kept) -> None:
    files = {name: asdict(file) for name, file in sorted(kept.files.items())}
    said = {"origin": kept.origin, "revision": kept.revision, "files": files}
    write_whole(kept.path / _LIST, json.dumps(said, indent=1).encode())


def _not_found(source: Source, what: str) -> NotFound:
    return NotFound(
        f"{source.name}: {what}", reason="MODEL_NOT_FOUND", fields={"given": source.name}
    )
