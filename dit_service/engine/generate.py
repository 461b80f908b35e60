"""One request on the device: conditioning once, then each picture step by step, then the VAE."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_service import messages
from dit_service.engine.device import Fence, to_device
from dit_service.engine.pace import Announce, Pace
from dit_service.engine.packing import Conditioned, Packer
from dit_service.model.transformer import Caption, ZImageTransformer
from dit_service.model.vae import Vae
from dit_service.sampling.euler import text_to_image
from dit_service.sampling.forwards import NEGATIVE, POSITIVE, Run
from dit_service.sampling.noise import initial_noise
from zimage_core.errors import InvalidRequest
from zimage_core.tensors import TensorData

Emit = Callable[[object], None]
"""Takes an event of the request; raises Cancelled when nobody waits for the request any more."""

_SLOWEST_SECONDS_PER_FLOP = 1e-9
_SLOWEST_SECONDS_PER_PIXEL = 1e-3
_SLOWEST_SECONDS_PER_TOKEN = 1e-1
"""What is expected before anything was measured: no device in use is slower."""


class Generator:
    """Runs requests one after another."""

    def __init__(
        self, model: ZImageTransformer, vae: Vae, backend: str, announce: Announce
    ) -> None:
        self._model = model
        self._vae = vae
        self._packer = Packer(model, backend)
        self._fence = Fence(model.device)
        self._conditioning = Pace("condition", _SLOWEST_SECONDS_PER_TOKEN, announce)
        self._denoising = Pace("denoise", _SLOWEST_SECONDS_PER_FLOP, announce)
        self._decoding = Pace("decode", _SLOWEST_SECONDS_PER_PIXEL, announce)

    def run(self, request: messages.Generate, emit: Emit) -> None:
        """Emits an event before every step, each picture when it is done, and last what it took."""
        emit(messages.Denoised(0, 0))  # the request is under way: what breaks now may be its fault
        denoised, decoded = self._denoising.seconds, self._decoding.seconds
        with self._conditioning.working(request.token_count):
            shared = self._condition(request)
        forward_count = 0
        for index, seed in enumerate(request.seeds):
            run = self._begin(request, seed)
            while run.forwards:
                emit(messages.Denoised(index, run.steps_done))
                forward_count += len(run.forwards)
                self._step(shared, run)
            emit(messages.Decoding(index))
            emit(messages.Picture(index, self._decode(run)))
        emit(
            messages.Spent(
                forward_count,
                denoise_seconds=self._denoising.seconds - denoised,
                decode_seconds=self._decoding.seconds - decoded,
            )
        )

    def _condition(self, request: messages.Generate) -> Conditioned:
        """What all pictures and steps of the request share."""
        given = {POSITIVE: request.positive, NEGATIVE: request.negative}
        features = {name: self._features(data) for name, data in given.items() if data is not None}
        captions: list[Caption] = self._model.encode_captions(list(features.values()))
        times = [1 - sigma for sigma in request.sigmas[:-1]]
        modulations = self._model.modulate(
            torch.tensor(times, dtype=torch.float32, device=self._model.device)
        )
        return Conditioned(
            captions=dict(zip(features, captions, strict=True)),
            modulations=dict(zip(times, modulations, strict=True)),
        )

    def _features(self, data: TensorData) -> Tensor:
        features_LF = to_device(data, self._model.device).to(self._model.dtype)
        if not features_LF.isfinite().all():
            raise InvalidRequest(
                "the embedding holds values that are no finite numbers in the type that this "
                f"model computes in ({self._model.dtype})",
                reason="EMBEDDING_NOT_FINITE",
                fields={"field": "embeddings"},
            )
        return features_LF

    def _begin(self, request: messages.Generate, seed: int) -> Run:
        factor = self._vae.factor
        shape = (
            self._model.config.in_channels,
            request.height_px // factor,
            request.width_px // factor,
        )
        return Run(
            text_to_image(
                initial_noise(seed, shape).to(self._model.device),
                request.sigmas,
                request.guidance,
                request.cfg_normalization,
                request.cfg_truncation,
            )
        )

    def _step(self, shared: Conditioned, run: Run) -> None:
        asked = [(shared, forward) for forward in run.forwards]
        with self._denoising.working(self._packer.flops(asked)):
            run.send(tuple(self._packer.predict(asked)))
            self._fence.step()

    def _decode(self, run: Run) -> bytes:
        """The picture's pixels; waits for the device. Better no picture than a black one."""
        assert run.latents_CHW is not None
        if not run.latents_CHW.isfinite().all():
            raise InvalidRequest(
                "the picture's values left the range of numbers; ask for less guidance",
                reason="NOT_FINITE",
            )
        with self._decoding.working(run.latents_CHW[0].numel() * self._vae.factor**2):
            return self._vae.decode(run.latents_CHW).numpy().tobytes()
