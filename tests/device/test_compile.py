"""D4: a block compiles to one graph around its opaque attention and serves every shape."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo_model.random_model import Shape
from dit_service.model.blocks import Block
from dit_service.model.config import TransformerConfig
from dit_service.model.layout import SampleShape, Segments, build_layout
from dit_service.model.rope import RopeTables

CONFIG = TransformerConfig.from_values(
    {
        "all_patch_size": [2],
        "in_channels": 16,
        "norm_eps": 1e-5,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        **Shape().transformer,
    }
)
TABLES = RopeTables(CONFIG)
TOLERANCE = 1e-4  # of the largest absolute value

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU, and there is none",
)


def inputs(*shapes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Segments]:
    layout = build_layout([SampleShape(*shape) for shape in shapes], TABLES, torch.device("cpu"))
    segments = layout.joint
    generator = torch.Generator().manual_seed(len(shapes))
    x_TD = torch.randn(sum(segments.lengths), CONFIG.dim, generator=generator)
    norm_weights_S4D = torch.randn(len(shapes), 4, CONFIG.dim, generator=generator)
    return x_TD, norm_weights_S4D, segments


SINGLE = [((8, 8, 32),), ((10, 7, 64),), ((16, 16, 32),), ((5, 9, 224),)]
PACKED = [
    ((8, 8, 32), (10, 7, 64)),
    ((4, 4, 32), (4, 4, 32), (4, 4, 32)),
    ((16, 16, 160), (5, 9, 32), (8, 8, 32), (7, 7, 96), (4, 6, 32)),
]


@needs_compiler
@torch.inference_mode()
def test_one_graph_for_all_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches show it all there is to see: one sample, and several."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    block = Block(CONFIG, modulated=True)
    compiled = torch.compile(block, fullgraph=True)
    for shapes in (SINGLE[0], PACKED[0]):
        x_TD, norm_weights_S4D, segments = inputs(*shapes)
        for tensor in (x_TD, segments.sample_T, *segments.rope):
            torch._dynamo.mark_dynamic(tensor, 0)
        if len(shapes) > 1:
            torch._dynamo.mark_dynamic(norm_weights_S4D, 0)
            torch._dynamo.mark_dynamic(segments.bounds, 0)
        compiled(x_TD, norm_weights_S4D, segments, "sdpa")
    with torch.compiler.set_stance("fail_on_recompile"):
        for shapes in (*SINGLE, *PACKED):
            arguments = inputs(*shapes)
            result, reference = compiled(*arguments, "sdpa"), block(*arguments, "sdpa")
            assert (result - reference).abs().max() <= TOLERANCE * reference.abs().max()
