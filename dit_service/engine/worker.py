"""The worker process: loads the model once, then lets the schedule run requests on it."""

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from dit_service import messages
from dit_service.engine import device as devices
from dit_service.engine.fitting import Fitting
from dit_service.engine.generate import Studio
from dit_service.engine.heap import prepare_heap
from dit_service.engine.partners import Partners
from dit_service.engine.schedule import Room, Schedule
from dit_service.engine.training import Alone, Means, Trainings
from dit_service.model import loading
from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import LARGE_TILE_PX, Vae
from zimage_core.errors import InvalidModel, InvalidSettings
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.planning import variants
from zimage_core.planning.flops import DitShape
from zimage_core.planning.limits import caption_token_limit, side_limit_px
from zimage_core.serving.child import Port
from zimage_core.settings import DitSettings
from zimage_core.tensors import TensorData
from zimage_core.wire.identities import encoder_identities

_LOADING_SECONDS = 600.0
"""What a cold load of 12 GB from a slow disk may take; the watchdog allows several times that."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    device: torch.device
    studio: Studio
    trainings: Trainings
    description: messages.Model


@torch.inference_mode()
def main(port: Port, settings: DitSettings) -> None:
    """The worker's entry."""
    prepare_heap()
    port.announce("load", _LOADING_SECONDS)
    loaded = _load(port, settings)
    _warm_up(loaded)
    port.ready(loaded.description)
    Schedule(loaded.studio, loaded.trainings, port, _room(settings, loaded)).serve()


def _room(settings: DitSettings, loaded: _Loaded) -> Room:
    return Room(settings.max_step_ms / 1000, _room_bytes(settings, loaded.device))


def _room_bytes(settings: DitSettings, device: torch.device) -> float:
    free = devices.room_bytes(device, settings.max_adapter_bytes)
    return settings.max_step_bytes or free


def _load(port: Port, settings: DitSettings) -> _Loaded:
    device = devices.choose_device(settings.device)
    compute_type = devices.choose_type(settings.dtype, device)
    devices.sum_in_full()
    variant, shift = _variant(settings)
    vae = _load_vae(settings, device)
    config, _ = loading.read_config(settings.model)
    _check_vae(settings, vae, config)
    fitted = Fitting(settings, device, compute_type, port.announce).fit(vae, shift)
    transformer = fitted.transformer
    if transformer.streamed_block_count and vae.tile_px is None:
        vae.tile_px = LARGE_TILE_PX  # there is no memory to spare
    backend = fitted.attention.backend
    studio = Studio(transformer, vae, backend, port.announce, settings.max_adapter_bytes)
    side_multiple_px = vae.factor * config.patch_size
    description = messages.Model(
        name=_name(settings.model),
        variant=variant.name,
        shift=shift,
        shape=_shape(config),
        caption_width=config.cap_feat_dim,
        max_token_count=caption_token_limit(config.axes_lens),
        side_multiple_px=side_multiple_px,
        max_side_px=side_limit_px(config.axes_lens, side_multiple_px),
        default_side_px=vae.sample_side_px,
        encoder_identities=_identities(settings.model),
        device=devices.describe(device),
        compute_type=devices.NAMES[compute_type],
        vae_compute_type=devices.NAMES[vae.dtype],
        fused_adapter=fitted.fusion.sha256 if fitted.fusion else "",
        fused_adapter_scale=fitted.fusion.scale if fitted.fusion else 0.0,
        weights=fitted.precision.form,
        weights_reason=fitted.precision.reason,
        streamed_block_count=transformer.streamed_block_count,
        attention_backend=backend,
        attention_reasons=fitted.attention.reasons,
        is_compiled=fitted.compilation.is_compiled,
        compilation_reason=fitted.compilation.reason,
        vae_sha256=vae.digest(),
        vae_tile_px=vae.tile_px or 0,
        preview_r_squared=studio.preview.r_squared,
        latent_channels=vae.latent_channels,
        pixels_per_latent=vae.factor,
        thread_count=torch.get_num_threads() if device.type == "cpu" else 0,
        library_versions=devices.library_versions(),
        is_learnt=settings.full_training,
    )
    is_host = device.type == "cpu"  # whose memory is not ours to plan, unless somebody says so
    room = settings.max_step_bytes or (math.inf if is_host else _room_bytes(settings, device))
    restore = partial(_restore, port, settings, transformer) if settings.full_training else None
    company = Partners(settings, description, room) if settings.train_devices > 1 else Alone()
    means = Means(
        room_bytes=room,
        usual_bytes=_room_bytes(settings, device),
        restore=restore,
        company=company,
        kept_bytes=settings.training_cache_bytes,
    )
    trainings = Trainings(transformer, backend, port.announce, studio.diary, means)
    return _Loaded(device, studio, trainings, description)


def _restore(port: Port, settings: DitSettings, transformer: ZImageTransformer) -> None:
    port.announce("load", _LOADING_SECONDS)
    loading.restore_transformer(transformer, settings.model)


def _load_vae(settings: DitSettings, device: torch.device) -> Vae:
    """On a device of its own where one is named: pictures are developed beside the steps then."""
    if settings.vae_device != "auto":
        device = devices.choose_device(settings.vae_device)
    dtype = devices.choose_vae_type(settings.dtype, device)
    return loading.load_vae(settings.model, device, dtype, settings.vae, settings.vae_tile_px)


def _check_vae(settings: DitSettings, vae: Vae, config: TransformerConfig) -> None:
    if vae.latent_channels != config.in_channels:
        what = (
            f"the VAE has {vae.latent_channels} latent channels and the transformer "
            f"{config.in_channels}; they do not belong together"
        )
        raise InvalidModel.at(settings.vae or settings.model / "vae", what, "FOREIGN_VAE")


def _shape(config: DitShape) -> DitShape:
    """Its sizes alone, which the front can read."""
    return DitShape(**{field.name: getattr(config, field.name) for field in fields(DitShape)})


def _name(model: Path) -> str:
    """A file keeps the name it was given: in download caches it is a link to a digest."""
    return model.stem if model.is_file() else model.resolve().name


def _variant(settings: DitSettings) -> tuple[variants.Variant, float]:
    """With the static shift: a folder tells it, and by it the variant; a file tells neither."""
    named = variants.VARIANTS.get(settings.variant)
    if settings.model.is_file():
        if named is None or settings.vae is None:
            flag = "--vae" if named else "--variant"
            raise InvalidSettings(
                f"{settings.model} is a single file: it needs --variant turbo or base, and --vae "
                f"with the VAE's file; {flag} is not given",
                fields={"field": flag.removeprefix("--"), "given": ""},
            )
        return named, named.shift
    shift = loading.read_scheduler(settings.model).shift
    variant = named or variants.by_shift(shift)
    if variant is None:
        raise InvalidModel(
            f"{settings.model}: a scheduler with shift {shift} is neither Turbo's (3) nor Base's "
            "(6); say which with --variant",
            reason="UNKNOWN_VARIANT",
            fields={"field": "variant", "given": str(shift), "allowed": "turbo, base"},
        )
    return variant, shift


def _identities(model: Path) -> dict[int, str]:
    """The encoder that lies beside the model, at each of its hidden states."""
    if not (model / "text_encoder").is_dir():
        return {}
    try:
        return encoder_identities(EncoderFiles.of(model))
    except InvalidModel as error:
        raise InvalidModel(
            f"{error.message}; text_encoder/ says which embeddings this model takes: complete it, "
            "or remove the folder and set encoder_identity",
            reason=error.reason,
            fields=error.fields,
        ) from error


def _warm_up(loaded: _Loaded) -> None:
    """One small picture: kernels are chosen, memory is taken, the pace is known."""
    width = loaded.description.caption_width
    side_px = 4 * loaded.description.side_multiple_px
    loaded.studio.run(
        messages.Generate(
            positive=TensorData("float32", (8, width), bytes(8 * width * 4)),
            negative=None,
            seeds=(0,),
            width_px=side_px,
            height_px=side_px,
            sigmas=(1.0, 0.5, 0.0),
            guidance=0.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            is_solo=True,
        ),
        emit=lambda _event: None,
    )
