"""What the demo model is trained with is what it is run with: the recipe's networks against the
libraries and against the service's own, with the same random weights."""

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from demo_model.recipe.networks import TEXT, TRANSFORMER, TextEncoder, Transformer

TOLERANCE = 1e-5


def _spread(network: nn.Module) -> nn.Module:
    """Off the initial constants: zeroed layers would hide faults."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 24), (24, 16)])
@pytest.mark.parametrize("words", [[7, 32], [33, 64]])
def test_velocities_are_those_of_diffusers(height: int, width: int, words: list[int]) -> None:
    ours = _spread(Transformer())
    theirs = ZImageTransformer2DModel(**TRANSFORMER).eval()
    theirs.load_state_dict(ours.state_dict())
    latents = torch.randn(2, 16, height, width)
    times = torch.tensor([0.2, 0.7])
    longest = -(-max(words) // 32) * 32
    features = torch.randn(2, longest, TRANSFORMER["cap_feat_dim"])
    is_text = torch.arange(longest) < torch.tensor(words)[:, None]
    found = ours(latents, times, features, is_text).velocity
    for index, count in enumerate(words):  # each by itself: batches of theirs are padded
        if longest != -(-count // 32) * 32:
            continue  # in a longer batch it would have more pads
        [expected] = theirs(
            [latents[index].unsqueeze(1)], times[index : index + 1], [features[index, :count]]
        ).sample
        difference = (found[index] - expected.squeeze(1)).abs().max() / expected.abs().max()
        assert difference < TOLERANCE


def test_the_text_encoder_is_qwens() -> None:
    ours = _spread(TextEncoder())
    sizes = {name: value for name, value in TEXT.items() if name != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": TEXT["rope_theta"]}
    theirs = Qwen3Model(Qwen3Config(rope_parameters=rope, **sizes)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.randint(0, TEXT["vocab_size"], (2, 40))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[-2]
    found = ours(ids)
    assert (found - expected).abs().max() / expected.abs().max() < TOLERANCE
