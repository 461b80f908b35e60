"""`zimage-client encode --batch`: a file of prompts in, a folder of embedding files out.

The folder's index.jsonl says what became of each line; whoever asks again goes on from there.
"""

import asyncio
import errno
import hashlib
import json
import re
import threading
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zimage_client import AsyncClient
from zimage_client.cli import prompt, stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.embeddings import Embedding, Prompt
from zimage_core.errors import InvalidRequest, ZImageError
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile
from zimage_core.settings import ClientSettings

_DONE, _SOME_FAILED = 0, 1
_INDEX = "index.jsonl"
_NAME = re.compile(r"\w[\w .-]{0,199}", re.ASCII)
_MOST_SHOWN = 10
_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the next line would meet as well."""
_LOADING_SECONDS = 1.0
"""Between two looks at an encoder that loads."""


class _Line(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    name: str = Field("", description="of its file, without the suffix; unset: a digest")
    system: str | None = None
    thinking: str | None = None
    assistant: str | None = None
    force_think_block: bool | None = None
    strip_quotes: bool | None = None
    hidden_layer: int | None = None
    blend: tuple[tuple[int, float], ...] | None = None
    token_limit: int | None = None
    long_prompt_mode: str | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt that is to be encoded."""

    line: int
    prompt: Prompt
    path: Path
    key: str
    """Of all that decides its file."""


@dataclass
class _Batch:
    """What became of the lines so far."""

    folder: Path
    total: int
    terminal: Terminal
    index: TextIOWrapper
    known: dict[Path, str]
    """The keys of the files that an earlier start finished."""
    strangers: set[Path]
    """Files that were in the folder before any batch, which stay."""
    writing: threading.Lock = field(default_factory=threading.Lock)
    """Lines that are wrong are found in another thread."""
    done: int = 0
    failed: int = 0
    sent: int = 0
    open: dict[int, _Asked] = field(default_factory=dict)
    """Those that were sent and are not answered, by their numbers."""

    def enter(self, line: int, **said: object) -> None:
        """What is known at once, and at the next start."""
        with self.writing:
            self.index.write(json.dumps({"line": line, **said}) + "\n")
            self.index.flush()
        self.count()

    def fail(self, line: int, error: ZImageError) -> None:
        """One that failed leaves the others alone."""
        self.failed += 1
        if self.failed <= _MOST_SHOWN:
            self.terminal.note(f"line {line}: {error.message}")
        self.enter(line, error=error.message, reason=error.reason)

    def count(self) -> None:
        """How far it is."""
        failed = f", {self.failed} failed" if self.failed else ""
        self.terminal.live(f"{self.done} of {self.total} encoded{failed}")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """Encodes what is not encoded yet."""
    source, folder = args.batch, args.output
    if not source.is_file():
        raise wrong("--batch", f"{source} is no file")
    if folder.exists() and not folder.is_dir():
        raise wrong("--output", f"{folder} is a file; name a folder")
    base = prompt.prompt(Namespace(**{**vars(args), "prompt": ""}))
    with source.open("rb") as file:
        total = sum(1 for line in file if line.strip())
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / _INDEX).exists() and not args.overwrite
    strangers = set(folder.iterdir()) if is_new else set()
    async with stack.for_prompts(settings, terminal) as client:
        how = f"{await _encoder(client)} {args.solo} {args.no_prompt}"
        known = _known(folder / _INDEX)
        with (folder / _INDEX).open("a", encoding="utf-8") as index:
            if index.tell():
                index.write("\n")  # the last line may be torn
            batch = _Batch(folder, total, terminal, index, known, strangers)
            prompts = _prompts(source, base, how, batch)
            answers = client.encode_stream(prompts, packing="solo" if args.solo else "shared")
            async for number, result in answers:
                await _keep(batch, batch.open.pop(number), result, has_prompt=not args.no_prompt)
    failed = f", {batch.failed} failed" if batch.failed else ""
    said = {"done": batch.done, "failed": batch.failed, "index": str(folder / _INDEX)}
    terminal.result(
        json.dumps(said)
        if args.json
        else f"{folder / _INDEX}  {batch.done} of {batch.total} encoded{failed}"
    )
    return _SOME_FAILED if batch.failed else _DONE


async def _encoder(client: AsyncClient) -> str:
    """Which one it is: files of another are made again."""
    while (model := (await client.describe_encoder()).model) is None:  # noqa: ASYNC110
        await asyncio.sleep(_LOADING_SECONDS)
    return json.dumps([model.identity, asdict(model.numerics), asdict(model.recipe)])


def _known(index: Path) -> dict[Path, str]:
    """The keys of the files that an earlier start finished, by the last that is said of each."""
    known: dict[Path, str] = {}
    try:
        lines = index.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return known
    for line in lines:
        try:
            said = json.loads(line)
            known[index.parent / said["path"]] = said["key"]
        except (ValueError, KeyError, TypeError):  # a failure, or torn by a crash
            continue
    return known


def _prompts(source: Path, base: Prompt, how: str, batch: _Batch) -> Iterator[Prompt]:
    """Those that are to be encoded, in the file's order."""
    names: dict[str, str] = {}
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                asked = _asked(number, raw, base, how, batch.folder)
            except InvalidRequest as error:
                batch.fail(number, error)
                continue
            name = asked.path.name.lower()  # some file systems know no other
            if names.setdefault(name, asked.key) != asked.key:
                batch.fail(
                    number, _invalid(f"name: {asked.path.stem!r} is that of an earlier line")
                )
                continue
            if batch.known.get(asked.path) == asked.key and asked.path.is_file():
                batch.done += 1
                batch.count()
                continue
            if asked.path in batch.strangers:
                what = f"{asked.path} is there, and of no batch; add --overwrite to replace it"
                batch.fail(number, _invalid(what))
                continue
            batch.open[batch.sent] = asked
            batch.sent += 1
            yield asked.prompt


def _asked(number: int, raw: bytes, base: Prompt, how: str, folder: Path) -> _Asked:
    try:
        value = json.loads(raw)
        line = _Line.model_validate_json(raw) if isinstance(value, dict) else _Line(prompt=value)
        given = line.model_dump(exclude={"prompt", "name"}, exclude_none=True)
        if {"blend", "hidden_layer"} <= given.keys():
            raise ValueError("blend takes the place of hidden_layer; give one of them")
        if "hidden_layer" in given:
            base = replace(base, blend=())
        whole = prompt.checked(replace(base, text=line.prompt, **given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise _invalid(f"{where}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _invalid(str(error)) from None
    if line.name and not _NAME.fullmatch(line.name):
        raise _invalid(f"name: {line.name!r} is no plain name of a file")
    said = json.dumps([how, asdict(whole)], sort_keys=True)
    key = hashlib.sha256(said.encode()).hexdigest()
    return _Asked(number, whole, folder / f"{line.name or key[:16]}.safetensors", key)


async def _keep(
    batch: _Batch, asked: _Asked, result: Embedding | ZImageError, *, has_prompt: bool
) -> None:
    if isinstance(result, ZImageError):
        batch.fail(asked.line, result)
        return
    content = EmbeddingFile(result, asked.prompt if has_prompt else None)
    try:
        await asyncio.to_thread(embedding_file.write, asked.path, content)
    except OSError as error:
        if error.errno in _FULL:
            raise
        batch.fail(asked.line, _invalid(f"{asked.path}: {error.strerror}"))
        return
    batch.done += 1
    batch.enter(
        asked.line,
        path=asked.path.name,
        key=asked.key,
        token_count=result.token_count,
        row_count=result.tensor.shape[0],
        mode=result.recipe.long_prompt_mode,
        sha256=result.tensor.sha256,
    )


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(what, reason="BATCH_LINE", fields={"cause": what})
