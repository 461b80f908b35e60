"""Messages of the services as what users of the SDK see."""

from contextlib import suppress

from google.protobuf.duration_pb2 import Duration

from zimage_client._description import (
    Adapter,
    AttentionBackend,
    DitDescription,
    Encoder,
    EncoderDescription,
    Limits,
    Model,
    Span,
    SpanPart,
    TokenCount,
    Trace,
    WorkerState,
)
from zimage_client._events import (
    Accepted,
    AdapterUse,
    Artifact,
    Completed,
    DecodedImage,
    NumericPlan,
    Preview,
    Progress,
    Provenance,
    Stage,
    Usage,
)
from zimage_core.embeddings import Embedding, Numerics
from zimage_core.errors import InternalError, InvalidRequest
from zimage_core.tensors import TensorData
from zimage_core.wire import embeddings, names, tensors
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.encoder.v1 import encoder_pb2
from zimage_rpc.types.v1 import types_pb2

_STAGES: dict[int, Stage] = {
    dit_pb2.Progress.STAGE_QUEUED: "queued",
    dit_pb2.Progress.STAGE_ENCODING: "encoding",
    dit_pb2.Progress.STAGE_DENOISING: "denoising",
    dit_pb2.Progress.STAGE_DECODING: "decoding",
}


def malformed(what: str) -> InternalError:
    """The error of an answer that makes no sense."""
    return InternalError(f"the server's answer makes no sense: {what}", reason="MALFORMED_ANSWER")


def embedding(message: types_pb2.PromptEmbedding) -> Embedding:
    """An embedding; what is wrong with it is the server's fault here, not the caller's."""
    try:
        return embeddings.embedding_from_wire(message, field="embedding")
    except InvalidRequest as error:
        raise malformed(error.message) from None


def latents(message: types_pb2.Tensor) -> TensorData:
    """The latents of a picture."""
    try:
        return tensors.from_wire(message, field="latents")
    except InvalidRequest as error:
        raise malformed(error.message) from None


def decoded_image(message: dit_pb2.DecodedImage) -> DecodedImage:
    """The picture of some latents."""
    return DecodedImage(
        data=message.data,
        media_type=message.media_type,
        width=message.width_px,
        height=message.height_px,
        pixels_sha256=message.pixels_sha256,
    )


def preview(message: dit_pb2.Preview) -> Preview:
    """Where a picture is heading."""
    return Preview(
        message.image_index, message.step, message.width_px, message.height_px, message.data
    )


def accepted(message: dit_pb2.Accepted) -> Accepted:
    """The first event."""
    spec = message.spec
    output, special = spec.output, spec.z_image
    return Accepted(
        width=spec.width_px,
        height=spec.height_px,
        seed=spec.seed,
        count=spec.image_count,
        steps=spec.step_count,
        guidance=spec.guidance_scale,
        schedule=names.name_of(spec.schedule.rule, names.RULES),
        shift=spec.schedule.shift,
        sigmas=tuple(message.sigmas),
        force_guidance=special.force_guidance,
        cfg_normalization=special.cfg_normalization,
        cfg_truncation=special.cfg_truncation,
        format=names.name_of(output.format, names.FORMATS),
        quality=output.quality if output.HasField("quality") else None,
        metadata=names.name_of(output.metadata, names.METADATA),
        packing=names.name_of(spec.packing, names.PACKINGS),
        previews=(
            names.name_of(spec.previews.source, names.PREVIEWS) if spec.HasField("previews") else ""
        ),
        preview_interval=spec.previews.interval_steps,
        priority=names.name_of(spec.priority, names.PRIORITIES),
        adapters=tuple(AdapterUse(use.name, use.digest.sha256, use.scale) for use in spec.adapters),
        forward_count=message.forward_count,
        queue_position=message.queue_position,
        expected_seconds=_expected(message),
    )


def progress(message: dit_pb2.Progress) -> Progress | None:
    """How far it is; None for a stage that this version does not know."""
    stage = _STAGES.get(message.stage)
    if stage is None:
        return None
    return Progress(
        stage,
        message.image_index,
        message.step,
        message.step_count,
        message.queue_position,
        _expected(message),
    )


def completed(message: dit_pb2.Completed) -> Completed:
    """The last event."""
    usage = message.usage
    return Completed(
        artifacts=tuple(
            Artifact(
                sha256=artifact.digest.sha256,
                size_bytes=artifact.digest.size_bytes,
                media_type=artifact.digest.media_type,
                seed=artifact.seed,
                pixels_sha256=artifact.pixels_sha256,
            )
            for artifact in message.artifacts
        ),
        positive=provenance(message.positive),
        negative=provenance(message.negative) if message.HasField("negative") else None,
        numeric_plan=numeric_plan(message.numeric_plan),
        usage=Usage(
            forward_count=usage.forward_count,
            pixel_count=usage.pixel_count,
            artifact_bytes=usage.artifact_bytes,
            queue_seconds=_seconds(usage.queue_time),
            encode_seconds=_seconds(usage.encode_time),
            denoise_seconds=_seconds(usage.denoise_time),
            decode_seconds=_seconds(usage.decode_time),
            mean_occupancy=usage.mean_occupancy,
        ),
    )


def dit_description(message: dit_pb2.DescribeResponse) -> DitDescription:
    """What a DiT service is."""
    return DitDescription(
        version=message.version,
        ready=message.ready,
        has_encoder=message.has_encoder,
        model=_model(message.model) if message.ready else None,
        limits=_limits(message.limits) if message.ready else None,
        numeric_plan=numeric_plan(message.numeric_plan) if message.ready else None,
        worker=_worker(message.worker),
        features=tuple(message.features),
        attention_backends=tuple(
            AttentionBackend(backend.name, backend.chosen, backend.reason)
            for backend in message.attention_backends
        ),
        compilation=message.compilation,
        weights_reason=message.weights_reason,
        streamed_block_count=message.streamed_block_count,
    )


def adapter(message: dit_pb2.Adapter) -> Adapter:
    """What is known of an adapter."""
    return Adapter(
        name=message.name,
        sha256=message.digest.sha256,
        size_bytes=message.digest.size_bytes,
        rank=message.rank,
        linear_count=message.linear_count,
        metadata=dict(message.metadata),
    )


def trace(message: dit_pb2.TraceResponse) -> Trace:
    """What a device did of late."""
    now = message.until.ToNanoseconds()
    spans = (
        Span(
            work=span.work,
            ended_seconds_ago=(now - span.began.ToNanoseconds() - span.took.ToNanoseconds()) / 1e9,
            took_seconds=_seconds(span.took),
            parts=tuple(
                SpanPart(part.request_id, part.image_index, part.step) for part in span.parts
            ),
        )
        for span in message.spans
    )
    return Trace(tuple(spans), message.memory_bytes, message.peak_memory_bytes)


def encoder_description(message: encoder_pb2.DescribeResponse) -> EncoderDescription:
    """What an encoder service is."""
    model = (
        Encoder(
            identity=message.identity.sha256,
            recipe=embeddings.recipe_from_wire(message.recipe),
            numerics=_numerics(message.numerics),
            width=message.width,
            layer_count=message.layer_count,
            max_hidden_layer=message.max_hidden_layer,
            max_prompt_count=message.max_prompt_count,
        )
        if message.ready
        else None
    )
    return EncoderDescription(
        version=message.version,
        ready=message.ready,
        model=model,
        worker=_worker(message.worker),
        features=tuple(message.features),
    )


def token_count(message: encoder_pb2.TokenCount) -> TokenCount:
    """How long a prompt is."""
    return TokenCount(message.token_count, message.token_limit, message.row_count)


def edited(
    message: types_pb2.PromptEmbedding | encoder_pb2.TokenCount,
) -> Embedding | TokenCount:
    """What came of a prompt that is typed: done, or not."""
    if isinstance(message, encoder_pb2.TokenCount):
        return token_count(message)
    return embedding(message)


def _worker(message: types_pb2.Worker) -> WorkerState:
    return WorkerState(
        state=names.name_of(message.state, names.WORKER_STATES),
        work=message.work,
        call_count=message.call_count,
        restart_count=message.restart_count,
        load_seconds=message.load_seconds,
        memory_bytes=dict(message.memory_bytes),
    )


def _model(message: dit_pb2.Model) -> Model:
    return Model(
        name=message.name,
        variant=names.name_of(message.variant, names.VARIANTS),
        shift=message.shift,
        caption_width=message.caption_width,
        encoder_identity=message.encoder_identity.sha256,
        default_side_px=message.default_side_px,
        default_steps=message.default_step_count,
        default_guidance=message.default_guidance_scale,
        preview_r_squared=message.preview_r_squared,
        vae_sha256=message.vae_sha256,
        full_training=message.full_training,
    )


def _limits(message: dit_pb2.Limits) -> Limits:
    return Limits(
        side_multiple_px=message.side_multiple_px,
        max_side_px=message.max_side_px,
        max_token_count=message.max_token_count,
        max_count=message.max_image_count,
        max_steps=message.max_step_count,
        max_queue_length=message.max_queue_length,
    )


def provenance(message: dit_pb2.ConditioningProvenance) -> Provenance:
    """Where a conditioning came from."""
    return Provenance(
        embedding_sha256=message.embedding_digest.sha256,
        identity=message.identity.sha256,
        identity_verified=message.identity_verified,
        recipe=embeddings.recipe_from_wire(message.recipe),
        numerics=_numerics(message.numerics),
        token_count=message.token_count,
        worst_cosine=message.worst_cosine or None,
    )


def _numerics(message: types_pb2.Numerics) -> Numerics:
    return Numerics(
        compute_type=_element_type(message.compute_type),
        weight_type=_element_type(message.weight_type),
        engine=message.engine,
        device=message.device,
        weights=message.weights or "full",
    )


def numeric_plan(message: types_pb2.NumericPlan) -> NumericPlan:
    """The arithmetic of a picture, or of a service."""
    return NumericPlan(
        device=message.device,
        compute_type=_element_type(message.compute_type),
        vae_compute_type=_element_type(message.vae_compute_type),
        attention_backend=message.attention_backend,
        thread_count=message.thread_count,
        library_versions=dict(message.library_versions),
        packing=names.name_of(message.packing, names.PACKINGS),
        compiled=message.compiled,
        vae_tile_px=message.vae_tile_px,
        weights=message.weights,
        fused_adapter=message.fused_adapter,
        fused_adapter_scale=message.fused_adapter_scale,
        learning=message.learning,
    )


def _element_type(value: int) -> str:
    """The name; empty for one that this version does not know: no reason to lose a picture."""
    with suppress(InvalidRequest):
        return tensors.element_type_from_wire(value, field="element_type")
    return ""


def _expected(message: dit_pb2.Accepted | dit_pb2.Progress) -> float | None:
    return _seconds(message.expected_time) if message.HasField("expected_time") else None


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
