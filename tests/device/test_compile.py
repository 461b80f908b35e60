"""D4: blocks compile to one graph around opaque attention and adapters; it serves every shape."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo_model.random_model import Shape
from dit_service import messages
from dit_service.engine.compiling import compile_blocks
from dit_service.engine.diary import Diary
from dit_service.engine.training import Means, Trainings
from dit_service.model.adapters import Adapter, Change, Use, Uses
from dit_service.model.config import TransformerConfig
from dit_service.model.transformer import Modulation, Sample, ZImageTransformer
from dit_service.training.training import Training
from tests.training_examples import drawn_batch
from zimage_core.errors import NotReady
from zimage_core.planning.linears import block_linears
from zimage_core.planning.training import LoraGroup, TrainingPlan

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
TOLERANCE = 1e-4  # of the largest absolute value
NARROW_TOLERANCE = {"int8": 1e-4, "fp8_matmul": 0.02}

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU, and there is none",
)

_Wish = tuple[int, int, int, float]
"""Height and width of the latents, prompt tokens, a time."""
SINGLE: list[list[_Wish]] = [[(16, 16, 70, 0.2)], [(20, 14, 33, 0.7)], [(10, 18, 224, 0.5)]]
PACKED: list[list[_Wish]] = [
    [(16, 16, 20, 0.1), (20, 14, 64, 0.3)],
    [(8, 8, 9, 0.4), (8, 8, 9, 0.4), (8, 8, 9, 0.4)],
    [(32, 32, 150, 0.9), (10, 18, 3, 0.8), (16, 16, 32, 0.2), (14, 14, 90, 0.2), (8, 12, 31, 0.1)],
]


@pytest.fixture(autouse=True)
def _compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def model() -> ZImageTransformer:
    torch.manual_seed(0)
    model = ZImageTransformer(CONFIG).eval().requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.05)
    return model


def _adapter(rank: int) -> Adapter:
    """For some linears of some blocks."""

    def change(out_width: int, width: int) -> Change:
        return Change(0.1 * torch.randn(rank, width), 0.1 * torch.randn(out_width, rank), 1.5)

    dim, ffn_dim = CONFIG.dim, CONFIG.ffn_dim
    return Adapter(
        {
            "layers.1": {
                "attention.to_k": change(dim, dim),
                "feed_forward.w2": change(dim, ffn_dim),
            },
            "noise_refiner.0": {"feed_forward.w1": change(ffn_dim, dim)},
            "context_refiner.0": {"attention.to_out.0": change(dim, dim)},
        }
    )


def _velocities(
    model: ZImageTransformer, wishes: Sequence[_Wish], uses: Sequence[Uses]
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(wishes))
    samples: list[Sample] = []
    moments: dict[object, Modulation] = {}
    for (height, width, tokens, time), own in zip(wishes, uses, strict=True):
        features = torch.randn(tokens, CONFIG.cap_feat_dim, generator=generator)
        [caption] = model.encode_captions([features], adapters=own)
        if (time, own) not in moments:  # guidance has two samples of one moment
            [moments[time, own]] = model.modulate(torch.tensor([time]), own)
        latents = torch.randn(16, height, width, generator=generator)
        samples.append(Sample(latents, caption, moments[time, own], own))
    layout = model.layout([model.shape_of(one.latents_CHW, one.caption) for one in samples])
    velocities: list[Tensor] = model(samples, layout)
    return velocities


@needs_compiler
@pytest.mark.timeout(300)  # a C++ compiler takes a minute for four graphs on a busy core
@torch.inference_mode()
def test_four_graphs_for_all_shapes_and_adapters(model: ZImageTransformer) -> None:
    torch.manual_seed(1)
    small, large = (Use(_adapter(2), 0.8),), (Use(_adapter(16), 0.5), Use(_adapter(3), -0.3))
    cases = [(wishes, [uses] * len(wishes)) for wishes in SINGLE for uses in ((), small, large)]
    for wishes in PACKED:
        own = [((), small, large)[index % 3] for index in range(len(wishes))]
        cases += [(wishes, [()] * len(wishes)), (wishes, own), (wishes, [small] * len(wishes))]
    eager = [_velocities(model, *case) for case in cases]
    torch._dynamo.utils.counters.clear()
    compilation = compile_blocks(model, "on", "sdpa")
    assert compilation.is_compiled, compilation.reason
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    with torch.compiler.set_stance("fail_on_recompile"):
        for blocks in ([], [f"layers.{index}" for index in range(4)]):  # that take turns
            with torch.inference_mode(mode=False):  # as the others of this model were made
                model.stream(blocks)
            for case, expected in zip(cases, eager, strict=True):
                for velocity, other in zip(_velocities(model, *case), expected, strict=True):
                    assert (velocity - other).abs().max() <= TOLERANCE * other.abs().max()


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", ["int8", "fp8_matmul"])
@torch.inference_mode()
def test_narrow_weights_compile(model: ZImageTransformer, form: str) -> None:
    """The rounding of a fused scale may go the other way: eight bits are not so exact."""
    model.make_narrow(form)
    [eager] = _velocities(model, SINGLE[0], [()])
    model.compile_blocks()
    [compiled] = _velocities(model, SINGLE[0], [()])
    assert (compiled - eager).norm() <= NARROW_TOLERANCE[form] * eager.norm()


@torch.inference_mode()
def test_a_compiler_that_fails_costs_no_picture(model: ZImageTransformer) -> None:
    expected = _velocities(model, SINGLE[0], [()])[0]
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(broken):
        compilation = compile_blocks(model, "on", "sdpa")
    assert not compilation.is_compiled
    assert compilation.reason.startswith("it failed: ")
    assert _velocities(model, SINGLE[0], [()])[0].equal(expected)


def test_a_cpu_compiles_only_where_it_is_asked_to(model: ZImageTransformer) -> None:
    assert not compile_blocks(model, "auto", "sdpa").is_compiled
    assert not compile_blocks(model, "off", "sdpa").is_compiled


LEARNT = TrainingPlan(
    seed=3,
    step_count=4,
    lora=(LoraGroup("layers", 0, CONFIG.n_layers, tuple(block_linears(CONFIG)), 4, 4.0),),
    samples_at_once=2,
    compiled=True,
)


def _learn(
    model: ZImageTransformer, plan: TrainingPlan, first: int, state: dict[str, Tensor]
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """The losses of steps from one on, and the states behind them."""
    training = Training(model, "sdpa", plan, state, first)
    if plan.compiled:
        training.try_out()
    torch._dynamo.utils.counters.clear()
    losses, states = [], []
    for step in range(first, plan.step_count):
        batch = drawn_batch(CONFIG.cap_feat_dim, [(8, 12), (16, 16), (10, 8)], [31, 70, 1], step)
        training.learn(batch[:2], 0)
        training.learn(batch[2:], 2)
        losses.append(training.take_step().loss)
        states.append({name: one.clone() for name, one in training.state().items()})
    assert not torch._dynamo.utils.counters["stats"]  # all code was made before
    return losses, states


@needs_compiler
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_learn_the_same_and_go_on_bit_for_bit(model: ZImageTransformer) -> None:
    expected, _ = _learn(model, replace(LEARNT, compiled=False), 0, {})
    losses, states = _learn(model, LEARNT, 0, {})
    assert losses == pytest.approx(expected, rel=1e-5)
    again, other = _learn(model, LEARNT, 2, states[1])
    assert again == losses[2:]
    assert all(torch.equal(one, other[-1][name]) for name, one in states[-1].items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_training_that_cannot_be_compiled_is_refused_by_name(model: ZImageTransformer) -> None:
    trainings = Trainings(model, "sdpa", lambda *_told: None, Diary(), Means())
    asked = messages.OpenTraining("job/1", replace(LEARNT), (), None)
    broken = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with (
        torch._inductor.config.patch(broken),
        pytest.raises(NotReady, match="cannot train with compiled blocks: "),
    ):
        list(trainings.turn_to(asked, lambda _told: None))
