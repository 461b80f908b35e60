"""The limits that RoPE tables set, and that the tables really set them."""

import pytest
import torch

from dit_service.model.config import TransformerConfig
from dit_service.model.layout import SampleShape, build_layout
from dit_service.model.rope import RopeTables
from zimage_core.planning.limits import caption_token_limit, padded, side_limit_px

CONFIG = TransformerConfig(
    dim=12,
    n_layers=1,
    n_refiner_layers=1,
    n_heads=1,
    in_channels=16,
    cap_feat_dim=8,
    patch_size=2,
    axes_dims=(4, 4, 4),
    axes_lens=(98, 5, 7),
    norm_eps=1e-5,
    rope_theta=256.0,
    t_scale=1000.0,
)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 32), (31, 32), (32, 32), (33, 64), (200, 224)])
def test_padded(tokens: int, rows: int) -> None:
    assert padded(tokens) == rows


@pytest.mark.parametrize(
    ("length", "limit"), [(1536, 1504), (1024, 992), (544, 512), (98, 96), (97, 64), (33, 0)]
)
def test_caption_token_limit(length: int, limit: int) -> None:
    assert caption_token_limit((length, 512, 512)) == limit


def test_side_limit() -> None:
    assert side_limit_px((1536, 512, 512)) == 8192
    assert side_limit_px((1536, 512, 384), 8) == 3072


def test_the_tables_reach_as_far_as_the_limits() -> None:
    tables, cpu = RopeTables(CONFIG), torch.device("cpu")
    limit = caption_token_limit(CONFIG.axes_lens)
    build_layout([SampleShape(5, 7, limit)], tables, cpu)
    for beyond in (
        SampleShape(5, 7, limit + 32),
        SampleShape(6, 7, limit),
        SampleShape(5, 8, limit),
    ):
        with pytest.raises(IndexError):
            build_layout([beyond], tables, cpu)
