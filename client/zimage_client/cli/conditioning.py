"""What pictures are led to and away from, as the command line says it."""

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

from zimage_client import Embedding, Prompt, Receipt
from zimage_client._conditioning import message
from zimage_client.cli import prompt
from zimage_client.cli.usage import wrong
from zimage_core.formats import embedding as embedding_file
from zimage_core.formats.embedding import EmbeddingFile


@dataclass(frozen=True, slots=True)
class Sides:
    """The two sides of guidance."""

    positive: Prompt | Embedding
    negative: str | Prompt | Embedding | None
    """None leaves it to the server, which takes the empty prompt."""


def given(args: Namespace, receipt: Receipt | None) -> Sides:
    """What the flags say; what they leave open is as in the file of the embedding, else as in the
    receipt, if there is one."""
    if (args.prompt is None) == (args.embedding is None) and (args.prompt or receipt is None):
        raise wrong("PROMPT", "give either a PROMPT or --embedding FILE, or --from PICTURE")
    unused = prompt.given_flags(args)
    if args.prompt is None and unused:
        raise wrong(unused[0], f"{unused[0]} has no effect without a PROMPT")
    if args.prompt is not None:
        sides = Sides(prompt.prompt(args), None)
    elif args.embedding is not None:
        file = _read(args.embedding)
        sides = Sides(file.embedding, file.negative)
    else:
        assert receipt is not None
        sides = Sides(repeated(receipt.positive, None, "--embedding"), None)
    if args.negative_embedding is not None:
        return replace(sides, negative=_read(args.negative_embedding).embedding)
    if args.negative_prompt is not None:
        text = prompt.checked(Prompt(args.negative_prompt)).text  # of the layer of the positive
        return replace(sides, negative=text)
    if sides.negative or receipt is None or receipt.negative is None or args.guidance == 0:
        return sides
    return replace(sides, negative=repeated(receipt.negative, None, "--negative-embedding"))


def repeated(side: Prompt | str, file: Path | None, flag: str) -> Prompt | Embedding:
    """A side of a receipt once more: a prompt, or the embedding in the file if it is that one."""
    if isinstance(side, Prompt):
        return side
    if file is None:
        raise wrong(flag, f"the picture was made with embedding {side}; give its file: {flag} FILE")
    content = _read(file)
    for embedding in (content.embedding, content.negative):
        if embedding is not None and embedding.tensor.sha256 == side:
            return embedding
    raise wrong(flag, f"{file} is another embedding than {side}, with which it was made")


def _read(path: Path) -> EmbeddingFile:
    """A file's embeddings; refuses what cannot be sent before any service is started."""
    content = embedding_file.read(path)
    for embedding in (content.embedding, content.negative):
        if embedding is not None:
            message(embedding)
    return content
