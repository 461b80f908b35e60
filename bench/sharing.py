"""How long a shared step may become: eight equal requests at once, with steps bounded by different
times. A wide bound lets all share every step and end together; a narrow one lets them end one by
one, and packs less."""

import argparse
import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.engine import CLIENTS, STEPS, running
from bench.timing import machine, write_results
from zimage_client import AsyncClient, Embedding
from zimage_client._embedded.stack import demo_model

SIDE_PX = 448
BOUNDS_MS = (10_000, 250, 60)
PROMPT = "a large red circle in the middle on a blue background"


async def one_round(client: AsyncClient, embedding: Embedding) -> dict[str, float]:
    """Eight requests that come at the same time."""
    began = time.perf_counter()
    seconds: list[float] = []
    occupancy: list[float] = []

    async def draw(seed: int) -> None:
        made = await client.generate(
            embedding, seed=seed, width=SIDE_PX, height=SIDE_PX, steps=STEPS
        )
        seconds.append(time.perf_counter() - began)
        occupancy.append(made.completed.usage.mean_occupancy)

    await asyncio.gather(*(draw(seed) for seed in range(CLIENTS)))
    return {
        "half_done_seconds": statistics.median(seconds),
        "all_done_seconds": max(seconds),
        "mean_occupancy": statistics.mean(occupancy),
    }


async def measure(rounds: int) -> dict[str, Any]:
    """All bounds in turn, round by round, after one to warm up; medians."""
    async with contextlib.AsyncExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        flags = ["--model", str(demo_model()), "--probes", "", "--config", os.devnull]
        encoder = f"unix:{scratch}/encoder"
        await stack.enter_async_context(running("encoder_service", "--listen", encoder, *flags))
        async with AsyncClient(encoder=encoder) as client:
            embedding = await client.encode(PROMPT)
        clients: dict[int, AsyncClient] = {}
        for bound in BOUNDS_MS:
            address = f"unix:{Path(scratch) / str(bound)}"
            bounded = "--listen", address, "--max-step-ms", str(bound)
            await stack.enter_async_context(running("dit_service", *bounded, *flags))
            clients[bound] = await stack.enter_async_context(AsyncClient(address))
        found: dict[int, list[dict[str, float]]] = {bound: [] for bound in clients}
        for index in range(rounds + 1):
            for bound, client in clients.items():
                one = await one_round(client, embedding)
                if index:
                    found[bound].append(one)
    return {
        "machine": machine("torch", "grpcio"),
        "clients": CLIENTS,
        "side_px": SIDE_PX,
        "bounds_ms": {
            bound: {key: round(statistics.median(one[key] for one in many), 2) for key in many[0]}
            for bound, many in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.rounds))
    print(result)
    if arguments.write:
        print(write_results("sharing", result))


if __name__ == "__main__":
    main()
