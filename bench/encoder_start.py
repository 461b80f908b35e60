"""The first prompt after a start and the thousandth: what is left to warm up when a service serves.

    python -m bench.encoder_start [--write]

The encoder service with seven layers of Qwen3-4B's width, started anew each time; prompts of one
length, all of them different, each alone and from its first token on, so that nothing is reused.
With the 35 layers that a real one runs, what the first prompt has to itself counts for less.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.encoder_forms import write_folder
from bench.timing import flags, machine, write_results
from demo_model.random_model import byte_level_tokenizer
from zimage_client import Client
from zimage_client._embedded.stack import brief_stack

TARGET = 1.1
PROMPTS, AROUND = 1000, 11
"""The thousandth is the median of so many: one call of a few milliseconds says little."""


async def one_start(model: Path) -> dict[str, float]:
    """Seconds of the first prompt, and of those around the thousandth."""
    async with brief_stack(lambda _said: None, model=model, dit=False) as at:
        return await asyncio.to_thread(_asked, at.encoder)


def _asked(address: str) -> dict[str, float]:
    with Client(encoder=address) as client:
        client.describe_encoder()  # the connection is there

        def took(number: int) -> float:
            began = time.perf_counter()
            client.encode(f"the prompt with number {number:06d}", packing="solo")
            return time.perf_counter() - began

        every = [took(number) for number in range(PROMPTS + AROUND // 2)]
    return {"first": every[0], "thousandth": statistics.median(every[-AROUND:])}


def measure(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch)
        write_folder(model)
        byte_level_tokenizer().save_pretrained(model)
        starts = [asyncio.run(one_start(model)) for _ in range(rounds)]
    return {
        "what": "the first prompt of an encoder service over the thousandth, 7 layers",
        "target": TARGET,
        "ratio": round(statistics.median(one["first"] / one["thousandth"] for one in starts), 2),
        "milliseconds": [
            {name: round(1000 * seconds, 2) for name, seconds in one.items()} for one in starts
        ],
    }


def main() -> None:
    arguments = flags(__doc__).parse_args()
    result = measure(arguments.rounds) | {"machine": machine("torch", "transformers", "grpcio")}
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.write:
        print(write_results("encoder_start", result))


if __name__ == "__main__":
    main()
