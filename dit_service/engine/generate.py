"""A request on the device: conditioning once, then each picture step by step, then the VAE."""

import logging
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from dit_service import messages
from dit_service.engine.adapters import Adapters
from dit_service.engine.conversion import Converter
from dit_service.engine.developing import Developing
from dit_service.engine.device import Fence, to_device
from dit_service.engine.diary import Diary, part
from dit_service.engine.lines import Load
from dit_service.engine.pace import Announce, Pace
from dit_service.engine.packing import Asked, Conditioned, Packer
from dit_service.model import preview
from dit_service.model.adapters import Uses
from dit_service.model.transformer import Caption, ZImageTransformer
from dit_service.model.vae import Vae
from dit_service.sampling.euler import text_to_image
from dit_service.sampling.forwards import NEGATIVE, POSITIVE, Run
from dit_service.sampling.noise import initial_noise
from zimage_core.errors import InvalidRequest
from zimage_core.planning import schedule
from zimage_core.planning.durations import Durations
from zimage_core.tensors import TensorData

_log = logging.getLogger(__name__)

Emit = Callable[[object], None]
"""Takes an event of the request; raises Cancelled when nobody waits for the request any more."""

_SLOWEST_SECONDS_PER_FLOP = 1e-9
_SLOWEST_SECONDS_PER_PIXEL = 1e-3
_SLOWEST_SECONDS_PER_TOKEN = 1e-1
"""What is expected before anything was measured: no device in use is slower."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a request is sent for a step that it asked for."""

    velocities: tuple[Tensor, ...]
    seconds: float
    """Its share of the time that the step took."""
    request_count: int
    """How many requests shared the step."""


class Awaited(Protocol):
    """Something on its way that a request waits for while others go on."""

    @property
    def is_there(self) -> bool:
        """Whether it is worth to go on."""

    def wait(self) -> None:
        """Returns when it is, or after a moment: whoever came meanwhile is looked after."""


Work = Generator[Asked | Awaited, Predicted | None, None]
"""A request under way: yields what it asks of the model and is sent what came of it, or yields what
it waits for and is sent nothing, when it is there or before."""


class Studio:
    """What all requests work with: the model, the VAE, and how fast they are here."""

    def __init__(
        self,
        model: ZImageTransformer,
        vae: Vae,
        backend: str,
        announce: Announce,
        adapter_bytes: float = math.inf,
    ) -> None:
        self._model = model
        self._adapters = Adapters(model, adapter_bytes, announce)
        self._vae = vae
        self.preview = preview.fit(vae, model.device)
        self.diary = Diary()
        self.converter = Converter(vae, model.device, announce, self.diary)
        self._packer = Packer(model, backend)
        self._fence = Fence(model.device)
        self._step_durations = Durations()
        self._conditioning = Pace("condition", _SLOWEST_SECONDS_PER_TOKEN, announce)
        self._denoising = Pace("denoise", _SLOWEST_SECONDS_PER_FLOP, announce)
        self._decoding = Pace("decode", _SLOWEST_SECONDS_PER_PIXEL, announce)

    def work(self, request: messages.Generate, emit: Emit) -> Work:
        """A request from its conditioning to its last picture. Emits an event before every step,
        each picture when it is done, and last what it took."""
        adapters = yield from self._adapters.borrowed(request.adapters)
        try:
            yield from self._work(request, adapters, emit)
        finally:
            self._adapters.give_back(request.adapters)

    def _work(self, request: messages.Generate, adapters: Uses, emit: Emit) -> Work:
        emit(messages.Denoised(0, 0))  # the request is under way: what breaks now may be its fault
        spent = messages.Spent()
        forward_count = len(request.seeds) * schedule.forward_count(
            request.sigmas, request.guidance, request.cfg_truncation
        )
        try:
            with self._conditioning.working(request.token_count) as piece:
                shared = self._condition(request, adapters)
            self.diary.enter("condition", piece.seconds, part())
            for index, seed in enumerate(request.seeds):
                run = self._begin(request, seed)
                while run.step:
                    emit(messages.Denoised(index, run.steps_done))
                    yield from self._preview(request, index, run, spent, emit)
                    predicted = yield Asked(
                        who=part(index, run.steps_done + 1),
                        shared=shared,
                        forwards=run.step.forwards,
                        forwards_left=forward_count - spent.forward_count,
                    )
                    assert predicted is not None
                    run.send(predicted.velocities)
                    count = len(predicted.velocities)
                    spent.count(count, predicted.seconds, predicted.request_count)
                emit(messages.Decoding(index))
                assert run.latents_CHW is not None
                picture_HW3 = yield from self._developed(run.latents_CHW, spent, part(index))
                emit(messages.Picture(index, picture_HW3.numpy().tobytes()))
            emit(spent)
        finally:  # however it ends
            _log.info(
                "%s of %sx%s, %s tokens: %s forwards in %.3f s, decoding %.3f s",
                len(request.seeds),
                request.width_px,
                request.height_px,
                request.token_count,
                spent.forward_count,
                spent.denoise_seconds,
                spent.decode_seconds,
            )

    def predict(self, asked: Sequence[Asked]) -> list[Predicted]:
        """A step of some requests, in one call of the model."""
        flops = [self._packer.flops(one) for one in asked]
        total, whose = sum(flops), [one.who for one in asked]  # and not what they hold

        def done(seconds: float) -> None:
            self._step_durations.learn(total, total, seconds)
            self.diary.enter("denoise", seconds, *whose)

        with self._denoising.working(total) as step, self._fence.step(done):
            velocities = iter(self._packer.predict(asked))
        return [
            Predicted(
                velocities=tuple(islice(velocities, len(one.forwards))),
                seconds=step.seconds * own / total,
                request_count=len(asked),
            )
            for one, own in zip(asked, flops, strict=True)
        ]

    def load(self, asked: Asked) -> Load:
        """What the next step of a request asks of the device."""
        return Load(self._packer.flops(asked), self._packer.bytes(asked))

    def flops_within(self, seconds: float) -> float:
        """How large a step may be to take no longer, by the steps of late."""
        return self._step_durations.units_within(seconds)

    def run(self, request: messages.Generate, emit: Emit) -> None:
        """A request with nobody beside it."""
        work = self.work(request, emit)
        with suppress(StopIteration):
            asked = next(work)
            while True:
                if isinstance(asked, Asked):
                    [predicted] = self.predict([asked])
                    asked = work.send(predicted)
                else:
                    asked.wait()
                    asked = next(work)

    def _condition(self, request: messages.Generate, adapters: Uses) -> Conditioned:
        """What all pictures and steps of the request share."""
        given = {POSITIVE: request.positive, NEGATIVE: request.negative}
        features = {name: self._features(data) for name, data in given.items() if data is not None}
        captions: list[Caption] = self._model.encode_captions(
            list(features.values()), adapters=adapters
        )
        times = [1 - sigma for sigma in request.sigmas[:-1]]
        modulations = self._model.modulate(
            torch.tensor(times, dtype=torch.float32, device=self._model.device), adapters
        )
        return Conditioned(
            captions=dict(zip(features, captions, strict=True)),
            modulations=dict(zip(times, modulations, strict=True)),
            adapters=adapters,
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

    def _preview(
        self,
        request: messages.Generate,
        index: int,
        run: Run,
        spent: messages.Spent,
        emit: Emit,
    ) -> Work:
        """Shows where the picture is heading, in those steps that it was asked for in."""
        asked = request.previews
        if asked is None or run.step is None or run.steps_done % asked.interval_steps:
            return
        expected_latents = run.step.expected_latents
        if expected_latents is None:
            return
        if asked.use_vae:
            who = part(index, run.steps_done)
            picture_HW3 = yield from self._developed(expected_latents, spent, who)
        else:
            picture_HW3 = self.preview.render(expected_latents)
        height, width, _ = picture_HW3.shape
        rgb = picture_HW3.numpy().tobytes()
        emit(messages.Preview(index, run.steps_done, width, height, rgb))

    def _developed(
        self, latents_CHW: Tensor, spent: messages.Spent, who: messages.Part
    ) -> Generator[Developing, Predicted | None, Tensor]:
        """The picture of latents; others go on while the device works on it."""
        developing = self._develop(latents_CHW)
        try:
            while not developing.is_there:
                yield developing
        except GeneratorExit:  # nobody waits for it any more
            developing.leave()
            raise
        picture_HW3 = developing.picture(spent)
        self.diary.enter("decode", developing.seconds, who)
        return picture_HW3

    def _develop(self, latents_CHW: Tensor) -> Developing:
        return Developing(self._vae, latents_CHW, self._decoding)
