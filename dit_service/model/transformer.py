"""The Z-Image transformer (S3-DiT): stateless, over any number of samples at once.

What a forward needs besides its latents is computed beforehand and passed in: captions once per
prompt, modulations once per schedule, layouts once per combination of shapes. Parameters carry
diffusers' names.
Shapes: C latent channels of H x W, T packed tokens, S samples, N moments of a schedule, B modulated
blocks, L prompt tokens of width F, D the model's width, A the time embedding's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dit_service.model.adapters import Uses, beside
from dit_service.model.blocks import Block, RMSNorm, run_block
from dit_service.model.config import TransformerConfig
from dit_service.model.final_layer import FinalLayer
from dit_service.model.layout import Layout, SampleShape, build_layout, caption_segments
from dit_service.model.narrow import make_narrow
from dit_service.model.rope import RopeTables
from dit_service.model.streaming import Streaming
from dit_service.model.time_embedder import TimeEmbedder
from dit_service.model.tokens import image_rows, join, pad_samples, patchify, unpatchify
from zimage_core.planning.limits import padded
from zimage_core.planning.linears import block_linears
from zimage_core.planning.memory import FULL

Run = Callable[..., Tensor]
"""What runs a block."""
Call = Callable[..., Tensor]
"""How that is called: with what runs it, and with what that takes."""


def plainly(run: Run, *given: object) -> Tensor:
    """At once; others keep less for the gradient."""
    return run(*given)


@dataclass(frozen=True, eq=False)
class Caption:
    """What a prompt gives to every step of its pictures, by the adapters in use; its rows include
    the pads."""

    rows_TD: Tensor


@dataclass(frozen=True, eq=False)
class Modulation:
    """What one moment of a schedule gives to every block, by the adapters in use."""

    norm_weights_B4D: Tensor
    final_scale_D: Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture at one moment."""

    latents_CHW: Tensor
    caption: Caption
    modulation: Modulation
    adapters: Uses = ()


class ZImageTransformer(nn.Module):
    """Predicts velocities, data minus noise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_tables = RopeTables(config)
        patch = f"{config.patch_size}-1"
        self.all_x_embedder = nn.ModuleDict({patch: nn.Linear(config.patch_dim, config.dim)})
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config)})
        self.t_embedder = TimeEmbedder(config.time_dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps),
            nn.Linear(config.cap_feat_dim, config.dim),
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = _blocks(config, config.n_refiner_layers, modulated=True)
        self.context_refiner = _blocks(config, config.n_refiner_layers, modulated=False)
        self.layers = _blocks(config, config.n_layers, modulated=True)
        self._run: Run = run_block
        self._streaming: Streaming | None = None
        self.weights = FULL
        """The form that its large linears are in."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_pad_token.device

    def compile_blocks(self, *, compiled: bool = True) -> None:
        """Lets blocks run as compiled code, which is made when they are first run, or eagerly. One
        code serves all blocks and all shapes; several samples, or adapters, take another."""
        self._run = (
            torch.compile(run_block, fullgraph=True, dynamic=True) if compiled else run_block
        )

    def make_narrow(self, form: str) -> None:
        """Lets the large linears of all blocks take a byte for each number, in one of the narrow
        forms."""
        self.weights = form
        for stack in (self.noise_refiner, self.context_refiner, self.layers):
            for block in stack:
                make_narrow(block, block_linears(self.config), form)

    @property
    def streamed_block_count(self) -> int:
        """How many blocks take turns on the device."""
        return len(self._streaming or ())

    def stream(self, blocks: Sequence[str]) -> None:
        """Lets the large linears of some blocks, in the order in which they run, stay in host
        memory, where they are, and come to the device for their turn."""
        names = list(block_linears(self.config))
        linears = {
            block: [self.get_submodule(f"{block}.{name}") for name in names] for block in blocks
        }
        self._streaming = Streaming(linears, self.device) if linears else None

    def encode_captions(
        self,
        features: Sequence[Tensor],
        backend: str = "sdpa",
        adapters: Uses = (),
        call: Call = plainly,
    ) -> list[Caption]:
        """Prompt embeddings of [L, F] each, in any float type, to what the steps need of them."""
        lengths = [len(features_LF) for features_LF in features]
        rows = [padded(length) for length in lengths]
        segments = caption_segments(rows, self.rope_tables, self.device)
        norm, linear = self.cap_embedder
        normed_TF = norm(torch.cat([features_LF.float() for features_LF in features]))
        of_tokens = beside([adapters], [sum(lengths)]).of("cap_embedder")
        tokens_TD = of_tokens.through(linear, "1", normed_TF)
        tokens_TD = pad_samples(tokens_TD, lengths, self.cap_pad_token)
        of_rows = beside([adapters], [sum(rows)])
        for name, block in _named("context_refiner", self.context_refiner):
            weights_14D = block.norm_weights()
            tokens_TD = call(
                self._run, block, tokens_TD, weights_14D, segments, backend, of_rows.of(name)
            )
        # A copy each: captions are kept, and a view would keep its neighbours too.
        return [Caption(rows_TD.clone()) for rows_TD in tokens_TD.split(rows)]

    def modulate(self, times_N: Tensor, adapters: Uses = ()) -> list[Modulation]:
        """A whole schedule, or the moments of a batch; a time is 1 - sigma in float32."""
        changes = beside([adapters], [len(times_N)])
        time_NA = self.t_embedder(times_N * self.config.t_scale, changes.of("t_embedder"))
        norm_weights = [
            block.modulated_norm_weights(time_NA, changes.of(name))
            for name, block in (*self._refiner, *self._layers)
        ]
        scales = self._final_layer.scale(time_NA, changes.of("all_final_layer"))
        moments = zip(torch.stack(norm_weights, dim=1), scales, strict=True)
        return [Modulation(norm_weights_B4D, scale_D) for norm_weights_B4D, scale_D in moments]

    def shape_of(self, latents_CHW: Tensor, caption: Caption) -> SampleShape:
        """What a layout needs to know about a sample."""
        _, height, width = latents_CHW.shape
        patch = self.config.patch_size
        return SampleShape(height // patch, width // patch, len(caption.rows_TD))

    def layout(self, shapes: Sequence[SampleShape]) -> Layout:
        """What samples of these shapes share at every step; callers keep it, the model does not."""
        return build_layout(shapes, self.rope_tables, self.device)

    def forward(
        self,
        samples: Sequence[Sample],
        layout: Layout,
        backend: str = "sdpa",
        call: Call = plainly,
    ) -> list[Tensor]:
        """The velocity of each sample, float32 [C, H, W]; each linear runs once over all."""
        norm_weights_BS4D, final_scale_SD = _stack([sample.modulation for sample in samples])
        refiner_weights, layer_weights = norm_weights_BS4D.split(
            [len(self.noise_refiner), len(self.layers)]
        )

        adapters = [sample.adapters for sample in samples]
        of_image = beside(adapters, layout.image.lengths)
        of_joint = beside(adapters, layout.joint.lengths)

        image_TD = self._embed_images(samples)
        for (name, block), weights_S4D in zip(self._refiner, refiner_weights, strict=True):
            self._bring(name)
            image_TD = call(
                self._run, block, image_TD, weights_S4D, layout.image, backend, of_image.of(name)
            )

        joint_TD = join(image_TD, [sample.caption.rows_TD for sample in samples], layout)
        del image_TD
        for (name, block), weights_S4D in zip(self._layers, layer_weights, strict=True):
            self._bring(name)
            joint_TD = call(
                self._run, block, joint_TD, weights_S4D, layout.joint, backend, of_joint.of(name)
            )

        values_TP = self._final_layer(
            image_rows(joint_TD, layout),
            final_scale_SD,
            layout.image,
            of_image.of("all_final_layer"),
        )
        values = values_TP.float().split(list(layout.image.lengths))
        return [
            unpatchify(values_KP, shape, self.config.patch_size)
            for values_KP, shape in zip(values, layout.shapes, strict=True)
        ]

    def _bring(self, block: str) -> None:
        if self._streaming is not None:
            self._streaming.bring(block)

    def _embed_images(self, samples: Sequence[Sample]) -> Tensor:
        (embedder,) = self.all_x_embedder.values()
        patch = self.config.patch_size
        tokens = [patchify(sample.latents_CHW.to(self.dtype), patch) for sample in samples]
        lengths = [len(tokens_KP) for tokens_KP in tokens]
        changes = beside([sample.adapters for sample in samples], lengths).of("all_x_embedder")
        tokens_TD = changes.through(embedder, "", torch.cat(tokens))
        return pad_samples(tokens_TD, lengths, self.x_pad_token)

    @property
    def _refiner(self) -> list[tuple[str, Block]]:
        return _named("noise_refiner", self.noise_refiner)

    @property
    def _layers(self) -> list[tuple[str, Block]]:
        return _named("layers", self.layers)

    @property
    def _final_layer(self) -> FinalLayer:
        (final_layer,) = self.all_final_layer.values()
        return cast("FinalLayer", final_layer)


def _blocks(config: TransformerConfig, count: int, *, modulated: bool) -> nn.ModuleList:
    return nn.ModuleList(Block(config, modulated=modulated) for _ in range(count))


def _named(stack: str, blocks: nn.ModuleList) -> list[tuple[str, Block]]:
    return [(f"{stack}.{index}", cast("Block", block)) for index, block in enumerate(blocks)]


def _stack(modulations: list[Modulation]) -> tuple[Tensor, Tensor]:
    """By block, [B, S, 4, D], and for the final layer; one moment for all samples is one row."""
    if all(modulation is modulations[0] for modulation in modulations):
        modulations = modulations[:1]
    return (
        torch.stack([modulation.norm_weights_B4D for modulation in modulations], dim=1),
        torch.stack([modulation.final_scale_D for modulation in modulations]),
    )
