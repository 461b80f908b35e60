"""The trained model's sizes, on tensors without memory and a device that need not be there."""

import torch

from dit_service.model.config import TransformerConfig
from dit_service.model.layout import Layout
from dit_service.model.narrow import SCALE
from dit_service.model.transformer import Sample, ZImageTransformer

CONFIG = TransformerConfig(
    dim=3840,
    n_layers=30,
    n_refiner_layers=2,
    n_heads=30,
    in_channels=16,
    cap_feat_dim=2560,
    patch_size=2,
    axes_dims=(32, 48, 48),
    axes_lens=(1536, 512, 512),
    norm_eps=1e-5,
    rope_theta=256.0,
    t_scale=1000.0,
)
CUDA = torch.device("cuda", 0)


def fake_transformer(device: torch.device = CUDA, form: str = "full") -> ZImageTransformer:
    """In bfloat16 on a device that is not there, the loader's way; only inside `FakeTensorMode`."""
    with torch.device("meta"):
        transformer = ZImageTransformer(CONFIG)
        if form != "full":
            transformer.make_narrow(form)
    weights = {
        name: torch.empty(weight.shape, dtype=_type(name, weight, form), device=device)
        for name, weight in transformer.state_dict().items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer.requires_grad_(False)


def _type(name: str, weight: torch.Tensor, form: str) -> torch.dtype:
    is_narrow = form != "full" and (weight.element_size() == 1 or name.endswith(SCALE))
    return weight.dtype if is_narrow else torch.bfloat16


def fake_samples(
    transformer: ZImageTransformer, *samples: tuple[int, int, int]
) -> tuple[list[Sample], Layout]:
    """Samples of (latent height, latent width, prompt tokens), each at its own moment."""
    device, width = transformer.device, CONFIG.cap_feat_dim
    features = [torch.empty(length, width, device=device) for *_, length in samples]
    captions = transformer.encode_captions(features)
    modulations = transformer.modulate(torch.empty(len(samples), device=device))
    latents = [torch.empty(16, height, width, device=device) for height, width, _ in samples]
    packed = [Sample(*parts) for parts in zip(latents, captions, modulations, strict=True)]
    shapes = [transformer.shape_of(sample.latents_CHW, sample.caption) for sample in packed]
    return packed, transformer.layout(shapes)
