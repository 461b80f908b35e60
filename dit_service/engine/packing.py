"""Turns the forwards that samplers ask for into one call of the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from dit_service.messages import Part
from dit_service.model.adapters import Uses
from dit_service.model.layout import Layout, SampleShape
from dit_service.model.transformer import Caption, Modulation, Sample, ZImageTransformer
from dit_service.sampling.forwards import Forward
from zimage_core.planning.flops import dit_row_elements, dit_step_flops

_KEPT_LAYOUTS = 8


@dataclass(frozen=True, slots=True)
class Conditioned:
    """What a request's forwards share: computed once, looked up in every step."""

    captions: Mapping[str, Caption]
    modulations: Mapping[float, Modulation]
    adapters: Uses = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants of the model for its next step."""

    who: Part
    shared: Conditioned
    forwards: tuple[Forward, ...]
    forwards_left: int
    """These and all that the request will ask for after them."""


class Packer:
    """One model, one attention backend, and the layouts of late."""

    def __init__(self, model: ZImageTransformer, backend: str) -> None:
        self._model = model
        self._backend = backend
        self._layout = lru_cache(_KEPT_LAYOUTS)(self._build_layout)

    def predict(self, asked: Sequence[Asked]) -> list[Tensor]:
        """The velocities of all forwards, in order; each linear of the model runs once over all."""
        samples = [
            Sample(
                latents_CHW=forward.latents_CHW,
                caption=one.shared.captions[forward.conditioning],
                modulation=one.shared.modulations[forward.time],
                adapters=one.shared.adapters,
            )
            for one in asked
            for forward in one.forwards
        ]
        shapes = tuple(shape for one in asked for shape in self._shapes(one))
        velocities: list[Tensor] = self._model(samples, self._layout(shapes), self._backend)
        return velocities

    def flops(self, asked: Asked) -> int:
        """How much arithmetic a call for this is."""
        shapes = self._shapes(asked)
        rows = sum(shape.image_rows + shape.caption_rows for shape in shapes)
        adapters = sum(use.adapter.value_count for use in asked.shared.adapters)
        tokens = ((shape.image_tokens, shape.caption_rows) for shape in shapes)
        return dit_step_flops(self._model.config, tokens) + 2 * rows * adapters

    def bytes(self, asked: Asked) -> int:
        """How much memory a call for this takes while it runs."""
        rows = sum(shape.image_rows + shape.caption_rows for shape in self._shapes(asked))
        return rows * dit_row_elements(self._model.config) * self._model.dtype.itemsize

    def _shapes(self, asked: Asked) -> list[SampleShape]:
        return [
            self._model.shape_of(forward.latents_CHW, asked.shared.captions[forward.conditioning])
            for forward in asked.forwards
        ]

    def _build_layout(self, shapes: tuple[SampleShape, ...]) -> Layout:
        return self._model.layout(shapes)
