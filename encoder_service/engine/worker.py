"""The worker process: loads the encoder, then runs one call after the other."""

import logging
import time
from importlib.metadata import version

import torch
from torch import Tensor, nn

from encoder_service.messages import Encode, Encoded, Encoder
from encoder_service.model import loading
from encoder_service.model.qwen import Qwen3Encoder
from zimage_core.errors import NotReady
from zimage_core.formats import weights
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving.child import Port
from zimage_core.serving.pipe import Submit
from zimage_core.settings import EncoderSettings
from zimage_core.tensors import TensorData
from zimage_core.wire.identities import encoder_identities

_log = logging.getLogger(__name__)

_SLOW_DISK_BYTES_PER_SECOND = 100e6
_WARM_UP_TOKENS = 32
_THREADED_LAYER_PARAMETERS = 4_000_000


def main(port: Port, settings: EncoderSettings) -> None:
    """Serves calls until the process ends."""
    port.announce("load", _loading_seconds(settings))
    files = EncoderFiles.of(settings.model, settings.tokenizer)
    encoder = loading.load(files, settings.max_hidden_layer, settings.device, settings.dtype)
    identities = encoder_identities(files)
    _settle_threads(encoder)
    seconds_per_token = _warm_up(encoder)
    port.ready(_description(encoder, identities))
    while True:
        submitted = port.next_call()
        with port.answering(submitted):
            _answer(port, encoder, submitted, seconds_per_token)


def _settle_threads(encoder: Qwen3Encoder) -> None:
    """A small model computes on one thread: the others would wait longer than they work, and they
    wait spinning, on cores that the DiT beside this service needs at that very moment."""
    if all(_size(layer) < _THREADED_LAYER_PARAMETERS for layer in encoder.layers):
        torch.set_num_threads(1)


def _warm_up(encoder: Qwen3Encoder) -> float:
    """Touches every weight, then measures the seconds a token takes."""
    prompt = [[0] * _WARM_UP_TOKENS]
    encoder(prompt, [encoder.deepest])
    began = time.monotonic()
    [state] = encoder(prompt, [encoder.deepest])
    _plain(state)
    return (time.monotonic() - began) / _WARM_UP_TOKENS


def _answer(port: Port, encoder: Qwen3Encoder, submitted: Submit, seconds_per_token: float) -> None:
    call = submitted.payload
    assert isinstance(call, Encode)
    token_count = sum(map(len, call.token_ids))
    began = time.monotonic()
    port.announce("encode", seconds_per_token * token_count)
    states = encoder(call.token_ids, call.hidden_layers, lambda: port.is_cancelled(submitted.call))
    plain = tuple(map(_plain, states))
    seconds = time.monotonic() - began
    port.emit(submitted.call, Encoded(plain, seconds))
    _log.info("%s prompts, %s tokens in %.3f s", len(call.token_ids), token_count, seconds)


def _plain(tensor: Tensor) -> TensorData:
    """The tensor as bytes, which waits for the device."""
    if not tensor.isfinite().all():
        raise NotReady(
            f"the encoder's values do not fit {_name(tensor.dtype)}; "
            "its service should run in bfloat16 or float32",
            reason="NOT_FINITE",
        )
    data = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return TensorData(_name(tensor.dtype), tuple(tensor.shape), data)


def _description(encoder: Qwen3Encoder, identities: dict[int, str]) -> Encoder:
    table = encoder.embed_tokens.weight
    return Encoder(
        identities=identities,
        layer_count=encoder.layer_count,
        max_hidden_layer=encoder.deepest,
        width=encoder.width,
        compute_type=_name(table.dtype),
        weight_type=_name(table.dtype),
        engine=f"transformers {version('transformers')}",
        device=table.device.type,
    )


def _loading_seconds(settings: EncoderSettings) -> float:
    files = EncoderFiles.of(settings.model, settings.tokenizer)
    size = sum(path.stat().st_size for path in weights.files(files.weights))
    return size / _SLOW_DISK_BYTES_PER_SECOND


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
