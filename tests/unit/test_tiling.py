"""Tiles: every cell is covered, no seam or border shows, large pictures stay what they are."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dit_service.model.loading import load_vae
from dit_service.model.tiling import Tiling, tiled
from zimage_client._embedded.stack import demo_model

CPU = torch.device("cpu")


@given(
    side=st.integers(2, 12),
    overlap=st.integers(0, 11),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    resolution=st.integers(1, 3),
)
def test_what_looks_at_one_cell_alone_gives_the_same(
    side: int, overlap: int, height: int, width: int, resolution: int
) -> None:
    tiling = Tiling(side, min(overlap, side - 1))
    grid_CHW = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0))

    def work(rows: slice, columns: slice) -> Tensor:
        part_CHW = grid_CHW[:, rows, columns]
        assert max(part_CHW.shape[1:]) <= side
        return part_CHW.repeat_interleave(resolution, 1).repeat_interleave(resolution, 2)

    whole = grid_CHW.repeat_interleave(resolution, 1).repeat_interleave(resolution, 2)
    torch.testing.assert_close(tiled(work, (height, width), resolution, tiling, CPU), whole)


def test_a_tile_counts_less_towards_its_neighbour_and_fully_at_the_border() -> None:
    """Two tiles that disagree: the way from one to the other is straight."""

    def work(rows: slice, columns: slice) -> Tensor:
        value = float(columns.start > 0)
        return torch.full((1, rows.stop - rows.start, columns.stop - columns.start), value)

    [row] = tiled(work, (1, 13), 1, Tiling(8, 3), CPU).squeeze(0).tolist()
    assert row == pytest.approx([0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def _picture(height: int, width: int) -> Tensor:
    """Squares in a row: every tile sees about as much of each colour."""
    rows, columns = torch.arange(height).view(-1, 1) // 32, torch.arange(width).view(1, -1) // 32
    is_red = ((rows + columns) % 2).bool().unsqueeze(-1)
    return torch.where(is_red, torch.tensor([220, 30, 30]), torch.tensor([30, 60, 200])).byte()


@torch.inference_mode()
def test_a_picture_in_tiles_is_nearly_the_whole_one() -> None:
    """Nearly: a VAE's norms look at all of what they are given."""
    whole, in_tiles = (
        load_vae(demo_model(), CPU, torch.float32, tile_px=side) for side in (None, 128)
    )
    picture_HW3 = _picture(256, 384)
    latents_CHW = whole.encode(picture_HW3)
    tiled_latents = in_tiles.encode(picture_HW3)
    assert cosine_similarity(tiled_latents.flatten(), latents_CHW.flatten(), dim=0) > 0.95
    reference, given = (vae.decode(latents_CHW)[0].float() for vae in (whole, in_tiles))
    error = (reference - given).square()
    assert 10 * torch.log10(255**2 / error.mean()) > 35
    # The border is as good as the rest, where it once was black.
    edge = torch.cat([error[0], error[-1], error[:, 0], error[:, -1]])
    assert edge.mean() < 4 * error.mean() + 1
    small_CHW = latents_CHW[:, :16, :16]
    assert torch.equal(whole.decode(small_CHW)[0], in_tiles.decode(small_CHW)[0])


@torch.inference_mode()
def test_by_itself_only_large_pictures_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, side in {"_WHOLE_PX": 160, "LARGE_TILE_PX": 128, "_OVERLAP_PX": 16}.items():
        monkeypatch.setattr(f"dit_service.model.vae.{name}", side)
    usual, in_tiles = (load_vae(demo_model(), CPU, torch.float32, tile_px=px) for px in (None, 128))
    whole = load_vae(demo_model(), CPU, torch.float32, tile_px=1024)
    large_CHW, small_CHW = torch.ones(16, 24, 24), torch.ones(16, 20, 16)
    assert torch.equal(usual.decode(large_CHW)[0], in_tiles.decode(large_CHW)[0])
    assert torch.equal(usual.decode(small_CHW)[0], whole.decode(small_CHW)[0])


@torch.inference_mode()
def test_what_is_no_number_is_noticed_in_any_tile(model_folder: Path) -> None:
    vae = load_vae(model_folder, CPU, torch.float32, tile_px=128)
    latents_CHW = torch.zeros(16, 40, 20)
    assert vae.decode(latents_CHW)[1]
    latents_CHW[0, 39, 19] = torch.nan
    assert not vae.decode(latents_CHW)[1]
