"""A transformer loaded in whatever way suits its device: with which attention, in which form, and
compiled or not. What is not settled by settings is tried."""

import gc
from dataclasses import dataclass

import torch

from dit_service.engine import attention
from dit_service.engine import device as devices
from dit_service.engine.compiling import Compilation, compile_blocks
from dit_service.engine.notes import Notes
from dit_service.engine.pace import Announce
from dit_service.engine.precision import Forms, Precision, Trial
from dit_service.engine.trial import try_out
from dit_service.model import loading
from dit_service.model.attention.backend import Place
from dit_service.model.fusing import Fusion
from dit_service.model.transformer import ZImageTransformer
from dit_service.model.vae import Vae
from zimage_core.planning.flops import DitShape
from zimage_core.planning.memory import weight_bytes
from zimage_core.settings import DitSettings

_SECONDS = {"load": 600.0, "compile": 600.0, "try weights": 600.0}
"""What a cold load of 12 GB from a slow disk may take, and a compiler on a busy machine; the
watchdog allows several times that."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A transformer that is ready, and what was chosen for it."""

    transformer: ZImageTransformer
    attention: attention.Choice
    precision: Precision
    compilation: Compilation
    fusion: Fusion | None


@dataclass(frozen=True)
class Fitting:
    """The way to it."""

    settings: DitSettings
    device: torch.device
    dtype: torch.dtype
    announce: Announce

    def fit(self, vae: Vae, shift: float) -> Fitted:
        """Raises InvalidSettings and InvalidModel for what cannot be."""
        settings, model = self.settings, self.settings.model
        config, stored = loading.read_config(model)
        place = Place.of(self.device, self.dtype, config.head_dim)
        attending = attention.choose(settings.attention_backend, place, config.n_heads)
        backend, fusion = attending.backend, self._fusion(config)

        def try_form(form: str) -> Trial:
            wanted = weight_bytes(config, self.dtype.itemsize, form)
            transformer, _ = self._load(form, backend, fusion, wanted.least)
            self._announce("try weights")
            return try_out(transformer, vae, backend, shift)

        about = [
            loading.stamp(model),
            devices.describe(self.device),
            devices.library_versions(),
            (self.dtype, backend, settings.compile, settings.max_weight_bytes),
            (shift, settings.vae, settings.vae_tile_px),
            fusion and (fusion.sha256, fusion.scale),
        ]
        forms = Forms(stored, place, try_form, Notes("weights.json"), str(about))
        precision = forms.choose(settings.weights, is_checked=settings.weights_gate)
        transformer, compilation = self._load(precision.form, backend, fusion)
        return Fitted(transformer, attending, precision, compilation, fusion)

    def _fusion(self, shape: DitShape) -> Fusion | None:
        path, scale = self.settings.fused_adapter, self.settings.fused_adapter_scale
        return Fusion.read(path, scale, shape, self.device) if path else None

    def _load(
        self, form: str, backend: str, fusion: Fusion | None, least_room_bytes: float = 0
    ) -> tuple[ZImageTransformer, Compilation]:
        self._announce("load")
        gc.collect()  # a model that was tried hangs in circles
        room_bytes = max(least_room_bytes, devices.weight_room(self.device, self.settings))
        residence = loading.Residence(form, room_bytes)
        model = self.settings.model
        transformer = loading.load_transformer(model, self.device, self.dtype, residence, fusion)
        self._announce("compile")
        return transformer, compile_blocks(transformer, self.settings.compile, backend)

    def _announce(self, work: str) -> None:
        self.announce(work, _SECONDS[work])
