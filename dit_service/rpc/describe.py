"""What this DiT service says of itself."""

from importlib import metadata

from dit_service import messages
from dit_service.rpc.conditioning import Conditioner
from dit_service.rpc.spec import Resolver
from zimage_core.serving.worker import Worker
from zimage_core.settings import DitSettings
from zimage_core.wire import features, names, tensors
from zimage_rpc.dit.v1 import dit_pb2
from zimage_rpc.types.v1 import types_pb2

VERSION = metadata.version("zimage-grpc")


def response(
    worker: Worker, settings: DitSettings, conditioner: Conditioner
) -> dit_pb2.DescribeResponse:
    """Less while the model loads."""
    model = worker.description
    answer = dit_pb2.DescribeResponse(
        version=VERSION,
        ready=model is not None,
        has_encoder=conditioner.has_encoder,
        worker=worker.state,
        features=features.DIT,
    )
    if model is None:
        return answer
    assert isinstance(model, messages.Model)
    resolver = Resolver(model, settings)
    answer.limits.CopyFrom(resolver.limits)
    answer.numeric_plan.CopyFrom(numeric_plan(model))
    answer.model.CopyFrom(
        dit_pb2.Model(
            name=model.name,
            variant=names.VARIANTS[model.variant],
            shift=model.shift,
            caption_width=model.caption_width,
            default_side_px=resolver.default_side_px,
            default_step_count=resolver.variant.step_count,
            default_guidance_scale=resolver.variant.guidance,
            preview_r_squared=model.preview_r_squared,
            vae_sha256=model.vae_sha256,
            full_training=model.is_learnt,
        )
    )
    for name, reason in model.attention_reasons.items():
        is_chosen = name == model.attention_backend
        answer.attention_backends.add(name=name, chosen=is_chosen, reason=reason)
    answer.compilation = model.compilation_reason
    answer.weights_reason = model.weights_reason
    answer.streamed_block_count = model.streamed_block_count
    if pinned := conditioner.pin.usual(model):
        answer.model.encoder_identity.sha256 = pinned
    return answer


def numeric_plan(model: messages.Model) -> types_pb2.NumericPlan:
    """The arithmetic of everything that this worker makes."""
    return types_pb2.NumericPlan(
        device=model.device,
        compute_type=tensors.element_type_to_wire(model.compute_type),
        vae_compute_type=tensors.element_type_to_wire(model.vae_compute_type),
        attention_backend=model.attention_backend,
        thread_count=model.thread_count,
        compiled=model.is_compiled,
        vae_tile_px=model.vae_tile_px,
        weights=model.weights,
        learning=model.is_learnt,
        fused_adapter=model.fused_adapter,
        fused_adapter_scale=model.fused_adapter_scale,
        library_versions=model.library_versions,
    )
