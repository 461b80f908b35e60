"""Training: what a step costs against a plain loop over diffusers' module with peft, in seconds and
memory; how long the device waits for data (C10); how soon the first step begins (C11).

    python -m bench.training [--ways] [--write]

The first part runs in a process of its own for each case, whose peak memory is its own; the second
goes through all three services. With --ways, how blocks may be computed instead, at a batch of
four.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.dit import MIXED, SIZES
from bench.engine import running
from bench.timing import machine, write_results
from zimage_client import AsyncClient, AsyncTrainer, TrainStep
from zimage_client._embedded.stack import demo_model
from zimage_core.errors import ZImageError

BATCHES = (1, 2, 4, 8)
WAYS = ("diffusers", "one_by_one", "packed", "packed_blocks")
"""The plain loop; ours, one sample at a time; all at once; the same, blocks computed again."""
_COMPUTED = {
    "one_by_one": ("blocks", False),
    "packed": ("nothing", False),
    "packed_elementwise": ("elementwise", False),
    "packed_blocks": ("blocks", False),
    "packed_compiled": ("elementwise", True),
    "packed_blocks_compiled": ("blocks", True),
}
"""What is computed again, and whether blocks are compiled."""
LINEARS = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)
_SIZES: dict[str, Any] = SIZES
SIDE = 32
RANK = 16
STEPS = 2
UNCACHED = 1000
WARM_STEPS = 120


def one_case(folder: Path, way: str, batch: int) -> dict[str, float]:
    """Seconds of a step, and what the process had at most more than before the first."""
    import torch

    from dit_service.engine.heap import prepare_heap

    prepare_heap()
    torch.set_num_threads(2)
    step = _plain_loop(folder, batch) if way == "diffusers" else _ours(folder, way, batch)
    before = _forget_peak()
    step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "bytes": _peak_bytes() - before}


def _plain_loop(folder: Path, batch: int) -> Callable[[], object]:
    """What most people write: a sample at a time through the list, gradients added up."""
    import torch
    from diffusers import ZImageTransformer2DModel
    from peft import LoraConfig

    model: Any = ZImageTransformer2DModel.from_pretrained(
        folder / "transformer", low_cpu_mem_usage=False
    )
    model.requires_grad_(False)
    model.enable_gradient_checkpointing()
    layers = [f"layers.{n}.{linear}" for n in range(_SIZES["n_layers"]) for linear in LINEARS]
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers))
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4)

    def step() -> None:
        for length in _lengths(batch):
            latents, noise = torch.randn(2, 16, 1, SIDE, SIDE)
            at = torch.rand(1)
            given = torch.lerp(noise, latents, at)
            features = torch.randn(length, _SIZES["cap_feat_dim"])
            [velocity] = model([given], at, [features], return_dict=False)[0]
            ((velocity - (latents - noise)).square().mean() / batch).backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(folder: Path, way: str, batch: int) -> Callable[[], object]:
    import torch

    from dit_service.model.loading import load_transformer
    from dit_service.training.training import Example, Training
    from zimage_core.planning.training import LoraGroup, TrainingPlan

    model = load_transformer(folder, torch.device("cpu"), torch.float32).requires_grad_(False)
    recompute, compiled = _COMPUTED[way]
    plan = TrainingPlan(
        seed=0,
        step_count=1000,
        lora=(LoraGroup("layers", 0, model.config.n_layers, LINEARS, RANK, RANK),),
        recompute=recompute,
        compiled=compiled,
    )
    training = Training(model, "sdpa", plan)
    if compiled:
        training.try_out()
    examples = [
        Example(
            torch.randn(16, SIDE, SIDE), torch.randn(length, model.config.cap_feat_dim), 1 / batch
        )
        for length in _lengths(batch)
    ]
    at_once = 1 if way == "one_by_one" else batch

    def step() -> None:
        for first in range(0, batch, at_once):
            training.learn(examples[first : first + at_once], first)
        training.take_step()

    return step


def _lengths(batch: int) -> list[int]:
    return [MIXED[index % len(MIXED)] for index in range(batch)]


def _forget_peak() -> int:
    """What the process has now; from here on its peak counts anew, as Linux can."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    told = Path("/proc/self/status").read_text()
    [line] = [line for line in told.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def compare(
    folder: Path, rounds: int, batches: Sequence[int] = BATCHES, ways: Sequence[str] = WAYS
) -> list[dict[str, Any]]:
    """All ways in turn, round by round; medians of seconds and of their ratios to the first."""
    from demo_model.random_model import Shape, build

    build(folder, Shape(transformer=SIZES))
    rows = []
    for batch in batches:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                command = [sys.executable, "-m", "bench.training", "--case"]
                command += [str(folder), way, str(batch)]
                runs[way].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
        row: dict[str, Any] = {"batch": batch}
        for way, told in runs.items():
            pairs = zip(runs[ways[0]], told, strict=True)
            row[way] = {
                "seconds": round(statistics.median(one["seconds"] for one in told), 3),
                "gigabytes": round(statistics.median(one["bytes"] for one in told) / 1e9, 3),
                f"speed_over_{ways[0]}": round(
                    statistics.median(peer["seconds"] / one["seconds"] for peer, one in pairs), 2
                ),
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def _pictures(folder: Path, count: int) -> Path:
    """So many, each with a caption of its own."""
    from PIL import Image

    folder.mkdir()
    chance = random.Random(0)  # noqa: S311 - no secret
    for number in range(count):
        colour = tuple(chance.randrange(256) for _ in range(3))
        Image.new("RGB", (64, 64), colour).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"a plain picture, number {number}")
    return folder


@contextlib.asynccontextmanager
async def services(scratch: Path, more: Sequence[str] = ()) -> AsyncIterator[str]:
    """All three with the demo model, `more` for the DiT service; the trainer's address."""
    at = {name: f"unix:{scratch / name}.sock" for name in ("encoder", "dit", "trainer")}
    common = ["--probes", "", "--config", os.devnull]
    model = ["--model", str(demo_model()), *common]
    encoder, dit = ["--encoder", at["encoder"]], ["--dit", at["dit"]]
    places = ["--store", str(scratch / "store"), "--database", f"sqlite:///{scratch}/jobs"]
    async with (
        running("encoder_service", "--listen", at["encoder"], *model),
        running(
            *("dit_service", "--listen", at["dit"], *encoder, "--store", str(scratch / "dit")),
            *(*model, *more),
        ),
        running("trainer_service", "--listen", at["trainer"], *encoder, *dit, *places, *common),
        AsyncClient(at["dit"]) as client,
    ):
        while True:
            try:
                if (await client.describe()).ready:
                    break
            except ZImageError:
                pass
            await asyncio.sleep(0.2)
        yield at["trainer"]


async def job(address: str, *flags: str) -> str:
    """Begins one; its id."""
    command = ["-m", "zimage_client.cli.main", "train", "--detach", "--replace", "--isolated"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--trainer", address, *flags, stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    return out.decode().strip()


async def through_services() -> dict[str, Any]:
    """C10 and C11."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        async with services(scratch) as address, AsyncTrainer(address) as trainer:
            images = str(_pictures(scratch / "many", UNCACHED))
            name = await job(address, "--images", images, "--steps", "1000", "--side", "64")
            async with contextlib.aclosing(trainer.watch(name)) as events:
                async for event in events:
                    if isinstance(event, TrainStep):
                        break
            kinds = {one.kind: one.count for one in await trainer.cache()}
            await trainer.cancel(name)

            images = str(_pictures(scratch / "few", 30))
            flags = "--images", images, "--steps", str(WARM_STEPS), "--side", "128"
            waited, worked = [], []
            for _ in range(2):  # the first fills the caches
                name = await job(address, *flags, "--batch-size", "4")
                async with contextlib.aclosing(trainer.watch(name)) as events:
                    steps = [one async for one in events if isinstance(one, TrainStep)]
                waited = [one.waited_seconds for one in steps[1:]]
                worked = [one.seconds for one in steps[1:]]
    return {
        "C10_share_waited": round(sum(waited) / (sum(waited) + sum(worked)), 4),
        "C10_seconds_of_a_step": round(statistics.median(worked), 4),
        "C11_captions": UNCACHED,
        "C11_encoded_when_the_first_step_was_done": kinds["captions"],
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures in bench/results")
    parser.add_argument("--ways", action="store_true", help="ways to compute blocks alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "WAY", "BATCH"))
    arguments = parser.parse_args()
    if arguments.case:
        folder, way, batch = arguments.case
        print(json.dumps(one_case(Path(folder), way, int(batch))))
        return
    results: dict[str, Any] = {"machine": machine("torch", "diffusers", "peft"), "threads": 2}
    if arguments.ways:
        with tempfile.TemporaryDirectory() as scratch:
            ways = [way for way in _COMPUTED if way.startswith("packed")]
            results["ways"] = compare(Path(scratch), arguments.rounds, [4], ways)
        if arguments.write:
            print(write_results("training_ways", results))
        return
    results["services"] = asyncio.run(through_services())
    print(results["services"], flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        results["steps"] = compare(Path(scratch), arguments.rounds)
    if arguments.write:
        print(write_results("training", results))


if __name__ == "__main__":
    main()
