"""One to eight clients at once (C8): our services against a plain gRPC server around diffusers'
pipeline, one request at a time, on the same model and machine; and where a request's time goes. And
a short request behind a long one."""

import argparse
import asyncio
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio

from bench.timing import machine, write_results
from zimage_client import AsyncClient, Completed

CLIENTS = 8
CROWDS = (1, 2, 4, CLIENTS)
PICTURES_EACH = 4
SIDE_PX = 128
STEPS = 8
PROMPTS = [
    f"a red circle, number {n}, " + "on a blue background, " * (n % 4) for n in range(CLIENTS)
]
STAGES = ("queue_seconds", "encode_seconds", "denoise_seconds", "decode_seconds")
_METHOD = "/plain.Pipeline/Generate"

Draw = Callable[[str, int], Awaitable[dict[str, float]]]
"""Makes one picture of a prompt and a seed; returns what is known of how that went."""


async def serve_plain(folder: str, address: str) -> None:
    """The peer: what most people would write first. One thread, one request at a time."""
    import torch
    from diffusers import ZImagePipeline

    pipeline: Any = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    one_at_a_time = asyncio.Lock()

    def draw(prompt: str, seed: int) -> bytes:
        [picture] = pipeline(
            prompt,
            width=SIDE_PX,
            height=SIDE_PX,
            num_inference_steps=STEPS,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        return buffer.getvalue()

    async def generate(request: bytes, _context: Any) -> bytes:
        seed, prompt = request.decode().split(" ", 1)
        async with one_at_a_time:
            return await asyncio.to_thread(draw, prompt, int(seed))

    handler: Any = grpc.unary_unary_rpc_method_handler(generate)
    service, method = _METHOD[1:].split("/")
    server = grpc.aio.server(options=[("grpc.max_send_message_length", 32 << 20)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


@contextlib.asynccontextmanager
async def plain(folder: Path, address: str) -> AsyncIterator[Draw]:
    """The peer in a process of its own."""
    async with (
        running("bench.engine", "--plain", str(folder), address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        call: Any = channel.unary_unary(_METHOD)

        async def draw(prompt: str, seed: int) -> dict[str, float]:
            await call(f"{seed} {prompt}".encode(), wait_for_ready=True)
            return {}

        yield draw


@contextlib.asynccontextmanager
async def ours(folder: Path, scratch: Path) -> AsyncIterator[tuple[Draw, AsyncClient]]:
    """Our two services, each in processes of its own."""
    encoder, dit = (f"unix:{scratch / name}" for name in ("encoder", "dit"))
    flags = ["--model", str(folder), "--probes", "", "--config", os.devnull]
    async with (
        running("encoder_service", "--listen", encoder, *flags),
        running("dit_service", "--listen", dit, "--encoder", encoder, *flags),
        AsyncClient(dit) as client,
    ):

        async def draw(prompt: str, seed: int) -> dict[str, float]:
            made = await client.generate(
                prompt, seed=seed, width=SIDE_PX, height=SIDE_PX, steps=STEPS
            )
            usage = made.completed.usage
            return {name: getattr(usage, name) for name in (*STAGES, "mean_occupancy")}

        yield draw, client


@contextlib.asynccontextmanager
async def running(module: str, *arguments: str) -> AsyncIterator[None]:
    """A process that runs while the block does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def load(draw: Draw, clients: int) -> dict[str, Any]:
    """Clients that each ask for one picture after the other."""
    seconds: list[float] = []
    told: list[dict[str, float]] = []

    async def ask(number: int) -> None:
        for index in range(PICTURES_EACH):
            began = time.perf_counter()
            told.append(await draw(PROMPTS[number], 100 * number + index))
            seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(ask(number) for number in range(clients)))
    whole = time.perf_counter() - began
    return {
        "pictures_per_second": clients * PICTURES_EACH / whole,
        "p50_seconds": statistics.median(seconds),
        "p99_seconds": max(seconds),  # of so few, the slowest
        **{name: statistics.mean(one[name] for one in told) for name in told[0]},
    }


async def short_after_long(client: AsyncClient) -> dict[str, float]:
    """Seconds until each of two requests ends, a short one sent when a long one is under way."""
    ended: dict[str, float] = {}
    under_way = asyncio.Event()
    began = time.perf_counter()

    async def draw(name: str, steps: int) -> None:
        async for event in client.stream(name, seed=1, steps=steps, width=SIDE_PX, height=SIDE_PX):
            under_way.set()
            if isinstance(event, Completed):
                ended[f"{name}_seconds"] = time.perf_counter() - began

    long = asyncio.create_task(draw("long", 100))
    await under_way.wait()
    await draw("short", 4)
    await long
    return ended


async def compare(rounds: int) -> dict[str, Any]:
    """Both in turn, round by round; medians."""
    from demo_model.random_model import build

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder)
        runs: dict[str, list[dict[str, Any]]] = {}
        async with (
            ours(folder, Path(scratch)) as (draw_ours, client),
            plain(folder, f"unix:{scratch}/plain") as draw_plain,
        ):
            for draw in (draw_ours, draw_plain):
                await draw("warm up", 1)
            for _ in range(rounds):
                for name, draw in (("ours", draw_ours), ("plain", draw_plain)):
                    for clients in CROWDS:
                        runs.setdefault(f"{name}_{clients}", []).append(await load(draw, clients))
            order = await short_after_long(client)
    medians = {
        name: {key: round(statistics.median(one[key] for one in many), 3) for key in many[0]}
        for name, many in runs.items()
    }

    def over_plain(key: str) -> float:
        pairs = zip(runs[f"ours_{CLIENTS}"], runs[f"plain_{CLIENTS}"], strict=True)
        return float(round(statistics.median(mine[key] / peer[key] for mine, peer in pairs), 3))

    return {
        "row": "C8",
        "machine": machine("torch", "diffusers", "grpcio"),
        "clients": CLIENTS,
        "pictures_per_second_over_plain": over_plain("pictures_per_second"),
        "p99_over_plain": over_plain("p99_seconds"),
        "short_after_long": {key: round(value, 2) for key, value in order.items()},
        "failures": 0,  # any would have ended this run
        **medians,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", nargs=2, metavar=("FOLDER", "ADDRESS"), help="only serve it")
    arguments = parser.parse_args()
    if arguments.plain:
        asyncio.run(serve_plain(*arguments.plain))
        return
    result = asyncio.run(compare(arguments.rounds))
    print(result)
    if arguments.write:
        print(write_results("engine", result))


if __name__ == "__main__":
    main()
