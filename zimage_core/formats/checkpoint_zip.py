"""Checkpoints as one file: a ZIP with the member names of mflux's trainer, which may carry the
count of steps before them, as its own do.

adapter.safetensors is what was learnt, an adapter or, in mode full, the transformer;
optimizer.safetensors all that training goes on from, of which further parts have a number;
config.json the job; iterator.json how far it was; loss.json what it lost; dataset.jsonl what it
learns from, by digests; checkpoint.json names all of them.
"""

import errno
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_core.errors import InvalidRequest

WEIGHTS, DATASET = "adapter.safetensors", "dataset.jsonl"
_CONFIG, _ITERATOR, _LOSS = "config.json", "iterator.json", "loss.json"
_CONTENTS = "checkpoint.json"
_STATE = re.compile(r"optimizer(\.\d+)?\.safetensors")
_NUMBER = re.compile(r"\d+_")
_BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises for what is no archive, torn, encrypted or packed in unknown ways."""
_LARGEST_TEXT_BYTES = 64 << 20
_LARGEST_RATIO = 20
"""Of a member to what it takes in the archive: numbers hardly shrink at all."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a checkpoint says beside its files."""

    step: int
    config: Mapping[str, Any]
    """The job, by the names of its fields."""
    losses: Mapping[int, float] = field(default_factory=dict)
    """By their steps; for people, and not read again."""
    files: tuple[str, ...] = ()
    """Those that were read beside it."""


def write(path: Path, told: Told, files: Mapping[str, Path]) -> None:
    """An archive of these members; complete or not at all."""
    names = (*files, _CONFIG, _ITERATOR, _LOSS)
    mode = "full" if told.config["training"].get("full") else "lora"
    scratch = path.with_name(f".{path.name}.part")
    texts = {
        _CONFIG: told.config,
        _ITERATOR: {"num_iterations": told.step, "seed": told.config["training"].get("seed", 0)},
        _LOSS: {"steps": list(told.losses), "losses": list(told.losses.values())},
        _CONTENTS: {
            "metadata": {"format": "zimage", "step": told.step, "mode": mode},
            "files": {name.rpartition(".")[0]: name for name in names},
        },
    }
    try:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, file in files.items():
                archive.write(file, name)
            for name, values in texts.items():
                archive.writestr(name, json.dumps(values, indent=2))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read(path: Path, folder: Path) -> Told:
    """What it says; its files are in the folder then, by their names. Raises InvalidRequest for
    what is no such archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {_NUMBER.sub("", one.filename, count=1): one for one in archive.infolist()}
            for name in (WEIGHTS, state_name(0), DATASET, _CONFIG, _ITERATOR):
                if name not in members:
                    raise _refusal(path, f"it has no {name}")
            files = [name for name in members if _is_file(name)]
            for number in range(sum(_STATE.fullmatch(name) is not None for name in files)):
                if state_name(number) not in files:
                    raise _refusal(path, f"it has no {state_name(number)}, but more of the kind")
            for name, member in members.items():
                _check(path, name, member)
            for name in files:
                with archive.open(members[name]) as there, (folder / name).open("wb") as here:
                    shutil.copyfileobj(there, here)
            config = _object(path, archive, members[_CONFIG])
            iterator = _object(path, archive, members[_ITERATOR])
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # of the folder
        raise _refusal(path, str(error)) from None
    step = iterator.get("num_iterations")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise _refusal(path, f"its {_ITERATOR} has no num_iterations")
    return Told(step, config, files=tuple(files))


def state_name(part: int) -> str:
    """The name of a part of a state."""
    return f"optimizer{f'.{part}' if part else ''}.safetensors"


def _is_file(name: str) -> bool:
    return name in (WEIGHTS, DATASET) or _STATE.fullmatch(name) is not None


def _check(path: Path, name: str, member: zipfile.ZipInfo) -> None:
    if not _is_file(name) and member.file_size > _LARGEST_TEXT_BYTES:
        raise _refusal(path, f"its {name[:100]} has {member.file_size} bytes")
    if member.file_size > _LARGEST_RATIO * max(member.compress_size, 1 << 16):
        raise _refusal(path, f"its {name[:100]} is packed too well to be true")


def _object(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, Any]:
    try:
        values = json.loads(archive.read(member))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise _refusal(path, f"its {member.filename} is no JSON object")
    return values


def _refusal(path: Path, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{path}: no checkpoint that can be gone on from: {what}",
        reason="CHECKPOINT_FILE",
        fields={"given": str(path)},
    )
