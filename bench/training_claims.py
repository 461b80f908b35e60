"""What is said of training elsewhere, beside what is so: frozen weights that are narrow, computing
blocks again, optimisers of eight bits, keeping what was encoded.

    python -m bench.training_claims [--write]

Losses are of real trainings of the demo model through all three services; the rest is full-size
arithmetic, of which tests say that it holds.
"""

import asyncio
import contextlib
import statistics
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import machine, write_results
from bench.training import job, services
from bench.vae import SIZES
from demo_model.learning import draw_new
from zimage_client import AsyncTrainer, TrainCheckpoint, TrainStep
from zimage_core.formats.published import DIT_SHAPE
from zimage_core.planning.flops import dit_step_flops
from zimage_core.planning.linears import block_linears
from zimage_core.planning.training import LoraGroup, Optimizer, TrainingPlan
from zimage_core.planning.training_memory import BLOCKS, NOTHING, Base, Rows, forwards, largest

FORMS = ("full", "int8", "fp8", "nf4")
CAPTIONS = "full, captions in eight bits"
STEPS = 60
TASK = (
    *("--steps", str(STEPS), "--batch-size", "4", "--learning-rate", "0.002"),
    *("--validation", "0.2", "--checkpoint-interval", str(STEPS)),
)
ENCODER_PARAMETERS, CAPTION_TOKENS = 3.6e9, 128
"""Of Qwen3-4B without its embedding table; each costs two operations for each token."""
LORA = (LoraGroup("layers", 0, DIT_SHAPE.n_layers, tuple(block_linears(DIT_SHAPE)), 16, 16.0),)


async def losses(form: str, pictures: Path) -> tuple[list[float], float]:
    """Of each step, and of what was not learnt in the end."""
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--weights", form.partition(",")[0], "--no-weights-gate"]
        narrow = ["--narrow-captions"] if form == CAPTIONS else []
        async with services(Path(scratch), more) as address, AsyncTrainer(address) as trainer:
            name = await job(address, "--images", str(pictures), *narrow, *TASK)
            events = [one async for one in _all(trainer, name)]
    steps = [one.loss for one in events if isinstance(one, TrainStep)]
    [last] = [one for one in events if isinstance(one, TrainCheckpoint)]
    assert last.validation_loss is not None
    return steps, last.validation_loss


async def _all(trainer: AsyncTrainer, name: str) -> AsyncIterator[object]:
    async with contextlib.aclosing(trainer.watch(name)) as events:
        async for event in events:
            yield event


def drift() -> dict[str, Any]:
    """Each form's losses beside those of the full weights."""
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        draw_new(pictures)
        found = {form: asyncio.run(losses(form, pictures)) for form in (*FORMS, CAPTIONS)}
    full, full_in_the_end = found["full"]
    rows = {}
    for form, (steps, in_the_end) in found.items():
        apart = [abs(one - other) / other for one, other in zip(steps, full, strict=True)]
        rows[form] = {
            "mean_apart": round(statistics.mean(apart), 5),
            "most_apart": round(max(apart), 5),
            "validation_loss": round(in_the_end, 5),
            "validation_apart": round(in_the_end / full_in_the_end - 1, 5),
        }
        print(form, rows[form], flush=True)
    return rows


def memory() -> dict[str, Any]:
    """What computing blocks again saves, and what an optimiser of eight bits does."""
    sample, base = [Rows(4096, CAPTION_TOKENS)], Base(2)
    plan = TrainingPlan(0, 1, LORA, recompute=NOTHING)
    kept, again = (
        largest(DIT_SHAPE, replace(plan, recompute=way), sample, base).step
        for way in (NOTHING, BLOCKS)
    )
    whole = TrainingPlan(0, 1, full=True)
    rows: dict[str, Any] = {"computing_blocks_again_saves": round(1 - again / kept, 3)}
    for what, one in (("adapter", plan), ("full", whole)):
        usual, eight = (
            largest(DIT_SHAPE, replace(one, optimizer=Optimizer(name)), sample, base)
            for name in ("adamw", "adamw_8bit")
        )
        saved = usual.learnt - eight.learnt
        rows[f"adamw_8bit_saves_gib_{what}"] = round(saved / 2**30, 2)
        rows[f"adamw_8bit_saves_of_all_{what}"] = round(saved / usual.all, 3)
    return rows


def keeping() -> dict[str, Any]:
    """What a step would take longer if its captions and pictures were encoded every time, on a
    device that does all of it: by operations."""
    rows = {}
    for side in (512, 1024):
        tokens = (side // 16) ** 2
        step = forwards(TrainingPlan(0, 1, LORA, recompute=BLOCKS)) * dit_step_flops(
            DIT_SHAPE, [(tokens, CAPTION_TOKENS)]
        )
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            vae: Any = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=16,
                **SIZES,
            )
            vae.encode(torch.empty(1, 3, side, side))
        encoding = counter.get_total_flops() + 2 * ENCODER_PARAMETERS * CAPTION_TOKENS
        rows[f"{side}px"] = round(encoding / step, 3)
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    arguments = parser.parse_args()
    began = time.monotonic()
    results: dict[str, Any] = {"machine": machine("torch", "diffusers")}
    results["memory"] = memory()
    results["encoding_every_time_costs"] = keeping()
    print(results, flush=True)
    results["narrow"] = drift()
    results["seconds"] = round(time.monotonic() - began)
    if arguments.write:
        print(write_results("training_claims", results))


if __name__ == "__main__":
    main()
