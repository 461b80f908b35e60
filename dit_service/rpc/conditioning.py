"""From what a request says to what the model takes: prompts are encoded by the configured encoder,
embeddings are checked."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_service import messages
from dit_service.rpc.pin import CheckedEmbedding, EncoderPin
from zimage_client import AsyncClient
from zimage_core.embeddings import Prompt, like
from zimage_core.errors import (
    Forbidden,
    InvalidRequest,
    InvalidSettings,
    NotReady,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    ZImageError,
)
from zimage_core.settings import DitSettings
from zimage_core.wire import embeddings
from zimage_core.wire.limits import PROMPT_BYTES
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)

_ENCODER_RETRY_SECONDS = 1.0
_LETTERS_PER_TOKEN = 4
_CHAT_TOKENS = 12
_BYTES_PER_VALUE = 4


@dataclass(frozen=True, slots=True)
class Side:
    """The positive or the negative side of a request."""

    field: str
    """Its path in the request."""
    content: Prompt | CheckedEmbedding

    @property
    def empty(self) -> Prompt:
        """The empty prompt, made of the same hidden states."""
        content = self.content
        return like("", content if isinstance(content, Prompt) else content.embedding.recipe)

    @property
    def token_count(self) -> int:
        """Rows of the embedding; a guess, until the text is encoded."""
        if isinstance(self.content, Prompt):
            return len(self.content.text) // _LETTERS_PER_TOKEN + _CHAT_TOKENS
        return self.content.embedding.tensor.shape[0]

    def byte_count(self, width: int) -> int:
        """Of the embedding; a guess, until there is one."""
        if isinstance(self.content, Prompt):
            return self.token_count * width * _BYTES_PER_VALUE
        return self.content.digest.size_bytes


class Conditioner:
    """Knows the encoder service, if there is one, and which embeddings are taken."""

    def __init__(self, settings: DitSettings, encoder: AsyncClient | None) -> None:
        self.pin = EncoderPin(settings)
        self._address = settings.encoder
        self._encoder = encoder

    @property
    def has_encoder(self) -> bool:
        """Whether prompts can be given."""
        return self._encoder is not None

    def read(self, message: types_pb2.Conditioning, field: str, model: messages.Model) -> Side:
        """What the message says, unless it is more or less than one prompt or fit embedding."""
        if len(message.segments) != 1:
            raise InvalidRequest.given(
                f"{field}.segments", len(message.segments), "exactly 1", "SEGMENTS"
            )
        segment = message.segments[0]
        kind = segment.WhichOneof("content")
        field = f"{field}.segments[0].{kind or 'content'}"
        if kind == "prompt":
            self._refuse_prompt(segment.prompt, field)
            return Side(field, embeddings.prompt_from_wire(segment.prompt, field=field))
        if kind == "embedding":
            named = embeddings.named_digest(segment.embedding)
            embedding = embeddings.embedding_from_wire(
                segment.embedding, field=field, may_be_named=True
            )
            return Side(field, self.pin.check(embedding, model, field, named))
        allowed = "a prompt or an embedding"
        raise InvalidRequest.given(field, kind or "nothing", allowed, "SEGMENT_CONTENT")

    async def resolve(
        self,
        sides: Sequence[Side],
        model: messages.Model,
        sent: Mapping[str, bytes],
        *,
        is_solo: bool,
    ) -> list[CheckedEmbedding]:
        """The sides as embeddings; those that are prompts are encoded in one call, alone if
        wanted, those that lack their elements get them from what was sent."""
        texts = [side for side in sides if isinstance(side.content, Prompt)]
        encoded = iter(await self._encode(texts, model, is_solo=is_solo))

        def whole(content: Prompt | CheckedEmbedding) -> CheckedEmbedding:
            if isinstance(content, Prompt):
                return next(encoded)
            return content.filled(sent[content.digest.sha256]) if content.is_hollow else content

        return [whole(side.content) for side in sides]

    async def _encode(
        self, sides: list[Side], model: messages.Model, *, is_solo: bool
    ) -> list[CheckedEmbedding]:
        if not sides:
            return []
        assert self._encoder is not None
        prompts = [side.content for side in sides if isinstance(side.content, Prompt)]
        try:
            # Who waits for an encoder that loads is the client: here it would keep others out.
            encoded = await self._encoder.encode(
                prompts, packing="solo" if is_solo else "shared", timeout=None, retry=False
            )
        except ZImageError as error:
            raise self._retold(error, sides) from error
        try:
            pairs = zip(encoded, sides, strict=True)
            return [self.pin.check(embedding, model, side.field) for embedding, side in pairs]
        except InvalidRequest as error:  # not the caller's fault
            raise NotReady(
                f"the encoder service at {self._address} is not for this model: {error.message}",
                reason="ENCODER_MISMATCH",
                fields=error.fields,
            ) from error

    def _retold(self, error: ZImageError, sides: Sequence[Side]) -> ZImageError:
        """The encoder's error in the words of our own request."""

        def renamed(text: str) -> str:
            return re.sub(r"\bprompts\[(\d+)\]", lambda found: sides[int(found[1])].field, text)

        fields = {name: renamed(value) for name, value in error.fields.items()}
        if isinstance(error, Unavailable):
            return Unavailable(
                f"the encoder service at {self._address} is not available: {error.message}",
                reason=error.reason if error.reason == "LOADING" else "ENCODER_UNAVAILABLE",
                fields={**fields, "encoder": self._address},
                retry_after=error.retry_after or _ENCODER_RETRY_SECONDS,
            )
        own = Unauthenticated | Forbidden | InvalidSettings | Unimplemented
        if isinstance(error, own) or error.reason == "QUOTA_SPENT":
            # What is wrong with this service's own settings, no user of it can mend.
            _log.error("the encoder at %s cannot be used: %s", self._address, error.message)
            # Nor is it theirs to know where this machine keeps its files.
            why = "" if isinstance(error, InvalidSettings) else f": {error.message}"
            return NotReady(
                f"the encoder service at {self._address} refuses this DiT service{why}",
                reason="ENCODER_REFUSES",
                fields={"encoder": self._address, "cause": error.reason},
            )
        return type(error)(
            renamed(error.message),
            reason=error.reason,
            fields=fields,
            retry_after=error.retry_after,
        )

    def _refuse_prompt(self, prompt: types_pb2.Prompt, field: str) -> None:
        if self._encoder is None:
            raise NotReady(
                f"{field}: this DiT service has no encoder; start it with --encoder ADDRESS, or "
                "encode at the client's side and send embeddings: the positive one, and the "
                "negative one unless guidance is 0",
                reason="NO_ENCODER",
                fields={"field": field},
            )
        if prompt.ByteSize() > PROMPT_BYTES:
            raise InvalidRequest.given(
                field, f"{prompt.ByteSize()} bytes", f"{PROMPT_BYTES}", "PROMPT_BYTES"
            )
