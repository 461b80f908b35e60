"""Turns the forwards that samplers ask for into one call of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from dit_service.model.layout import Layout, SampleShape
from dit_service.model.transformer import Caption, Modulation, Sample, ZImageTransformer
from dit_service.sampling.forwards import Forward
from zimage_core.planning.flops import dit_step_flops

_KEPT_LAYOUTS = 8


@dataclass(frozen=True, slots=True)
class Conditioned:
    """What a request's forwards share: computed once, looked up in every step."""

    captions: Mapping[str, Caption]
    modulations: Mapping[float, Modulation]


class Packer:
    """One model, one attention backend, and the layouts of late."""

    def __init__(self, model: ZImageTransformer, backend: str) -> None:
        self._model = model
        self._backend = backend
        self._layout = lru_cache(_KEPT_LAYOUTS)(self._build_layout)

    def predict(self, asked: Sequence[tuple[Conditioned, Forward]]) -> list[Tensor]:
        """The velocities, in order; each linear of the model runs once over all of them."""
        samples = [
            Sample(
                latents_CHW=forward.latents_CHW,
                caption=shared.captions[forward.conditioning],
                modulation=shared.modulations[forward.time],
            )
            for shared, forward in asked
        ]
        layout = self._layout(self._shapes(asked))
        velocities: list[Tensor] = self._model(samples, layout, self._backend)
        return velocities

    def flops(self, asked: Sequence[tuple[Conditioned, Forward]]) -> int:
        """How much arithmetic a call for these would be."""
        shapes = ((shape.image_tokens, shape.caption_rows) for shape in self._shapes(asked))
        return dit_step_flops(self._model.config, shapes)

    def _shapes(self, asked: Sequence[tuple[Conditioned, Forward]]) -> tuple[SampleShape, ...]:
        return tuple(
            self._model.shape_of(forward.latents_CHW, shared.captions[forward.conditioning])
            for shared, forward in asked
        )

    def _build_layout(self, shapes: tuple[SampleShape, ...]) -> Layout:
        return self._model.layout(shapes)
