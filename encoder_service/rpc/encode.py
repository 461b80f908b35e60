"""Prompts in, embeddings out: what the encoder service answers."""

import asyncio
import hashlib
import itertools
import struct
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import grpc.aio

from encoder_service import messages
from encoder_service.prompt import TokenIds, Tokenizer, check_hidden_layers
from zimage_core.embeddings import CHAT_FORMAT, DEFAULT_HIDDEN_LAYER, Embedding, Numerics, Recipe
from zimage_core.errors import DeadlineTooShort, InvalidRequest
from zimage_core.serving.admission import Admission
from zimage_core.serving.worker import Worker
from zimage_core.tensors import TensorData, byte_count
from zimage_core.wire import embeddings
from zimage_core.wire.limits import MESSAGE_BYTES, PROMPTS_PER_ENCODE
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

_ENVELOPE_BYTES = 1024
"""More than everything in an embedding's message but the elements."""

_Context = grpc.aio.ServicerContext[Any, Any]


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """Checks and tokenizes in this process, encodes in the worker's."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, token_limit: int, max_queue_length: int
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._token_limit = token_limit
        self._admission = Admission(max_queue_length)

    async def Encode(  # noqa: N802 - as the proto names it
        self, request: encoder_pb2.EncodeRequest, context: _Context
    ) -> encoder_pb2.EncodeResponse:
        """All prompts or none, in one batch of the worker."""
        if not 1 <= len(request.prompts) <= PROMPTS_PER_ENCODE:
            raise _wrong_prompt_count(len(request.prompts))
        with self._admission.place():
            encoder = self._worker.loaded(messages.Encoder)
            prompts = [embeddings.prompt_from_wire(prompt) for prompt in request.prompts]
            check_hidden_layers(prompts, encoder.layer_count, encoder.max_hidden_layer)
            token_ids = await asyncio.to_thread(self._tokenizer.encode, prompts, self._token_limit)
            _refuse_large_reply(token_ids, encoder)
            _refuse_passed_deadline(context)
            layers = tuple(prompt.effective_layer for prompt in prompts)
            encoded = await self._run(messages.Encode(token_ids, layers))
        return encoder_pb2.EncodeResponse(
            embeddings=[
                self._embedding(encoder, ids, layer, tensor)
                for ids, layer, tensor in zip(token_ids, layers, encoded.embeddings, strict=True)
            ]
        )

    async def Describe(  # noqa: N802
        self, request: encoder_pb2.DescribeRequest, context: _Context
    ) -> encoder_pb2.DescribeResponse:
        """Answers at any time; while the model loads, without what only the worker knows."""
        answer = encoder_pb2.DescribeResponse(
            version=version("zimage-grpc"),
            max_prompt_count=PROMPTS_PER_ENCODE,
            worker=self._worker.state,
        )
        encoder = self._worker.description
        if isinstance(encoder, messages.Encoder):
            answer.ready = True
            layer = min(DEFAULT_HIDDEN_LAYER, encoder.max_hidden_layer)
            answer.identity.sha256 = encoder.identities[layer]
            answer.recipe.CopyFrom(embeddings.recipe_to_wire(self._recipe(layer)))
            answer.numerics.CopyFrom(embeddings.numerics_to_wire(_numerics(encoder)))
            answer.width = encoder.width
            answer.layer_count = encoder.layer_count
            answer.max_hidden_layer = encoder.max_hidden_layer
        return answer

    async def _run(self, call: messages.Encode) -> messages.Encoded:
        [encoded] = [event async for event in self._worker.call(call)]
        assert isinstance(encoded, messages.Encoded)
        return encoded

    def _embedding(
        self, encoder: messages.Encoder, token_ids: TokenIds, layer: int, tensor: TensorData
    ) -> types_pb2.PromptEmbedding:
        return embeddings.embedding_to_wire(
            Embedding(
                tensor=tensor,
                identity=encoder.identities[layer],
                recipe=self._recipe(layer),
                numerics=_numerics(encoder),
                token_count=len(token_ids),
                token_ids_sha256=_sha256(token_ids),
            )
        )

    def _recipe(self, layer: int) -> Recipe:
        return Recipe(CHAT_FORMAT, layer, self._token_limit)


def _numerics(encoder: messages.Encoder) -> Numerics:
    return Numerics(encoder.compute_type, encoder.weight_type, encoder.engine, encoder.device)


def _sha256(token_ids: TokenIds) -> str:
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).hexdigest()


def _refuse_large_reply(token_ids: Sequence[TokenIds], encoder: messages.Encoder) -> None:
    """An answer that cannot be sent is known before the work."""
    sizes = (
        byte_count(encoder.compute_type, (len(ids), encoder.width)) + _ENVELOPE_BYTES
        for ids in token_ids
    )
    totals = list(itertools.accumulate(sizes))
    if totals[-1] <= MESSAGE_BYTES:
        return
    fitting = sum(total <= MESSAGE_BYTES for total in totals)
    raise InvalidRequest(
        f"prompts: the embeddings of these {len(token_ids)} prompts are {totals[-1]} bytes, "
        f"{MESSAGE_BYTES} fit into one answer; the first {fitting} prompts would, "
        "send the others in calls of their own",
        reason="REPLY_TOO_LARGE",
        fields={
            "field": "prompts",
            "given": str(totals[-1]),
            "allowed": str(MESSAGE_BYTES),
            "fitting_prompt_count": str(fitting),
        },
    )


def _refuse_passed_deadline(context: _Context) -> None:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineTooShort("the deadline passed before the prompts' turn came")


def _wrong_prompt_count(count: int) -> InvalidRequest:
    return InvalidRequest(
        f"prompts: {count} given, 1 to {PROMPTS_PER_ENCODE} allowed; send more in further calls",
        reason="PROMPT_COUNT",
        fields={"field": "prompts", "given": str(count), "allowed": f"1 to {PROMPTS_PER_ENCODE}"},
    )
