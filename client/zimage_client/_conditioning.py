"""What pictures are led to and away from: texts, or the embeddings that were made of them."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from zimage_core.embeddings import Embedding, Prompt, like
from zimage_core.errors import InvalidRequest
from zimage_core.wire import embeddings
from zimage_core.wire.limits import INLINE_BYTES
from zimage_rpc.types.v1 import types_pb2

Condition = str | Prompt | Embedding
Prompts = list[str] | list[Prompt] | list[str | Prompt]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """The two sides of guidance."""

    positive: Prompt | Embedding
    negative: Prompt | Embedding | None
    """None leaves it to the server, which takes the empty prompt."""

    @property
    def named(self) -> dict[str, bytes]:
        """What the messages only name, by its digests."""
        sides = (self.positive, self.negative)
        given = [side for side in sides if isinstance(side, Embedding) and _is_large(side)]
        return {side.tensor.sha256: side.tensor.data for side in given}

    async def encoded(
        self,
        guided: bool,
        encode: Callable[[Sequence[Prompt]], Awaitable[Sequence[Embedding]]],
    ) -> "Conditioning":
        """The same as embeddings alone; the negative side is left out where nothing uses it."""
        sides = [self.positive]
        if guided:
            sides.append(self.negative or _prompt("", self.positive))
        prompts = [side for side in sides if isinstance(side, Prompt)]
        fresh = iter(await encode(prompts) if prompts else ())
        positive, *negative = (next(fresh) if isinstance(side, Prompt) else side for side in sides)
        return Conditioning(positive, negative[0] if negative else None)


def conditioning(positive: Condition, negative: Condition | None) -> Conditioning:
    """Bare texts become prompts; a negative one is encoded from the layer of the positive."""
    side = _prompt(positive) if isinstance(positive, str) else _checked(positive)
    if isinstance(negative, str):
        return Conditioning(side, _prompt(negative, side))
    return Conditioning(side, None if negative is None else _checked(negative))


def message(side: Prompt | Embedding) -> types_pb2.Conditioning:
    """The message of one side; it only names the elements of a large embedding."""
    if isinstance(side, Prompt):
        segment = types_pb2.Segment(prompt=prompt_message(side))
    else:
        with _sayable("embedding"):
            named = _is_large(side)
            segment = types_pb2.Segment(embedding=embeddings.embedding_to_wire(side, named=named))
    return types_pb2.Conditioning(segments=[segment])


def prompt_message(prompt: Prompt) -> types_pb2.Prompt:
    """The message of a prompt; raises InvalidRequest for text that UTF-8 cannot say."""
    for part in ("text", "system", "thinking", "assistant"):
        text = getattr(prompt, part)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the prompt's {part} has no UTF-8 form: {text[error.start]!a} at character "
                f"{error.start} is half a character, as bytes read in a wrong encoding are",
                reason="TEXT_ENCODING",
                fields={"field": part, "given": ascii(text[error.start])},
            ) from None
    with _sayable("prompt"):
        return embeddings.prompt_to_wire(prompt)


def _is_large(embedding: Embedding) -> bool:
    return len(embedding.tensor.data) > INLINE_BYTES


@contextmanager
def _sayable(what: str) -> Iterator[None]:
    """Numbers out of range, wrong types and odd texts are told as what they are."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{what}: {error}", reason="OPTION", fields={"field": what}) from None


def _prompt(text: str, other: Prompt | Embedding | None = None) -> Prompt:
    match other:
        case Embedding():
            return like(text, other.recipe)
        case Prompt():
            return like(text, other)
        case None:
            return Prompt(text)


def _checked(side: object) -> Prompt | Embedding:
    if isinstance(side, Prompt | Embedding):
        return side
    raise TypeError(f"a prompt is a str, a Prompt or an Embedding, not {type(side).__name__}")
