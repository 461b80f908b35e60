"""Our transformer behind the call of diffusers' own, so that it drops into its ZImagePipeline."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dit_service.model.transformer import Sample, ZImageTransformer


class DiffusersFace(nn.Module):
    """Takes lists of latents and prompt embeddings; computes everything anew in every call."""

    def __init__(self, transformer: ZImageTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.in_channels = transformer.config.in_channels
        self.config = SimpleNamespace(**vars(transformer.config))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    def forward(
        self,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        *,
        return_dict: bool = True,
        joint_attention_kwargs: None = None,
    ) -> tuple[list[Tensor]]:
        """Latents [C, 1, H, W], times [S], prompt embeddings [L, F]; velocities [C, 1, H, W]."""
        if return_dict or joint_attention_kwargs is not None:
            raise ValueError("return_dict=False is the only form, without joint_attention_kwargs")
        captions = self.transformer.encode_captions(cap_feats)
        modulations = self.transformer.modulate(t)
        samples = [
            Sample(latents.squeeze(1), caption, modulation)
            for latents, caption, modulation in zip(x, captions, modulations, strict=True)
        ]
        layout = self.transformer.layout(
            [self.transformer.shape_of(sample.latents_CHW, sample.caption) for sample in samples]
        )
        velocities = self.transformer(samples, layout)
        return ([velocity.unsqueeze(1).to(self.dtype) for velocity in velocities],)
