"""What pictures are led to and away from, as the command line says it."""

from argparse import Namespace
from pathlib import Path

from zimage_client import Embedding, Prompt, Receipt
from zimage_client._conditioning import message
from zimage_client.cli import prompt
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.formats import embedding as embedding_file


def positive(args: Namespace, terminal: Terminal, receipt: Receipt | None) -> Prompt | Embedding:
    """The prompt or the embedding given, else that of the receipt."""
    if (args.prompt is None) == (args.embedding is None) and (args.prompt or receipt is None):
        raise wrong("PROMPT", "give either a PROMPT or --embedding FILE, or --from PICTURE")
    if args.prompt is not None:
        return prompt.prompt(args)
    if unused := prompt.given_flags(args):
        raise wrong(unused[0], f"{unused[0]} has no effect without a PROMPT")
    if args.embedding is not None:
        return _embedding(args.embedding, terminal)
    assert receipt is not None
    return repeated(receipt.positive, None, "--embedding", terminal)


def negative(
    args: Namespace, terminal: Terminal, receipt: Receipt | None
) -> str | Prompt | Embedding | None:
    """The same for the other side of guidance; None leaves it to the server."""
    if args.negative_embedding is not None:
        return _embedding(args.negative_embedding, terminal)
    if args.negative_prompt is not None:
        return prompt.checked(Prompt(args.negative_prompt)).text  # of the layer of the positive
    if receipt is None or receipt.negative is None or args.guidance == 0:
        return None
    return repeated(receipt.negative, None, "--negative-embedding", terminal)


def repeated(
    side: Prompt | str, file: Path | None, flag: str, terminal: Terminal
) -> Prompt | Embedding:
    """A side of a receipt once more: a prompt, or the embedding in the file if it is that one."""
    if isinstance(side, Prompt):
        return side
    if file is None:
        raise wrong(flag, f"the picture was made with embedding {side}; give its file: {flag} FILE")
    embedding = _embedding(file, terminal)
    if embedding.tensor.sha256 != side:
        raise wrong(flag, f"{file} is another embedding than {side}, with which it was made")
    return embedding


def _embedding(path: Path, terminal: Terminal) -> Embedding:
    content = embedding_file.read(path)
    if content.has_negative:
        terminal.note(f"{path} holds a negative embedding, too; this version does not use it yet")
    message(content.embedding)  # refuses what cannot be sent before any service is started
    return content.embedding
