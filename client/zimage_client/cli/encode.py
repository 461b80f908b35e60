"""`zimage-client encode`: a prompt in, an embedding file out; or many of them."""

import asyncio
import json
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from zimage_client.cli import output, prompt, stack
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import seconds, wrong
from zimage_core.embeddings import like
from zimage_core.errors import DeadlineTooShort
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile
from zimage_core.settings import ClientSettings

_PATIENCE_SECONDS = 30.0


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to encode")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="encode what to lead away from into the same file"
    )
    prompt.add_flags(parser)
    batch = parser.add_argument_group("many prompts")
    batch.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="a prompt a line, as a JSON string, or as an object with prompt, name and the parts "
        "of a prompt; what is there already is not encoded again",
    )
    batch.add_argument(
        "--solo", action="store_true", help="encode each alone: the same bits each time"
    )
    files = parser.add_argument_group("output")
    files.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="required; with --batch a folder"
    )
    files.add_argument(
        "--no-prompt", action="store_true", help="leave the text itself out of the file"
    )
    files.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    files.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="default: 30; of a batch, none"
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """One prompt, or many."""
    # Not left to argparse, because --print-config needs neither.
    if (args.prompt is None) == (args.batch is None):
        raise wrong("PROMPT", "give a PROMPT, or --batch FILE")
    if args.output is None:
        raise wrong("--output", "give the file to write, -o FILE; with --batch a folder")
    if args.batch is None:
        if args.solo:
            terminal.note("--solo has no effect: one PROMPT is always encoded alone")
        await _one(args, settings, terminal)
        return 0
    if args.negative_prompt is not None:
        raise wrong("--negative-prompt", "--negative-prompt is for one PROMPT, not for --batch")
    from zimage_client.cli import encode_batch  # pydantic takes its time

    try:
        async with asyncio.timeout(args.timeout):
            return await encode_batch.run(args, settings, terminal)
    except TimeoutError:
        said = f"not all were encoded in {args.timeout:g} s; the same command goes on from here"
        raise DeadlineTooShort(said) from None


async def _one(args: Namespace, settings: ClientSettings, terminal: Terminal) -> None:
    """Checks the output first, then encodes."""
    output.check(args.output, overwrite=args.overwrite)
    given = [prompt.prompt(args)]
    if args.negative_prompt is not None:
        given.append(prompt.checked(like(args.negative_prompt, given[0])))
    async with stack.for_prompts(settings, terminal) as client:
        terminal.live("encoding")
        began = time.monotonic()
        embedding, *negative = await client.encode(
            given, packing="solo", timeout=args.timeout or _PATIENCE_SECONDS
        )
        took = time.monotonic() - began
    content = EmbeddingFile(embedding, given[0])
    if negative:
        content = replace(content, negative=negative[0], negative_prompt=given[1])
    if args.no_prompt:
        content = replace(content, prompt=None, negative_prompt=None)
    embedding_file.write(args.output, content)
    rows, width = embedding.tensor.shape
    if args.json:
        line = {
            "path": str(args.output),
            "token_count": embedding.token_count,
            "row_count": rows,
            "long_prompt_mode": embedding.recipe.long_prompt_mode,
            "width": width,
            "element_type": embedding.tensor.element_type,
            "identity": embedding.identity,
            "sha256": embedding.tensor.sha256,
            "seconds": round(took, 3),
        }
        terminal.result(json.dumps(line))
    else:
        count = f"{embedding.token_count} tokens"
        if rows < embedding.token_count:
            count += f", {rows} rows ({embedding.recipe.long_prompt_mode})"
        terminal.result(f"{args.output}  {count}  {took:.1f} s")
