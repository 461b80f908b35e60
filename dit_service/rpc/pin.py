"""Which embeddings this model takes: those of the encoder that it belongs to, and by the settings
those of others that were measured to be near."""

import logging
from dataclasses import dataclass, replace

from dit_service import messages
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Embedding
from zimage_core.errors import InvalidRequest, NotReady
from zimage_core.formats import drift_file
from zimage_core.settings import DitSettings
from zimage_core.wire import embeddings
from zimage_core.wire.tensors import digest
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedEmbedding:
    """An embedding that the model can take."""

    embedding: Embedding
    identity_verified: bool
    """Whether its encoder is surely the right one."""
    digest: types_pb2.Digest
    """The name of its elements."""
    worst_cosine: float = 0.0
    """How near its encoder was measured to be to the right one; 0 for nobody knows, or need to."""

    @property
    def is_hollow(self) -> bool:
        """Whether its elements are missing still."""
        return len(self.embedding.tensor.data) < self.digest.size_bytes

    def filled(self, data: bytes) -> "CheckedEmbedding":
        """The same with its elements."""
        tensor = replace(self.embedding.tensor, data=data)
        return replace(self, embedding=replace(self.embedding, tensor=tensor))

    def provenance(self) -> dit_pb2.ConditioningProvenance:
        """Where it came from, as Completed tells it."""
        return dit_pb2.ConditioningProvenance(
            embedding_digest=self.digest,
            identity=types_pb2.EncoderIdentity(sha256=self.embedding.identity),
            recipe=embeddings.recipe_to_wire(self.embedding.recipe),
            numerics=embeddings.numerics_to_wire(self.embedding.numerics),
            token_count=self.embedding.token_count,
            identity_verified=self.identity_verified,
            worst_cosine=self.worst_cosine,
        )


class EncoderPin:
    """The encoder beside the model, else the one in the settings, else any, which is warned of."""

    def __init__(self, settings: DitSettings) -> None:
        self._settings = settings
        self._drifts = drift_file.read(settings.encoder_drifts) if settings.encoder_drifts else []
        self._warned: set[str] = set()
        """Of these encoders."""

    def usual(self, model: messages.Model) -> str:
        """The identity insisted on at the usual hidden layer; empty when there is none."""
        return self._at(DEFAULT_HIDDEN_LAYER, model)

    def check(
        self,
        embedding: Embedding,
        model: messages.Model,
        field: str,
        named: types_pb2.Digest | None = None,
    ) -> CheckedEmbedding:
        """Raises InvalidRequest for what no model of this kind takes, NotReady for a stranger's.
        Of an embedding whose elements are missing still, the name is given."""
        tokens, width = embedding.tensor.shape
        if width != model.caption_width:
            raise _mismatch(field, "width", width, f"{model.caption_width} for this model")
        if not 1 <= tokens <= model.max_token_count:
            allowed = f"1 to {model.max_token_count} for this model"
            raise _mismatch(field, "token count", tokens, allowed)
        layer = embedding.recipe.hidden_layer
        known = model.encoder_identities
        if known and layer not in known:
            allowed = f"{min(known)} to {max(known)} for its encoder"
            raise _mismatch(field, "hidden layer", layer, allowed)
        pinned = self._at(layer, model)
        is_own = bool(pinned) and embedding.identity == pinned
        cosine = self._measured(embedding, pinned, field) if pinned else 0.0
        if not pinned:
            self._warn_once(
                "",
                "no encoder is pinned: embeddings of any encoder of the right width are taken; "
                f"set encoder_identity to insist on one (this one is {_name(embedding)})",
            )
        elif not is_own:
            self._warn_once(
                embedding.identity,
                f"embeddings of encoder {_name(embedding)} are taken for those of {pinned}: "
                f"cosine {cosine:.5f} at the worst, as encoder_drifts has it",
            )
        return CheckedEmbedding(embedding, is_own, digest(embedding.tensor, named), cosine)

    def _measured(self, embedding: Embedding, pinned: str, field: str) -> float:
        """How near the encoder is to the one that is pinned, 0 where nobody measured that one
        itself. Raises NotReady for a stranger, and for one that is too far."""
        given = embedding.identity
        asked = (pinned, given, embedding.numerics)
        known = [
            drift.worst_cosine
            for drift in self._drifts
            if (drift.pinned, drift.identity, drift.numerics) == asked
        ]
        if not known and given != pinned:
            raise NotReady(
                f"{field}: the embedding comes from encoder {_name(embedding)} at hidden layer "
                f"{embedding.recipe.hidden_layer}; this model belongs to {pinned}",
                reason="ENCODER_MISMATCH",
                fields={"field": field, "given": given, "allowed": pinned},
            )
        cosine, limit = min(known, default=0.0), self._settings.encoder_drift_limit
        if known and cosine < limit:
            raise NotReady(
                f"{field}: encoder {_name(embedding)} ({embedding.numerics}) is too far from "
                f"{pinned}: cosine {cosine:.5f} at the worst, {limit} are asked for "
                "(encoder_drift_limit)",
                reason="ENCODER_DRIFT",
                fields={"field": field, "given": given, "allowed": pinned},
            )
        return cosine

    def _at(self, hidden_layer: int, model: messages.Model) -> str:
        if model.encoder_identities:
            return model.encoder_identities.get(hidden_layer, "")
        return self._settings.encoder_identity

    def _warn_once(self, encoder: str, said: str) -> None:
        if encoder not in self._warned:
            self._warned.add(encoder)
            _log.warning("%s", said)


def _name(embedding: Embedding) -> str:
    return embedding.identity or "(unnamed)"


def _mismatch(field: str, what: str, given: int, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: the embedding's {what} is {given}; allowed is {allowed}",
        reason="EMBEDDING_MISMATCH",
        fields={"field": field, "given": str(given), "allowed": allowed},
    )
