"""The flags that say how a text becomes a prompt."""

from argparse import ArgumentParser, Namespace

from zimage_client._conditioning import prompt_message
from zimage_core.embeddings import Prompt

_PARTS = {
    "system_prompt": "system",
    "thinking_content": "thinking",
    "assistant_content": "assistant",
    "force_think_block": "force_think_block",
    "strip_quotes": "strip_quotes",
    "hidden_layer": "hidden_layer",
}


def add_flags(parser: ArgumentParser) -> None:
    """One flag for each part of the chat format."""
    group = parser.add_argument_group("parts of the prompt")
    group.add_argument("--system-prompt", metavar="TEXT", help="system message")
    group.add_argument("--thinking-content", metavar="TEXT", help="content of the think block")
    group.add_argument("--assistant-content", metavar="TEXT", help="beginning of the answer")
    group.add_argument(
        "--force-think-block",
        action="store_true",
        default=None,
        help="put a think block even when it is empty",
    )
    group.add_argument(
        "--strip-quotes",
        action="store_true",
        default=None,
        help="delete double quotes: quoted words are drawn",
    )
    group.add_argument(
        "--hidden-layer", type=int, metavar="N", help="state to take, from the end (default -2)"
    )


def given_flags(args: Namespace) -> list[str]:
    """The flags among them that were given."""
    given = (name for name in _PARTS if getattr(args, name) is not None)
    return ["--" + name.replace("_", "-") for name in given]


def prompt(args: Namespace) -> Prompt:
    """The prompt that the command line describes."""
    values = {part: getattr(args, name) for name, part in _PARTS.items()}
    return checked(
        Prompt(args.prompt, **{part: value for part, value in values.items() if value is not None})
    )


def checked(given: Prompt) -> Prompt:
    """The same; raises InvalidRequest when it cannot be sent, before any service is started."""
    prompt_message(given)
    return given
