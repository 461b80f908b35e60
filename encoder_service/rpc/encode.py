"""Prompts in, embeddings out: what the encoder service answers."""

import asyncio
import hashlib
import itertools
import struct
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import grpc.aio

from encoder_service import messages
from encoder_service.cache import Cache, Key
from encoder_service.compression import compressed
from encoder_service.prompt import (
    LengthLimits,
    TokenIds,
    Tokenizer,
    check_hidden_layers,
    is_too_long,
    to_run,
)
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Embedding, Numerics, Prompt, Recipe
from zimage_core.errors import InvalidRequest, Unavailable, ZImageError
from zimage_core.planning.durations import Durations
from zimage_core.serving import access, metrics
from zimage_core.serving.admission import Admission, Cost, Limits, Place
from zimage_core.serving.batches import answers_to, read_ahead
from zimage_core.serving.worker import Worker
from zimage_core.settings import EncoderSettings
from zimage_core.tensors import TensorData, byte_count
from zimage_core.wire import embeddings, features, status
from zimage_core.wire.limits import ENVELOPE_BYTES, MESSAGE_BYTES, PROMPTS_PER_ENCODE
from zimage_rpc.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from zimage_rpc.types.v1 import types_pb2

_READ_AHEAD = 64
"""Edits of a prompt that may have come while one is run."""

T = TypeVar("T")

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt as everything behind the front sees it."""

    key: Key
    recipe: Recipe
    token_count: int
    """Of the whole text."""
    reply_bytes: int
    whole_bytes: int
    """Before a long one is made to fit."""


class EncoderServicer(encoder_pb2_grpc.EncoderServiceServicer):
    """Checks and tokenizes in this process, encodes in the worker's what is not in the cache."""

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, settings: EncoderSettings, row_limit: int
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._limits = LengthLimits(settings.token_limit, row_limit)
        self._cache = Cache(settings.cache_bytes)
        self._admission = Admission(
            Limits(settings.max_queue_length, settings.max_queue_seconds, settings.max_queue_bytes)
        )
        self._encoding = Durations()
        self._callers = itertools.count()

    async def Encode(  # noqa: N802 - as the proto names it
        self, request: encoder_pb2.EncodeRequest, context: _Context
    ) -> encoder_pb2.EncodeResponse:
        """All prompts or none."""
        prompts = _prompts(request)
        with self._admission.place() as place:
            encoder = self._worker.loaded(messages.Encoder)
            asked = await self._read(prompts, _is_solo(request), encoder)
            _refuse_large_reply([one.reply_bytes for one in asked])
            place.expect(self._cost(asked), context.time_remaining())
            caller = next(self._callers)
            encoded = await _all(self._encoded(one, caller, encoder) for one in asked)
        return encoder_pb2.EncodeResponse(embeddings=encoded)

    async def EncodeStream(  # noqa: N802
        self, request_iterator: AsyncIterator[encoder_pb2.EncodeStreamRequest], context: _Context
    ) -> AsyncIterator[encoder_pb2.EncodeStreamResponse]:
        """Each item succeeds or fails alone."""
        self._worker.loaded(messages.Encoder)
        caller = next(self._callers)

        @asynccontextmanager
        async def in_turn(
            item: encoder_pb2.EncodeStreamRequest,
        ) -> AsyncIterator[encoder_pb2.EncodeStreamResponse]:
            access.refuse_spent()
            async with self._admission.turn(item.ByteSize()) as place:
                answer = encoder_pb2.EncodeStreamResponse(item_id=item.item_id)
                with _failing_alone(answer):
                    answer.embedding.CopyFrom(await self._one(item.prompt, _is_solo(item), caller))
                place.answered(answer.ByteSize())
                yield answer

        async with aclosing(answers_to(request_iterator, in_turn, PROMPTS_PER_ENCODE)) as answers:
            async for answer in answers:
                yield answer

    async def EncodeSession(  # noqa: N802
        self, request_iterator: AsyncIterator[encoder_pb2.EncodeSessionRequest], context: _Context
    ) -> AsyncIterator[encoder_pb2.EncodeSessionResponse]:
        """One after the other; what is not done and has a successor is left out."""
        self._worker.loaded(messages.Encoder)
        caller = next(self._callers)
        ahead: Key | None = None
        async with aclosing(read_ahead(request_iterator, _READ_AHEAD)) as items:
            async for item, is_newest in items:
                access.refuse_spent()
                answer = encoder_pb2.EncodeSessionResponse(item_id=item.item_id)
                with _failing_alone(answer), self._admission.place() as place:
                    ran = await self._go_on(item, answer, place, caller, is_newest=is_newest)
                    if ran and ahead:
                        self._cache.drop(ahead)  # nobody will ask for what was left half typed
                    ahead = None if item.submit else ran or ahead
                yield answer

    async def CountTokens(  # noqa: N802
        self, request: encoder_pb2.CountTokensRequest, context: _Context
    ) -> encoder_pb2.CountTokensResponse:
        """Answers at any time."""
        with self._admission.place():
            return encoder_pb2.CountTokensResponse(counts=await self._counts(_prompts(request)))

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
            usual = self._limits.recipe(Prompt("", hidden_layer=layer))
            answer.recipe.CopyFrom(embeddings.recipe_to_wire(usual))
            answer.numerics.CopyFrom(embeddings.numerics_to_wire(_numerics(encoder)))
            answer.width = encoder.width
            answer.layer_count = encoder.layer_count
            answer.max_hidden_layer = encoder.max_hidden_layer
        return answer

    async def _go_on(
        self,
        item: encoder_pb2.EncodeSessionRequest,
        answer: encoder_pb2.EncodeSessionResponse,
        place: Place,
        caller: int,
        *,
        is_newest: bool,
    ) -> Key | None:
        """What was run. What is run ahead stays in the cache, and its beginning with the worker."""
        prompt = embeddings.prompt_from_wire(item.prompt, field="prompt")
        if not item.submit:
            [count] = await self._counts([prompt])
            answer.count.CopyFrom(count)
            if not is_newest or not count.row_count:
                return None
        encoder = self._worker.loaded(messages.Encoder)
        [asked] = await self._read([prompt], False, encoder)
        _refuse_large_reply([asked.reply_bytes])
        place.expect(self._cost([asked]))
        is_new = asked.key not in self._cache
        encoded = await self._encoded(asked, caller, encoder)
        if item.submit:
            answer.embedding.CopyFrom(encoded)
        return asked.key if is_new else None

    async def _counts(self, prompts: Sequence[Prompt]) -> list[encoder_pb2.TokenCount]:
        self._limits.check(prompts)
        counts = []
        token_ids = await asyncio.to_thread(self._tokenizer.encode, prompts)
        for prompt, ids in zip(prompts, token_ids, strict=True):
            recipe = self._limits.recipe(prompt)
            rows = 0 if is_too_long(ids, recipe) else recipe.row_count(len(ids))
            counts.append(
                encoder_pb2.TokenCount(
                    token_count=len(ids), token_limit=recipe.token_limit, row_count=rows
                )
            )
        return counts

    async def _one(
        self, message: types_pb2.Prompt, is_solo: bool, caller: int
    ) -> types_pb2.PromptEmbedding:
        encoder = self._worker.loaded(messages.Encoder)
        prompt = embeddings.prompt_from_wire(message, field="prompt")
        [asked] = await self._read([prompt], is_solo, encoder)
        _refuse_large_reply([asked.reply_bytes])
        return await self._encoded(asked, caller, encoder)

    async def _read(
        self, prompts: Sequence[Prompt], is_solo: bool, encoder: messages.Encoder
    ) -> list[_Asked]:
        """The prompts as token ids; raises InvalidRequest for one that cannot be encoded."""
        check_hidden_layers(prompts, encoder.layer_count, encoder.max_hidden_layer)
        self._limits.check(prompts)
        token_ids = await asyncio.to_thread(self._tokenizer.encode, prompts)
        every = enumerate(zip(prompts, token_ids, strict=True))
        return [self._asked(index, *one, is_solo, encoder) for index, one in every]

    def _asked(
        self, index: int, prompt: Prompt, ids: TokenIds, is_solo: bool, encoder: messages.Encoder
    ) -> _Asked:
        recipe = self._limits.recipe(prompt)
        rows = recipe.row_count(len(ids))
        return _Asked(
            key=Key(
                identity=encoder.identities[recipe.hidden_layer],
                blend=prompt.effective_blend,
                numerics=_numerics(encoder),
                token_ids=to_run(index, prompt, recipe, ids),
                is_solo=is_solo,
            ),
            recipe=recipe,
            token_count=len(ids),
            reply_bytes=byte_count(encoder.compute_type, (rows, encoder.width)) + ENVELOPE_BYTES,
            whole_bytes=byte_count(encoder.compute_type, (len(ids), encoder.width)),
        )

    async def _encoded(
        self, asked: _Asked, caller: int, encoder: messages.Encoder
    ) -> types_pb2.PromptEmbedding:
        key, recipe = asked.key, asked.recipe
        tensor = await self._cache.of(key, lambda: self._run(asked, caller))
        if len(key.token_ids) > recipe.row_limit:
            tensor = await asyncio.to_thread(
                compressed, tensor, recipe.row_limit, recipe.long_prompt_mode
            )
        return embeddings.embedding_to_wire(
            Embedding(
                tensor=tensor,
                identity=key.identity,
                recipe=recipe,
                numerics=key.numerics,
                token_count=asked.token_count,
                token_ids_sha256=_sha256(key.token_ids),
            )
        )

    async def _run(self, asked: _Asked, caller: int) -> TensorData:
        ids = asked.key.token_ids
        call = messages.Encode(ids, asked.key.blend, caller, asked.key.is_solo)
        try:
            [encoded] = [event async for event in self._worker.call(call)]
        except asyncio.CancelledError:
            access.charge(self._encoding.expected(len(ids), len(ids)) or 0.0)
            raise
        assert isinstance(encoded, messages.Encoded)
        access.charge(encoded.seconds)
        ran = len(ids) - encoded.reused_tokens
        self._encoding.learn(ran, ran, encoded.seconds)
        metrics.ENCODER_PROMPTS.inc()
        metrics.ENCODER_TOKENS.inc(ran)
        metrics.ENCODER_REUSED.inc(encoded.reused_tokens)
        metrics.ENCODER_BATCH_PROMPTS.observe(encoded.batch_prompts)
        return encoded.tensor

    def _cost(self, asked: Sequence[_Asked]) -> Cost:
        left = [one for one in asked if one.key not in self._cache]
        lengths = [len(one.key.token_ids) for one in left]
        seconds = [self._encoding.expected(count, count) for count in lengths]
        return Cost(
            seconds=None if None in seconds else sum(filter(None, seconds)),
            bytes=sum(max(one.reply_bytes, one.whole_bytes) for one in asked),
        )


def _prompts(
    request: encoder_pb2.EncodeRequest | encoder_pb2.CountTokensRequest,
) -> list[Prompt]:
    count = len(request.prompts)
    if not 1 <= count <= PROMPTS_PER_ENCODE:
        raise _wrong_prompt_count(count)
    return [
        embeddings.prompt_from_wire(prompt, field=f"prompts[{index}]")
        for index, prompt in enumerate(request.prompts)
    ]


def _is_solo(request: encoder_pb2.EncodeRequest | encoder_pb2.EncodeStreamRequest) -> bool:
    return request.packing == types_pb2.PACKING_SOLO


@contextmanager
def _failing_alone(
    answer: encoder_pb2.EncodeStreamResponse | encoder_pb2.EncodeSessionResponse,
) -> Iterator[None]:
    """An error of the item is its answer, in words that fit a single prompt; one of the service is
    not the item's fault, and leaves the block: the whole stream is sent again."""
    try:
        yield
    except Unavailable:
        raise
    except ZImageError as error:
        answer.failure.CopyFrom(status.to_failure(error))
        failure = answer.failure
        failure.message = failure.message.replace("prompts[0]", "prompt")
        for name, value in error.fields.items():
            failure.fields[name] = value.replace("prompts[0]", "prompt")


def _numerics(encoder: messages.Encoder) -> Numerics:
    return Numerics(
        encoder.compute_type,
        encoder.weight_type,
        encoder.engine,
        encoder.device,
        encoder.weights,
    )


def _sha256(token_ids: TokenIds) -> str:
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).hexdigest()


def _refuse_large_reply(sizes: Sequence[int]) -> None:
    """An answer that cannot be sent is known before the work."""
    total = sum(sizes)
    if total <= MESSAGE_BYTES:
        return
    fitting = sum(size <= MESSAGE_BYTES for size in itertools.accumulate(sizes))
    raise InvalidRequest(
        f"prompts: the embeddings of these {len(sizes)} prompts are {total} bytes, "
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


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What comes of all; when one fails, the others are given up."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _wrong_prompt_count(count: int) -> InvalidRequest:
    return InvalidRequest(
        f"prompts: {count} given, 1 to {PROMPTS_PER_ENCODE} allowed; send more in further calls",
        reason="PROMPT_COUNT",
        fields={"field": "prompts", "given": str(count), "allowed": f"1 to {PROMPTS_PER_ENCODE}"},
    )
