"""The engine on one GPU: G1 to G8, at full size with random weights, which are as fast as trained.

    python -m bench.gpu forward|weights|picture|prompt|throughput|training [--small] [--write]

Each part takes less than eight minutes. It wants torch, diffusers, pydantic and platformdirs,
`prompt` transformers and tokenizers, too, and no gRPC: pictures come of the engine, from an
embedding to PNG bytes. --small runs the same on anything, with a model of the demo's size; its
figures mean nothing.
"""

import argparse
import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor, nn

from bench.timing import RESULTS, compare, machine, write_results
from demo_model.random_model import Shape
from dit_service import messages
from dit_service.engine.attention import choose
from dit_service.engine.compiling import compile_blocks
from dit_service.engine.device import describe
from dit_service.engine.generate import Predicted, Studio
from dit_service.engine.packing import Asked
from dit_service.model.attention.backend import Place
from dit_service.model.config import TransformerConfig
from dit_service.model.narrow import FORMS, obstacle
from dit_service.model.transformer import Sample, ZImageTransformer
from dit_service.model.vae import Vae
from dit_service.training.training import Example, Training
from zimage_core.pictures import files
from zimage_core.planning import schedule
from zimage_core.planning.flops import dit_step_flops
from zimage_core.planning.limits import padded
from zimage_core.planning.linears import block_linears
from zimage_core.planning.memory import FULL, turn_count, turning_blocks, weight_bytes
from zimage_core.planning.training import LoraGroup, TrainingPlan
from zimage_core.planning.training_memory import (
    BLOCKS,
    ELEMENTWISE,
    NOTHING,
    OFFLOADED,
    Base,
    Rows,
    forwards,
    largest,
)
from zimage_core.tensors import TensorData

TOKENS, STEPS, SHIFT = 128, 8, 3.0
RANK = 32
FLOOR_FLOPS = 790e12
"""Of bfloat16 matmuls, as measured on an H200."""
_FULL = {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_FULL_VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
_SMALL_QWEN = {"vocab_size": 512, "num_hidden_layers": 3, "intermediate_size": 256}
_TRANSFORMER = {"all_patch_size": [2], "in_channels": 16, "norm_eps": 1e-5, "rope_theta": 256.0}


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Bench:
    """What is measured on."""

    device: torch.device
    dtype: torch.dtype
    is_small: bool

    @property
    def sides_px(self) -> tuple[int, int]:
        """A large picture and a small one."""
        return (128, 64) if self.is_small else (1024, 512)

    @property
    def config(self) -> TransformerConfig:
        sizes = Shape().transformer if self.is_small else _FULL
        return TransformerConfig.from_values({**_TRANSFORMER, "t_scale": 1000.0, **sizes})

    def transformer(self) -> ZImageTransformer:
        with torch.device("meta"):
            empty = ZImageTransformer(self.config)
        return _random(empty.to_empty(device=self.device).to(self.dtype))

    @property
    def place(self) -> Place:
        return Place.of(self.device, self.dtype, self.config.head_dim)

    def peer(self) -> Any:
        sizes = Shape().transformer if self.is_small else _FULL
        with torch.device("meta"):
            empty = ZImageTransformer2DModel(**sizes)
        return _random(empty.to_empty(device=self.device).to(self.dtype))

    def vae(self) -> Vae:
        sizes: dict[str, Any] = Shape().vae if self.is_small else _FULL_VAE
        blocks = len(sizes["block_out_channels"])
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * blocks,
            up_block_types=["UpDecoderBlock2D"] * blocks,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **{"scaling_factor": 0.3611, "shift_factor": 0.1159, **sizes},
        )
        return Vae(_random(model).to(self.device, self.dtype))

    def studio(self, compiled: str = "auto") -> tuple[Studio, dict[str, Any]]:
        """As a worker makes it, with what it chose."""
        transformer = self.transformer()
        attention = choose("auto", self.place, self.config.n_heads)
        compilation = compile_blocks(transformer, compiled, attention.backend)
        studio = Studio(transformer, self.vae(), attention.backend, lambda _what, _seconds: None)
        return studio, {
            "attention": attention.backend,
            "attention_reasons": attention.reasons,
            "compilation": compilation.reason,
        }

    def request(self, side_px: int, seed: int = 0) -> messages.Generate:
        width = self.config.cap_feat_dim
        features = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed))
        return messages.Generate(
            positive=TensorData("float32", (TOKENS, width), features.numpy().tobytes()),
            negative=None,
            seeds=(seed,),
            width_px=side_px,
            height_px=side_px,
            sigmas=schedule.sigmas(schedule.OFFICIAL, STEPS, SHIFT),
            guidance=0.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            is_solo=False,
        )

    def step_flops(self, side_px: int) -> int:
        return dit_step_flops(self.config, [((side_px // 16) ** 2, TOKENS)])

    def finish(self) -> None:
        """Waits for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _random(model: M) -> M:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02)
    model.eval().requires_grad_(False)
    return model


def together(studio: Studio, requests: Sequence[messages.Generate]) -> list[object]:
    """Requests that share every step, as the schedule runs them; their events."""
    events: list[object] = []
    works = [studio.work(request, events.append) for request in requests]
    waiting: list[tuple[Any, Any]] = []

    def go_on(work: Any, predicted: Predicted | None) -> None:
        with contextlib.suppress(StopIteration):
            waiting.append((work, work.send(predicted)))

    for work in works:
        go_on(work, None)
    while waiting:
        asked = [(work, one) for work, one in waiting if isinstance(one, Asked)]
        others = [(work, one) for work, one in waiting if not isinstance(one, Asked)]
        waiting.clear()
        for work, awaited in others:
            if not asked:
                awaited.wait()
            go_on(work, None) if awaited.is_there else waiting.append((work, awaited))
        if asked:
            predicted = studio.predict([one for _, one in asked])
            for (work, _), own in zip(asked, predicted, strict=True):
                go_on(work, own)
    return events


def forward(bench: Bench) -> Iterator[dict[str, Any]]:
    """One forward of one picture: ours, compiled and not, and diffusers'."""
    models = {"eager": bench.transformer(), "compiled": bench.transformer()}
    attention = choose("auto", bench.place, bench.config.n_heads)
    compilation = compile_blocks(models["compiled"], "on", attention.backend)
    peer = bench.peer()
    for side_px in bench.sides_px:
        latents = torch.randn(16, side_px // 8, side_px // 8, device=bench.device)
        features = torch.randn(TOKENS, bench.config.cap_feat_dim, device=bench.device)
        runs = {
            name: _ours(bench, model, attention.backend, (latents, features))
            for name, model in models.items()
        }
        timings = compare(7, diffusers=_theirs(bench, peer, (latents, features)), **runs)
        yield {
            "side_px": side_px,
            "attention": attention.backend,
            "attention_reasons": attention.reasons,
            "compilation": compilation.reason,
            "floor_ms": round(bench.step_flops(side_px) / FLOOR_FLOPS * 1e3, 2),
            **{f"{name}_ms": round(timings.median(name) * 1e3, 2) for name in timings.seconds},
        }


def weights(bench: Bench) -> Iterator[dict[str, Any]]:
    """One forward with weights in every form that works here, compiled; and with full ones in less
    memory, where blocks take turns."""
    attention = choose("auto", bench.place, bench.config.n_heads)
    side_px = bench.sides_px[0]
    inputs = (
        torch.randn(16, side_px // 8, side_px // 8, device=bench.device),
        torch.randn(TOKENS, bench.config.cap_feat_dim, device=bench.device),
    )
    for form in FORMS:
        if why := obstacle(form, bench.place):
            yield {"form": form, "obstacle": why}
            continue
        model = bench.transformer()
        if form != FULL:
            model.make_narrow(form)
        compilation = compile_blocks(model, "auto", attention.backend)
        timings = compare(5, forward=_ours(bench, model, attention.backend, inputs))
        yield {
            "form": form,
            "compilation": compilation.reason,
            "forward_ms": round(timings.median("forward") * 1e3, 2),
            "peak_gb": _peak_gb(bench),
        }
        del model
    size = weight_bytes(bench.config, bench.dtype.itemsize)
    for share in (0.75, 0.5, 0.0):
        count = turn_count(size, size.least + share * (size.all - size.least))
        model = bench.transformer()
        model.stream(turning_blocks(bench.config, count))
        timings = compare(5, forward=_ours(bench, model, attention.backend, inputs))
        yield {
            "turning_blocks": count,
            "gb_per_step": round(count * size.block / 1e9, 2),
            "forward_ms": round(timings.median("forward") * 1e3, 2),
            "peak_gb": _peak_gb(bench),
        }
        del model


def _ours(
    bench: Bench, model: ZImageTransformer, backend: str, inputs: tuple[Tensor, Tensor]
) -> Callable[[], object]:
    latents, features = inputs
    [caption] = model.encode_captions([features], backend)
    [moment] = model.modulate(torch.tensor([0.5], device=bench.device))
    layout = model.layout([model.shape_of(latents, caption)])

    def run() -> None:
        model([Sample(latents, caption, moment)], layout, backend)
        bench.finish()

    return run


def _theirs(bench: Bench, peer: Any, inputs: tuple[Tensor, Tensor]) -> Callable[[], object]:
    latents, features = ([one.to(bench.dtype)] for one in inputs)
    time_1 = torch.tensor([0.5], device=bench.device)

    def run() -> None:
        peer([latents[0].unsqueeze(1)], time_1, features, return_dict=False)
        bench.finish()

    return run


def picture(bench: Bench) -> Iterator[dict[str, Any]]:
    """G1 and the engine's part of G2: one picture, denoised, decoded, as PNG."""
    studio, chosen = bench.studio()
    for side_px in bench.sides_px:
        request, took, denoised = bench.request(side_px), [], []
        for _ in range(6):
            bench.finish()
            began = time.perf_counter()
            events = together(studio, [request])
            _png(events, side_px)
            took.append(time.perf_counter() - began)
            for event in events:
                if isinstance(event, messages.Spent):
                    denoised.append(event.denoise_seconds)
        yield {
            "side_px": side_px,
            **chosen,
            "floor_seconds": round(STEPS * bench.step_flops(side_px) / FLOOR_FLOPS, 4),
            "denoise_seconds": round(statistics.median(denoised[1:]), 4),
            "to_png_seconds": round(statistics.median(took[1:]), 4),
            "peak_gb": _peak_gb(bench),
        }


def prompt(bench: Bench) -> Iterator[dict[str, Any]]:
    """G2 with the encoder on another device: Qwen3-4B on the host, then the picture."""
    from bench import encoder
    from demo_model.random_model import byte_level_tokenizer
    from encoder_service.prompt import Tokenizer

    studio, chosen = bench.studio()
    small = {"hidden_size": bench.config.cap_feat_dim, **_SMALL_QWEN}
    sizes = encoder.QWEN3_4B | (small if bench.is_small else {})
    with tempfile.TemporaryDirectory() as scratch:
        byte_level_tokenizer().save_pretrained(scratch)
        tokenizer = Tokenizer(Path(scratch) / "tokenizer.json")
    encode = encoder.ours(encoder.random_model(sizes), tokenizer)
    for side_px in bench.sides_px:
        encoding, whole = [], []
        for _ in range(6):
            began = time.perf_counter()
            features = encode().float()
            encoding.append(time.perf_counter() - began)
            shape = tuple(features.shape)
            embedding = TensorData("float32", shape, features.numpy().tobytes())
            request = replace(bench.request(side_px), positive=embedding)
            _png(together(studio, [request]), side_px)
            whole.append(time.perf_counter() - began)
        yield {
            "side_px": side_px,
            **chosen,
            "prompt_tokens": shape[0],
            "encode_seconds": round(statistics.median(encoding[1:]), 4),
            "prompt_to_png_seconds": round(statistics.median(whole[1:]), 4),
        }


def _png(events: Sequence[object], side_px: int) -> bytes:
    [rgb] = [event.rgb for event in events if isinstance(event, messages.Picture)]
    return files.encode(rgb, (side_px, side_px), "png", files.DEFAULT_QUALITY)


def throughput(bench: Bench) -> Iterator[dict[str, Any]]:
    """G3 to G5: pictures a second when so many share every step."""
    studio, chosen = bench.studio()
    for side_px in bench.sides_px:
        for count in (1, 2, 4, 8):
            requests = [bench.request(side_px, seed) for seed in range(count)]
            together(studio, requests)
            bench.finish()
            began = time.perf_counter()
            events = together(studio, requests)
            took = time.perf_counter() - began
            spent = [event for event in events if isinstance(event, messages.Spent)]
            denoising = sum(one.denoise_seconds for one in spent)
            yield {
                "side_px": side_px,
                "together": count,
                **(chosen if count == 1 else {}),
                "pictures_per_second": round(count / took, 3),
                "not_dit": round(1 - denoising / took, 3),
                "peak_gb": _peak_gb(bench),
            }


def training(bench: Bench) -> Iterator[dict[str, Any]]:
    """G6 to G8, and the other ways to compute the same steps."""
    with torch.inference_mode(mode=False):
        yield from [row for case in _TRAININGS for row in _training(bench, *case)]


_TRAININGS = (
    ("G6", 0, 1, BLOCKS),
    ("G7", 0, 4, BLOCKS),
    ("G8", 1, 1, NOTHING),
    ("", 0, 1, NOTHING),
    ("", 0, 1, ELEMENTWISE),
    ("", 0, 1, OFFLOADED),
    ("", 0, 4, ELEMENTWISE),
)
"""What is asked for, whether of the large side or the small one, how many samples, what is computed
again."""


def _training(
    bench: Bench, asked: str, which_side: int, count: int, recompute: str
) -> Iterator[dict[str, Any]]:
    """Steps of a LoRA of rank 32, as they are and compiled."""
    side_px, config, model = bench.sides_px[which_side], bench.config, bench.transformer()
    attention = choose("auto", bench.place, config.n_heads)
    tokens = (side_px // 16) ** 2
    lora = LoraGroup("layers", 0, config.n_layers, tuple(block_linears(config)), RANK, RANK)
    for compiled in (False, True):
        plan = TrainingPlan(
            0, 100, (lora,), samples_at_once=count, recompute=recompute, compiled=compiled
        )
        course = Training(model, attention.backend, plan)
        if compiled:
            course.try_out()
        examples = [
            Example(
                torch.randn(16, side_px // 8, side_px // 8, device=bench.device),
                torch.randn(TOKENS, config.cap_feat_dim, device=bench.device, dtype=bench.dtype),
                1 / count,
            )
            for _ in range(count)
        ]

        def step(course: Training = course, examples: list[Example] = examples) -> None:
            course.learn(examples, 0)
            course.take_step()

        _peak_gb(bench)
        timings = compare(7, step=step)
        rows = [Rows(padded(tokens), padded(TOKENS))] * count
        base = Base(bench.dtype.itemsize, is_apart=bench.device.type == "cuda")
        flops = forwards(plan) * dit_step_flops(config, [(tokens, TOKENS)] * count)
        yield {
            "asked": asked,
            "side_px": side_px,
            "batch": count,
            "recompute": recompute,
            "compiled": compiled,
            "attention": attention.backend,
            "step_seconds": round(timings.median("step"), 4),
            "floor_seconds": round(flops / FLOOR_FLOPS, 4),
            "peak_gb": _peak_gb(bench),
            "planned_gb": round(largest(config, plan, rows, base).all / 1e9, 2),
        }
        course.close()


def _peak_gb(bench: Bench) -> float | None:
    if bench.device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(bench.device) / 1e9
    torch.cuda.reset_peak_memory_stats(bench.device)
    return round(peak, 2)


PARTS = {
    "forward": forward,
    "weights": weights,
    "picture": picture,
    "prompt": prompt,
    "throughput": throughput,
    "training": training,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="a small model, for any device")
    parser.add_argument("--write", action="store_true", help="keep the figures")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.small:
        parser.error("there is no GPU here; --small runs the same on anything")
    device = torch.device("cuda" if has_gpu else "cpu")
    bench = Bench(device, torch.bfloat16 if has_gpu else torch.float32, arguments.small)
    rows = []
    for row in PARTS[arguments.part](bench):
        print(row, flush=True)
        rows.append(row)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    results = {"machine": machine("torch", "diffusers"), "device": describe(device)}
    if arguments.write:
        (RESULTS / "gpu").mkdir(exist_ok=True)
        print(write_results(f"gpu/{arguments.part}", {**results, "commit": commit, "rows": rows}))


if __name__ == "__main__":
    main()
