"""The flags that say how a text becomes a prompt."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from zimage_client._conditioning import prompt_message
from zimage_client.cli.usage import wrong
from zimage_core.embeddings import LONG_PROMPT_MODES, Blend, Prompt

_PARTS = {
    "system_prompt": "system",
    "thinking_content": "thinking",
    "assistant_content": "assistant",
    "force_think_block": "force_think_block",
    "strip_quotes": "strip_quotes",
    "hidden_layer": "hidden_layer",
    "blend": "blend",
    "token_limit": "token_limit",
    "long_prompt_mode": "long_prompt_mode",
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
    group.add_argument(
        "--blend",
        type=_blend,
        metavar="N:WEIGHT,...",
        help="states to add up in its place, such as --blend=-2:0.7,-9:0.3",
    )
    group.add_argument(
        "--token-limit", type=int, metavar="N", help="longest text in tokens, the chat included"
    )
    group.add_argument(
        "--long-prompt-mode",
        choices=LONG_PROMPT_MODES,
        help="what becomes of more tokens than the DiT takes (default: interpolate); truncate with "
        "--token-limit 512 is what diffusers does",
    )


def given_flags(args: Namespace) -> list[str]:
    """The flags among them that were given."""
    given = (name for name in _PARTS if getattr(args, name) is not None)
    return ["--" + name.replace("_", "-") for name in given]


def prompt(args: Namespace) -> Prompt:
    """The prompt that the command line describes."""
    if args.blend and args.hidden_layer is not None:
        raise wrong("--hidden-layer", "--blend takes the place of --hidden-layer; give one of them")
    values = {part: getattr(args, name) for name, part in _PARTS.items()}
    given = {part: value for part, value in values.items() if value is not None}
    try:
        return checked(Prompt(args.prompt, **given))
    except ValueError as error:
        raise wrong("--blend", f"--{error}") from None


def _blend(text: str) -> Blend:
    pairs = [part.split(":") for part in text.split(",")]
    try:
        return tuple((int(layer), float(weight)) for layer, weight in pairs)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} given, N:WEIGHT,N:WEIGHT allowed") from None


def checked(given: Prompt) -> Prompt:
    """The same; raises InvalidRequest when it cannot be sent, before any service is started."""
    prompt_message(given)
    return given
