"""Pictures and captions, looked at before anything is sent."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from zimage_core.errors import InvalidRequest
from zimage_core.formats.dataset_file import Example
from zimage_core.pictures import files

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMED = 5
_LINES = "metadata.jsonl"
_CAPTION_KEYS = ("text", "caption", "prompt")
"""Of a line of it, the first that is there."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where pictures come from, and how they are learnt from."""

    folder: Path
    """That of the pictures, to which their names are relative."""
    pictures: tuple[tuple[str, str], ...] | None = None
    """Names and captions; without, all that lies below the folder, captions beside."""
    caption: str | None = None
    """Of those that have none of their own."""
    masks: Path | None = None
    """A folder of pictures of the same names, whose bright parts are what is learnt."""
    trigger: str = ""
    """Put before every caption."""
    repeats: int = 1
    weight: float = 1.0
    flips: bool = False


@dataclass(slots=True)
class Dataset:
    """What was found."""

    examples: list[Example] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    """The files by their digests."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Those that cannot be learnt from, by what is wrong with them."""

    @property
    def again(self) -> list[str]:
        """The pictures that are there under another name, too, but for the first."""
        named: defaultdict[str, set[str]] = defaultdict(set)
        for one in self.examples:
            named[one.sha256].add(one.name)
        return [name for names in named.values() for name in sorted(names)[1:]]

    def check(self, *, skips_faulty: bool) -> None:
        """Raises InvalidRequest for what cannot be learnt from, unless the rest is enough."""
        if self.faults and not skips_faulty:
            raise InvalidRequest(
                f"the dataset is not whole: {self.faults_said}; --skip-faulty leaves them out",
                reason="DATASET",
            )
        if not self.examples:
            said = f": {self.faults_said}" if self.faults else f" ({', '.join(_SUFFIXES)})"
            raise InvalidRequest(f"there are no pictures to learn from{said}", reason="DATASET")

    @property
    def faults_said(self) -> str:
        """What is wrong, with counts and names."""
        return "; ".join(
            f"{len(names)} {what}: {some(names)}" for what, names in self.faults.items()
        )


def gather(sources: Iterable[Source], least_side_px: int) -> Dataset:
    """All pictures of all sources, in an order that is always the same."""
    found = Dataset()
    with ThreadPoolExecutor() as threads:
        for source in sources:
            named = list(_named(source, found))
            looked = [threads.submit(_look, source, *one, least_side_px) for one in named]
            for (name, _), look in zip(named, looked, strict=True):
                try:
                    example, paths = look.result()
                except (InvalidRequest, OSError, UnicodeDecodeError) as error:
                    found.faults.setdefault(_what(error, name), []).append(name)
                    continue
                found.examples.append(example)
                found.paths |= paths
    return found


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _named(source: Source, found: Dataset) -> Iterator[tuple[str, str | None]]:
    """The names of pictures, with the captions that are not beside them."""
    if not source.folder.is_dir():
        raise InvalidRequest(
            f"{source.folder}: there is no such folder",
            reason="FILE",
            fields={"given": str(source.folder)},
        )
    if source.pictures is not None:
        yield from source.pictures
        return
    below = (one.relative_to(source.folder) for one in source.folder.rglob("*") if one.is_file())
    names = sorted(one.as_posix() for one in below if one.suffix.lower() in _SUFFIXES)
    if source.masks and source.masks.is_relative_to(source.folder):
        inside = source.masks.relative_to(source.folder).as_posix() + "/"
        names = [name for name in names if not name.startswith(inside)]
    lines = source.folder / _LINES
    if not lines.is_file():
        yield from ((name, None) for name in names)
        return
    captions = _captions(lines)
    left = sorted(set(names) - {name for name, _ in captions})
    if source.caption is not None:
        yield from ((name, source.caption) for name in left)
    elif left:
        found.faults.setdefault(f"without a line in {_LINES}", []).extend(left)
    yield from captions


def _captions(lines: Path) -> list[tuple[str, str]]:
    """The names of pictures and their captions, of which one may have several."""
    captions = []
    for number, data in enumerate(lines.read_bytes().split(b"\n"), 1):
        if not data.strip():
            continue
        line = data.decode("utf-8-sig", "replace")
        try:
            values = json.loads(data.decode("utf-8-sig"))
            caption = next(values[key] for key in _CAPTION_KEYS if key in values)
            if not isinstance(caption, str) or not isinstance(values["file_name"], str):
                raise TypeError
            captions.append((values["file_name"], caption))
        except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
            raise InvalidRequest.given(
                f"{lines}, line {number}",
                line[:100],
                f"an object with file_name and one of {', '.join(_CAPTION_KEYS)}",
                "DATASET",
            ) from None
    return captions


def _what(error: InvalidRequest | OSError | UnicodeDecodeError, name: str) -> str:
    if isinstance(error, InvalidRequest):
        return error.message.removeprefix(f"{name}: ")
    if isinstance(error, OSError):
        return f"that cannot be read ({error.strerror})"
    return "with a text that is no UTF-8"


def _look(
    source: Source, name: str, caption: str | None, least_side_px: int
) -> tuple[Example, dict[str, Path]]:
    """A picture as an example, and its files by their digests."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InvalidRequest("outside of their folder")
    picture = source.folder / name
    if caption is None:
        caption = _caption_beside(picture, source.caption)
    data = picture.read_bytes()
    (width, height), _ = files.decode_for_model(data, name, files.LONGEST_SIDE_PX)
    if min(width, height) < least_side_px:
        raise InvalidRequest(f"with a side of less than {least_side_px} pixels")
    sha256 = hashlib.sha256(data).hexdigest()
    paths = {sha256: picture}
    mask_sha256 = ""
    if source.masks:
        mask = _mask_of(source.masks, name)
        mask_sha256 = _checked_mask(mask, (width, height))
        paths[mask_sha256] = mask
    example = Example(
        sha256=sha256,
        size_bytes=len(data),
        width_px=width,
        height_px=height,
        name=name,
        caption=f"{source.trigger} {caption}".strip() if source.trigger else caption,
        mask_sha256=mask_sha256,
        repeats=source.repeats,
        weight=source.weight,
        flips=source.flips,
    )
    return example, paths


def _caption_beside(picture: Path, usual: str | None) -> str:
    text = picture.with_suffix(".txt")
    if text.is_file():
        return text.read_text(encoding="utf-8-sig").strip()
    if usual is None:
        raise InvalidRequest("without a text file beside it")
    return usual


def _mask_of(folder: Path, name: str) -> Path:
    beside = folder / name
    for suffix in (beside.suffix, *_SUFFIXES):
        if (mask := beside.with_suffix(suffix)).is_file():
            return mask
    raise InvalidRequest(f"without a mask in {folder}")


def _checked_mask(mask: Path, size: tuple[int, int]) -> str:
    """Its digest; raises InvalidRequest for one that marks nothing of such a picture."""
    data = mask.read_bytes()
    mask_size, rgb = files.decode_for_model(data, "its mask", files.LONGEST_SIDE_PX)
    if mask_size != size:
        raise InvalidRequest("with a mask of another size")
    if not any(rgb):
        raise InvalidRequest("with a mask that is black")
    return hashlib.sha256(data).hexdigest()
