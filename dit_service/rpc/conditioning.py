"""From what a request says to what the model takes: prompts are encoded by the configured encoder,
embeddings are checked against the one that this model belongs to."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from dit_service import messages
from zimage_client import AsyncClient
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Embedding, Prompt
from zimage_core.errors import InvalidRequest, NotReady, Unavailable
from zimage_core.settings import DitSettings
from zimage_core.wire import embeddings
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)

_ENCODER_RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Conditioning:
    """An embedding that the model can take, and whether its encoder is surely the right one."""

    embedding: Embedding
    identity_verified: bool

    def provenance(self) -> dit_pb2.ConditioningProvenance:
        """Where it came from, as Completed tells it."""
        return dit_pb2.ConditioningProvenance(
            embedding_digest=digest_of(self.embedding),
            identity=types_pb2.EncoderIdentity(sha256=self.embedding.identity),
            recipe=embeddings.recipe_to_wire(self.embedding.recipe),
            numerics=embeddings.numerics_to_wire(self.embedding.numerics),
            token_count=self.embedding.token_count,
            identity_verified=self.identity_verified,
        )


class Conditioner:
    """Knows the encoder service, if there is one, and the encoder that the model belongs to."""

    def __init__(self, settings: DitSettings, encoder: AsyncClient | None) -> None:
        self._settings = settings
        self._encoder = encoder
        self._warned = False

    @property
    def has_encoder(self) -> bool:
        """Whether prompts can be given."""
        return self._encoder is not None

    def read(self, message: types_pb2.Conditioning, field: str) -> Prompt | Embedding:
        """What the message says; raises InvalidRequest unless it is one prompt or one embedding."""
        if len(message.segments) != 1:
            raise InvalidRequest(
                f"{field}.segments: {len(message.segments)} given, this model takes exactly 1",
                reason="SEGMENTS",
                fields={"field": f"{field}.segments", "given": str(len(message.segments))},
            )
        field, segment = f"{field}.segments[0]", message.segments[0]
        match segment.WhichOneof("content"):
            case "prompt":
                return embeddings.prompt_from_wire(segment.prompt)
            case "embedding":
                return embeddings.embedding_from_wire(segment.embedding, field=f"{field}.embedding")
            case other:
                raise InvalidRequest(
                    f"{field}.content: {other or 'nothing'} given, "
                    "allowed is a prompt or an embedding",
                    reason="SEGMENT_CONTENT",
                    fields={"field": f"{field}.content", "given": str(other)},
                )

    async def resolve(
        self, given: Sequence[Prompt | Embedding], model: messages.Model
    ) -> list[Conditioning]:
        """Has the prompts among them encoded, all in one call; checks the rest the same way."""
        prompts = [item for item in given if isinstance(item, Prompt)]
        encoded = iter(await self._encode(prompts))
        whole = [next(encoded) if isinstance(item, Prompt) else item for item in given]
        return [self._checked(embedding, model) for embedding in whole]

    def refuse_prompts(self, given: Sequence[Prompt | Embedding]) -> None:
        """Raises NotReady if there is a prompt and nobody to encode it."""
        if self._encoder is None and any(isinstance(item, Prompt) for item in given):
            raise NotReady(
                "this DiT service has no encoder; start it with --encoder ADDRESS, or encode at "
                "the client's side and send the embedding",
                reason="NO_ENCODER",
            )

    async def _encode(self, prompts: list[Prompt]) -> list[Embedding]:
        if not prompts:
            return []
        assert self._encoder is not None
        try:
            return await self._encoder.encode(prompts)
        except Unavailable as error:
            address = self._settings.encoder
            raise Unavailable(
                f"the encoder service at {address} is not available: {error.message}",
                reason="ENCODER_UNAVAILABLE",
                fields={**error.fields, "encoder": address},
                retry_after=error.retry_after or _ENCODER_RETRY_SECONDS,
            ) from error

    def _checked(self, embedding: Embedding, model: messages.Model) -> Conditioning:
        tokens, width = embedding.tensor.shape
        if width != model.caption_width:
            raise _mismatch("width", width, f"{model.caption_width} for this model")
        if not 1 <= tokens <= model.max_token_count:
            raise _mismatch("token count", tokens, f"1 to {model.max_token_count} for this model")
        pinned = self._pinned(embedding.recipe.hidden_layer, model)
        if pinned and embedding.identity != pinned:
            raise NotReady(
                f"the embedding comes from encoder {embedding.identity or '(unnamed)'} at hidden "
                f"layer {embedding.recipe.hidden_layer}; this model belongs to {pinned}",
                reason="ENCODER_MISMATCH",
                fields={"given": embedding.identity, "allowed": pinned},
            )
        if not pinned and not self._warned:
            self._warned = True
            _log.warning(
                "no encoder is pinned: embeddings of any encoder of width %s are taken; set "
                "encoder_identity to insist on one (this one is %s)",
                model.caption_width,
                embedding.identity or "unnamed",
            )
        return Conditioning(embedding, identity_verified=bool(pinned))

    def _pinned(self, hidden_layer: int, model: messages.Model) -> str:
        """The identity to insist on at a hidden layer: of the files, else of the settings."""
        known = model.encoder_identities
        if known and -len(known) <= hidden_layer <= -1:
            return known[hidden_layer]
        return self._settings.encoder_identity


def digest_of(embedding: Embedding) -> types_pb2.Digest:
    """The embedding's name by content."""
    tensor = embedding.tensor
    return types_pb2.Digest(
        sha256=tensor.sha256,
        size_bytes=len(tensor.data),
        media_type=f"application/x-tensor; type={tensor.element_type}",
    )


def pinned_identity(model: messages.Model, settings: DitSettings) -> str:
    """The identity that Describe tells: the one at the usual hidden layer."""
    if model.encoder_identities:
        return model.encoder_identities[DEFAULT_HIDDEN_LAYER]
    return settings.encoder_identity


def _mismatch(what: str, given: int, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"the embedding's {what} is {given}; allowed is {allowed}",
        reason="EMBEDDING_MISMATCH",
        fields={"field": "embeddings", "given": str(given), "allowed": allowed},
    )
