"""D3: the planner's formulas count what torch counts."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3Model

from demo_model.random_model import Shape
from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import Sample, ZImageTransformer
from tests.device.full_size import CONFIG, CUDA, fake_samples, fake_transformer
from zimage_core.planning import flops

SMALL = [
    Shape().transformer,
    Shape().transformer
    | {"dim": 60, "n_heads": 3, "axes_dims": [8, 6, 6], "cap_feat_dim": 40, "n_refiner_layers": 2},
]


def counted(run: Callable[[], object]) -> int:
    """Attention runs as plain matmuls: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("sizes", SMALL, ids=["demo", "odd"])
def test_small_transformer(sizes: dict[str, object]) -> None:
    config = TransformerConfig.from_values(
        {
            "all_patch_size": [2],
            "in_channels": 16,
            "norm_eps": 1e-5,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            **sizes,
        }
    )
    transformer = ZImageTransformer(config)
    features = [torch.randn(length, config.cap_feat_dim) for length in (1, 32, 45)]
    times = torch.rand(3)
    latents = [torch.randn(16, *size) for size in ((8, 8), (16, 16), (10, 6))]
    with torch.no_grad():
        parts = zip(
            latents, transformer.encode_captions(features), transformer.modulate(times), strict=True
        )
    samples = [Sample(*part) for part in parts]
    shapes = [transformer.shape_of(sample.latents_CHW, sample.caption) for sample in samples]
    layout = transformer.layout(shapes)
    step = [(shape.image_tokens, shape.caption_rows) for shape in shapes]

    assert counted(lambda: transformer.encode_captions(features)) == flops.dit_caption_flops(
        config, [1, 32, 45]
    )
    assert counted(lambda: transformer.modulate(times)) == flops.dit_modulation_flops(config, 3)
    assert counted(lambda: transformer(samples, layout)) == flops.dit_step_flops(config, step)
    weights = sum(parameter.numel() for parameter in transformer.parameters())
    assert weights == flops.dit_parameter_count(config)


@pytest.mark.parametrize(
    "samples", [[(128, 128, 128)], [(64, 64, 20), (256, 256, 512), (22, 26, 33)]]
)
def test_full_size_transformer(samples: list[tuple[int, int, int]]) -> None:
    with FakeTensorMode():
        transformer = fake_transformer()
        with torch.no_grad():
            packed, layout = fake_samples(transformer, *samples)
        step = [(shape.image_tokens, shape.caption_rows) for shape in layout.shapes]
        features = [torch.empty(length, CONFIG.cap_feat_dim, device=CUDA) for *_, length in samples]
        lengths = [length for *_, length in samples]

        assert counted(lambda: transformer(packed, layout)) == flops.dit_step_flops(CONFIG, step)
        assert counted(lambda: transformer.encode_captions(features)) == flops.dit_caption_flops(
            CONFIG, lengths
        )
        times = torch.empty(8, device=CUDA)
        assert counted(lambda: transformer.modulate(times)) == flops.dit_modulation_flops(CONFIG, 8)


def test_full_size_figures() -> None:
    """The published sizes: 6.15 B weights, 56.6 TFLOP per forward at 1024 x 1024."""
    assert flops.dit_parameter_count(CONFIG) == 6_154_908_736
    assert flops.dit_step_flops(CONFIG, [(4096, 128)]) / 1e12 == pytest.approx(56.5, abs=0.1)


@pytest.mark.parametrize("layer_count", [1, 2])
@pytest.mark.parametrize("full_size", [False, True])
def test_encoder(layer_count: int, full_size: bool) -> None:
    sizes = {
        "hidden_size": 2560 if full_size else 96,
        "intermediate_size": 9728 if full_size else 160,
        "num_attention_heads": 32 if full_size else 6,
        "num_key_value_heads": 8 if full_size else 2,
        "head_dim": 128 if full_size else 20,
        "vocab_size": 151936 if full_size else 300,
    }
    shape = flops.EncoderShape(**sizes)
    with FakeTensorMode():
        encoder = Qwen3Model(Qwen3Config(**sizes, num_hidden_layers=layer_count))
        tokens = torch.zeros(1, 37, dtype=torch.long)
        count = counted(lambda: encoder(input_ids=tokens, use_cache=False))
    assert count == flops.encoder_flops(shape, layer_count, [37])
    weights = sum(parameter.numel() for parameter in encoder.layers.parameters())
    weights += encoder.embed_tokens.weight.numel()
    assert weights == flops.encoder_parameter_count(shape, layer_count)
