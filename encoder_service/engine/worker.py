"""The worker process: loads the encoder, then runs batch after batch."""

from importlib.metadata import version

import torch

from encoder_service.engine.residence import Residence
from encoder_service.engine.schedule import Schedule, type_name
from encoder_service.messages import Encoder
from encoder_service.model import loading
from encoder_service.model.qwen import Qwen3Encoder
from zimage_core.formats import weights
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving import cpus
from zimage_core.serving.child import Port
from zimage_core.settings import EncoderSettings
from zimage_core.wire.identities import encoder_identities

_SLOW_DISK_BYTES_PER_SECOND = 100e6
_THREADED_LAYER_PARAMETERS = 4_000_000


def main(port: Port, settings: EncoderSettings) -> None:
    """Serves calls until the process ends."""
    port.announce("load", _loading_seconds(settings))
    files = EncoderFiles.of(settings.model, settings.tokenizer)
    device = loading.choose_device(settings.device)
    is_resident = device.type == "cpu" or not settings.cpu_offload
    if device.type == "cpu" and (threads := cpus.settle()):
        torch.set_num_threads(threads)
    encoder = loading.load(
        files,
        settings.max_hidden_layer,
        settings.device,
        settings.dtype,
        settings.weights,
        is_resident=is_resident,
    )
    identities = encoder_identities(files)
    _settle_threads(encoder)
    residence = None if is_resident else Residence(encoder, device)
    schedule = Schedule(encoder, port, settings, residence)
    schedule.warm_up()
    port.ready(_description(encoder, identities, device, settings.weights))
    schedule.serve()


def _settle_threads(encoder: Qwen3Encoder) -> None:
    """A small model computes on one thread: the others would wait longer than they work, and they
    wait spinning, on cores that the DiT beside this service needs at that very moment."""
    if encoder.layer_size < _THREADED_LAYER_PARAMETERS:
        torch.set_num_threads(1)


def _description(
    encoder: Qwen3Encoder, identities: dict[int, str], device: torch.device, form: str
) -> Encoder:
    table = encoder.embed_tokens.weight
    return Encoder(
        identities=identities,
        layer_count=encoder.layer_count,
        max_hidden_layer=encoder.deepest,
        width=encoder.width,
        compute_type=type_name(table.dtype),
        weight_type=type_name(table.dtype),
        weights=form,
        engine=f"transformers {version('transformers')}",
        device=device.type,
    )


def _loading_seconds(settings: EncoderSettings) -> float:
    files = EncoderFiles.of(settings.model, settings.tokenizer)
    size = sum(path.stat().st_size for path in weights.files(files.weights))
    return size / _SLOW_DISK_BYTES_PER_SECOND
