"""Pictures and captions of a folder, looked at before anything is sent."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zimage_core.errors import InvalidRequest
from zimage_core.formats.dataset_file import Example
from zimage_core.pictures import files

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMED = 5
_LONGEST_SIDE_PX = 1 << 16


@dataclass(slots=True)
class Dataset:
    """What was found."""

    examples: list[Example] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    """The pictures' files by their digests."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """The files that cannot be learnt from, by what is wrong with them."""

    @property
    def duplicate_count(self) -> int:
        """How many pictures are there more than once."""
        counts = Counter(one.sha256 for one in self.examples)
        return sum(count - 1 for count in counts.values())

    def check(self) -> None:
        """Raises InvalidRequest for what cannot be learnt from: nothing is left out in silence."""
        if self.faults:
            said = "; ".join(_said(what, names) for what, names in self.faults.items())
            raise InvalidRequest(f"the dataset is not whole: {said}", reason="DATASET")
        if not self.examples:
            raise InvalidRequest(
                f"there are no pictures ({', '.join(_SUFFIXES)})", reason="DATASET"
            )


def folder(path: Path, least_side_px: int) -> Dataset:
    """The pictures below a folder, each with a text file of the same name beside it."""
    found = Dataset()
    if not path.is_dir():
        raise InvalidRequest(
            f"{path}: there is no such folder", reason="FILE", fields={"given": str(path)}
        )
    for picture in _pictures(path):
        name = picture.relative_to(path).as_posix()
        try:
            example = _example(picture, name, least_side_px)
        except (InvalidRequest, OSError, UnicodeDecodeError) as error:
            what = error.message if isinstance(error, InvalidRequest) else str(error)
            found.faults.setdefault(what.removeprefix(f"{name}: "), []).append(name)
            continue
        found.examples.append(example)
        found.paths[example.sha256] = picture
    return found


def _pictures(path: Path) -> Iterator[Path]:
    every = sorted(path.rglob("*"), key=lambda one: one.relative_to(path).as_posix())
    return (one for one in every if one.suffix.lower() in _SUFFIXES and one.is_file())


def _example(picture: Path, name: str, least_side_px: int) -> Example:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise InvalidRequest("no text file beside it")
    caption = text.read_text(encoding="utf-8-sig").strip()
    data = picture.read_bytes()
    (width, height), _ = files.decode_for_model(data, name, _LONGEST_SIDE_PX)
    if min(width, height) < least_side_px:
        raise InvalidRequest(f"a side of less than {least_side_px} pixels")
    sha256 = hashlib.sha256(data).hexdigest()
    return Example(sha256, len(data), width, height, name, caption)


def _said(what: str, names: list[str]) -> str:
    few = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {few}{more}"
