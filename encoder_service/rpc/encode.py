"""Prompts in, embeddings out: what the encoder service answers."""

import asyncio
import hashlib
import itertools
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

import grpc.aio

from encoder_service import messages
from encoder_service.prompt import TokenIds, Tokenizer, check_hidden_layers
from zimage_core.embeddings import (
    CHAT_FORMAT,
    DEFAULT_HIDDEN_LAYER,
    Embedding,
    Numerics,
    Prompt,
    Recipe,
)
from zimage_core.errors import InvalidRequest, Unavailable, ZImageError
from zimage_core.planning.durations import Durations
from zimage_core.serving import access, metrics
from zimage_core.serving.admission import Admission, Cost, Limits
from zimage_core.serving.batches import batched
from zimage_core.serving.worker import Worker
from zimage_core.tensors import TensorData, byte_count
from zimage_core.wire import embeddings, features, status
from zimage_core.wire.limits import ENVELOPE_BYTES, MESSAGE_BYTES, PROMPTS_PER_ENCODE
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

_Context = grpc.aio.ServicerContext[Any, Any]


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """Checks and tokenizes in this process, encodes in the worker's."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, token_limit: int, limits: Limits
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._token_limit = token_limit
        self._admission = Admission(limits)
        self._encoding = Durations()

    async def Encode(  # noqa: N802 - as the proto names it
        self, request: encoder_pb2.EncodeRequest, context: _Context
    ) -> encoder_pb2.EncodeResponse:
        """All prompts or none, in one batch of the worker."""
        if not 1 <= len(request.prompts) <= PROMPTS_PER_ENCODE:
            raise _wrong_prompt_count(len(request.prompts))
        with self._admission.place() as place:
            encoder = self._worker.loaded(messages.Encoder)
            prompts = [embeddings.prompt_from_wire(prompt) for prompt in request.prompts]
            call = await self._read(prompts, encoder)
            _refuse_large_reply(call.token_ids, encoder)
            place.expect(self._cost(call, encoder), context.time_remaining())
            encoded = await self._run(call, encoder)
        return encoder_pb2.EncodeResponse(embeddings=encoded)

    async def EncodeStream(  # noqa: N802
        self, request_iterator: AsyncIterator[encoder_pb2.EncodeStreamRequest], context: _Context
    ) -> AsyncIterator[encoder_pb2.EncodeStreamResponse]:
        """Each item succeeds or fails alone; those that came meanwhile are one batch."""
        self._worker.loaded(messages.Encoder)
        async with aclosing(batched(request_iterator, PROMPTS_PER_ENCODE)) as batches:
            async for items in batches:
                access.refuse_spent()
                async with self._admission.turn(sum(item.ByteSize() for item in items)) as place:
                    answers = await self._answers(items)
                    place.answered(sum(answer.ByteSize() for answer in answers))
                    for answer in answers:
                        yield answer

    async def Describe(  # noqa: N802
        self, request: encoder_pb2.DescribeRequest, context: _Context
    ) -> encoder_pb2.DescribeResponse:
        """Answers at any time; while the model loads, without what only the worker knows."""
        answer = encoder_pb2.DescribeResponse(
            version=version("zimage-grpc"),
            max_prompt_count=PROMPTS_PER_ENCODE,
            worker=self._worker.state,
            features=features.ENCODER,
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

    async def _answers(
        self, items: Sequence[encoder_pb2.EncodeStreamRequest]
    ) -> list[encoder_pb2.EncodeStreamResponse]:
        """One batch if none of them fails; else each for itself, so that its failure is its own."""
        encoder = self._worker.loaded(messages.Encoder)
        answer = encoder_pb2.EncodeStreamResponse
        try:
            prompts = [embeddings.prompt_from_wire(item.prompt) for item in items]
            call = await self._read(prompts, encoder)
            if (fitting := _fitting(call.token_ids, encoder)) < len(items):  # so they travel
                cut = max(1, fitting)
                if cut < len(items):
                    return [*await self._answers(items[:cut]), *await self._answers(items[cut:])]
            encoded = await self._run(call, encoder)
        except Unavailable:
            raise  # not theirs: the whole stream is sent again
        except ZImageError as error:
            if len(items) == 1:
                return [answer(item_id=items[0].item_id, failure=_of_one(error))]
            return [one for item in items for one in await self._answers([item])]
        return [
            answer(item_id=item.item_id, embedding=embedding)
            for item, embedding in zip(items, encoded, strict=True)
        ]

    async def _read(self, prompts: Sequence[Prompt], encoder: messages.Encoder) -> messages.Encode:
        """The prompts as token ids; raises InvalidRequest for one that cannot be encoded."""
        check_hidden_layers(prompts, encoder.layer_count, encoder.max_hidden_layer)
        token_ids = await asyncio.to_thread(self._tokenizer.encode, prompts, self._token_limit)
        return messages.Encode(token_ids, tuple(prompt.effective_layer for prompt in prompts))

    async def _run(
        self, call: messages.Encode, encoder: messages.Encoder
    ) -> list[types_pb2.PromptEmbedding]:
        tokens = sum(map(len, call.token_ids))
        try:
            [encoded] = [event async for event in self._worker.call(call)]
        except asyncio.CancelledError:
            access.charge(self._encoding.expected(tokens, tokens) or 0.0)
            raise
        assert isinstance(encoded, messages.Encoded)
        access.charge(encoded.seconds)
        self._encoding.learn(tokens, tokens, encoded.seconds)
        metrics.ENCODER_PROMPTS.inc(len(call.token_ids))
        metrics.ENCODER_TOKENS.inc(tokens)
        metrics.ENCODER_BATCH_PROMPTS.observe(len(call.token_ids))
        every = zip(call.token_ids, call.hidden_layers, encoded.embeddings, strict=True)
        return [self._embedding(encoder, ids, layer, tensor) for ids, layer, tensor in every]

    def _cost(self, call: messages.Encode, encoder: messages.Encoder) -> Cost:
        tokens = sum(map(len, call.token_ids))
        return Cost(
            seconds=self._encoding.expected(tokens, tokens),
            bytes=sum(_sizes(call.token_ids, encoder)),
        )

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


def _of_one(error: ZImageError) -> types_pb2.Failure:
    """The error of a batch of one, in words that fit a single prompt."""
    failure = status.to_failure(error)
    failure.message = failure.message.replace("prompts[0]", "prompt")
    for name, value in error.fields.items():
        failure.fields[name] = value.replace("prompts[0]", "prompt")
    return failure


def _numerics(encoder: messages.Encoder) -> Numerics:
    return Numerics(encoder.compute_type, encoder.weight_type, encoder.engine, encoder.device)


def _sha256(token_ids: TokenIds) -> str:
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).hexdigest()


def _sizes(token_ids: Sequence[TokenIds], encoder: messages.Encoder) -> Iterator[int]:
    for ids in token_ids:
        yield byte_count(encoder.compute_type, (len(ids), encoder.width)) + ENVELOPE_BYTES


def _fitting(token_ids: Sequence[TokenIds], encoder: messages.Encoder) -> int:
    """How many of these prompts' embeddings go into one message, from the first on."""
    totals = itertools.accumulate(_sizes(token_ids, encoder))
    return sum(total <= MESSAGE_BYTES for total in totals)


def _refuse_large_reply(token_ids: Sequence[TokenIds], encoder: messages.Encoder) -> None:
    """An answer that cannot be sent is known before the work."""
    fitting = _fitting(token_ids, encoder)
    if fitting == len(token_ids):
        return
    total = sum(_sizes(token_ids, encoder))
    raise InvalidRequest(
        f"prompts: the embeddings of these {len(token_ids)} prompts are {total} bytes, "
        f"{MESSAGE_BYTES} fit into one answer; the first {fitting} prompts would, "
        "send the others in calls of their own",
        reason="REPLY_TOO_LARGE",
        fields={
            "field": "prompts",
            "given": str(total),
            "allowed": str(MESSAGE_BYTES),
            "fitting_prompt_count": str(fitting),
        },
    )


def _wrong_prompt_count(count: int) -> InvalidRequest:
    return InvalidRequest(
        f"prompts: {count} given, 1 to {PROMPTS_PER_ENCODE} allowed; send more in further calls",
        reason="PROMPT_COUNT",
        fields={"field": "prompts", "given": str(count), "allowed": f"1 to {PROMPTS_PER_ENCODE}"},
    )
