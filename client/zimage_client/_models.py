"""Models on this machine: of each what its services need, checked as it came and whenever somebody
asks, and halved where it takes twice the room for nothing."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from zimage_client import _sources
from zimage_client._sources import Source, SourceFile
from zimage_core.errors import InvalidModel, NotFound, Overloaded, ZImageError
from zimage_core.files import write_whole
from zimage_core.formats.halving import halve

ENCODER, DIT, SINGLE = "encoder", "dit", "file"
PARTS = (ENCODER, DIT)

_WEIGHTS = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_NAMES = {
    ENCODER: (
        rf"text_encoder/(config\.json|model{_WEIGHTS})",
        r"tokenizer/tokenizer\.json",
    ),
    DIT: (
        rf"(transformer|vae)/(config\.json|diffusion_pytorch_model{_WEIGHTS})",
        r"scheduler/scheduler_config\.json",
        r"model_index\.json",
    ),
}
_PLAIN_ENCODER = (rf"config\.json|model{_WEIGHTS}|tokenizer\.json",)
"""A Qwen3 as it was published, without a picture model around it."""

_LIST = "zimage-model.json"
_INCOMING = ".incoming"
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


@dataclass(frozen=True, slots=True)
class Kept:
    """A model that is here, or some of it."""

    name: str
    path: Path
    revision: str
    files: dict[str, KeptFile] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """What there is of it."""
        return sorted({file.part for file in self.files.values()})

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
    if names or len(known) == 1:
        chosen = dict.fromkeys(names or known, SINGLE)
        if missing := chosen.keys() - known:
            raise _not_found(source, f"no {', '.join(sorted(missing))} in it")
        return Wanted(source, chosen)
    chosen = {}
    for part in parts:
        found = _of_part(part, known)
        if not any(name.endswith(".safetensors") for name in found):
            raise _not_found(source, f"no {part} in it: no weights where a model has them")
        chosen |= dict.fromkeys(found, part)
    return Wanted(source, chosen)


def _is_harmless(name: str) -> bool:
    """A hub may say anything; nothing is written outside of the model's folder, or as its list."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts[0][0] != "."


def _of_part(part: str, known: set[str]) -> list[str]:
    patterns = _NAMES[part]
    if part == ENCODER and not any(name.startswith("text_encoder/") for name in known):
        patterns = _PLAIN_ENCODER
    found = [name for name in known if any(re.fullmatch(one, name) for one in patterns)]
    sharded = {name.split(".safetensors")[0] for name in found if name.endswith(".index.json")}
    # Beside shards and their index, the same weights may lie in one file.
    return [name for name in found if name.removesuffix(".safetensors") not in sharded]


class Models:
    """A folder of them, each in a folder by its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Kept]:
        """By name."""
        lists = sorted(self.folder.glob(f"*/{_LIST}")) + sorted(self.folder.glob(f"*/*/{_LIST}"))
        return [_read(self.folder, path.parent) for path in lists]

    def get(self, name: str) -> Kept:
        """Raises NotFound where there is none of that name."""
        for kept in self.all():
            if kept.name == name:
                return kept
        names = ", ".join(kept.name for kept in self.all()) or "none"
        raise NotFound(
            f"{name}: no such model in {self.folder}; there are {names}",
            reason="MODEL_NOT_FOUND",
            fields={"given": name, "allowed": names},
        )

    def missing(self, want: Wanted) -> list[SourceFile]:
        """What is not here yet. Raises NotFound where other parts of the model are, of another
        revision."""
        kept = self._kept(want.source)
        others = sorted({file.part for file in kept.files.values()} - set(want.parts.values()))
        if others and kept.revision != want.source.revision:
            raise NotFound(
                f"{kept.name}: its {', '.join(others)} is here at {kept.revision}, and this is "
                f"{want.source.revision}; give --revision, or remove it first",
                reason="MODEL_REVISION",
                fields={"given": want.source.revision, "allowed": kept.revision},
            )
        return [file for file in want.files if not _is_here(kept, file, want.source.revision)]

    def add(self, want: Wanted, told: Told) -> Kept:
        """Fetches what is missing, a file at a time; what came is kept if the next one fails.
        Raises Overloaded where the disk has no room for it."""
        missing = self.missing(want)
        kept = replace(self._kept(want.source), revision=want.source.revision)
        incoming = kept.path / _INCOMING
        incoming.mkdir(parents=True, exist_ok=True)
        _refuse_without_room(incoming, sum(file.size_bytes for file in missing))
        for file in missing:
            kept.files[file.name] = _fetched(want, file, kept.path, told)
            _write(kept)
        shutil.rmtree(incoming)
        return kept

    def verify(self, kept: Kept, told: Told) -> list[str]:
        """Reads every file; the names of those that are not what came."""
        torn = []
        for name, file in kept.files.items():
            described = SourceFile(name, file.size_bytes, file.sha256)
            told(described, 0)
            try:
                _sources.check(described, kept.path / name)
            except (InvalidModel, OSError):
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
        return Kept(source.name, path, source.revision)


def _is_here(kept: Kept, file: SourceFile, revision: str) -> bool:
    """By what was noted when it came; the file itself need only be as large."""
    here, path = kept.files.get(file.name), kept.path / file.name
    if here is None or not path.is_file() or path.stat().st_size != here.size_bytes:
        return False
    return here.source_sha256 == file.sha256 if file.sha256 else kept.revision == revision != ""


def _fetched(want: Wanted, file: SourceFile, folder: Path, told: Told) -> KeptFile:
    scratch = folder / _INCOMING / file.name.replace("/", "--")
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
        halved = scratch.with_suffix(".halved")
        if file.name.endswith(".safetensors") and halve(scratch, halved):
            scratch.unlink()
            scratch = halved
            sha256 = _sources.check(SourceFile(file.name, 0), scratch)
    except ZImageError:
        scratch.unlink()
        raise
    scratch.replace(final)
    return KeptFile(want.parts[file.name], final.stat().st_size, sha256, came)


def _refuse_without_room(folder: Path, size_bytes: int) -> None:
    there = sum(path.stat().st_size for path in folder.iterdir())
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
        return Kept(path.relative_to(root).as_posix(), path, str(said["revision"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InvalidModel.at(at, f"this list of files cannot be read: {error}") from error


def _write(kept: Kept) -> None:
    files = {name: asdict(file) for name, file in sorted(kept.files.items())}
    said = {"format": 1, "revision": kept.revision, "files": files}
    write_whole(kept.path / _LIST, json.dumps(said, indent=1).encode())


def _not_found(source: Source, what: str) -> NotFound:
    return NotFound(
        f"{source.name}: {what}", reason="MODEL_NOT_FOUND", fields={"given": source.name}
    )
