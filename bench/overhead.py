"""What client, gRPC and services add to a picture (C7).

The walk from a prompt to PNG bytes through both services, against the same work in one process.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.timing import compare, machine, write_results
from demo_model.random_model import build
from dit_service import messages
from dit_service.engine.generate import Studio
from dit_service.engine.heap import prepare_heap
from dit_service.model import loading
from encoder_service.model.loading import load as load_encoder
from encoder_service.prompt import Tokenizer
from zimage_client import Client
from zimage_client._embedded.stack import brief_stack
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Prompt
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.pictures import files as picture_files
from zimage_core.planning import schedule, variants
from zimage_core.tensors import TensorData

PROMPT = Prompt("a red circle on a blue background")
SIDE_PX = 128
SEED = 1
TOKEN_LIMIT = 512


class OneProcess:
    """The same models and the same arithmetic, without a wire."""

    def __init__(self, folder: Path) -> None:
        cpu = torch.device("cpu")
        files = EncoderFiles.of(folder)
        self._tokenizer = Tokenizer(files.tokenizer)
        self._encoder = load_encoder(files, DEFAULT_HIDDEN_LAYER, "cpu", "float32")
        self._generator = Studio(
            loading.load_transformer(folder, cpu, torch.float32),
            loading.load_vae(folder, cpu, torch.float32),
            "sdpa",
            announce=lambda _what, _seconds: None,
        )

    @torch.inference_mode()
    def picture(self) -> bytes:
        token_ids = self._tokenizer.encode([PROMPT], TOKEN_LIMIT)
        [features] = self._encoder(token_ids, [DEFAULT_HIDDEN_LAYER])
        turbo = variants.TURBO
        request = messages.Generate(
            positive=TensorData("float32", tuple(features.shape), features.numpy().tobytes()),
            negative=None,
            seeds=(SEED,),
            width_px=SIDE_PX,
            height_px=SIDE_PX,
            sigmas=schedule.sigmas(schedule.OFFICIAL, turbo.step_count, turbo.shift),
            guidance=0.0,
            cfg_normalization=0.0,
            cfg_truncation=1.0,
            is_solo=True,
        )
        events: list[object] = []
        self._generator.run(request, events.append)
        [rgb] = [event.rgb for event in events if isinstance(event, messages.Picture)]
        return picture_files.encode(rgb, (SIDE_PX, SIDE_PX), "png", picture_files.DEFAULT_QUALITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    prepare_heap()  # as the service's worker does, before the first tensor
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        build(folder)
        alone = OneProcess(folder)
        stack = brief_stack(lambda _line: None)
        with asyncio.Runner() as runner:
            addresses = runner.run(stack.__aenter__())
            # Not inside the loop: another thread than the first has a heap of its own, and slower.
            result = measure(alone, addresses.server, arguments.rounds)
            runner.run(stack.__aexit__(None, None, None))
    print(result)
    if arguments.write:
        print(write_results("overhead", result))


def measure(alone: OneProcess, server: str, rounds: int) -> dict[str, Any]:
    with Client(server) as client:

        def served() -> bytes:
            made = client.generate(PROMPT, width=SIDE_PX, height=SIDE_PX, seed=SEED)
            return made.pictures[0].data

        pixels = {
            picture_files.decode(made, "").pixels_sha256 for made in (served(), alone.picture())
        }
        assert len(pixels) == 1, "not the same work"
        timings = compare(rounds, served=served, alone=alone.picture)
    added = timings.ratio("served", "alone") - 1
    return {
        "row": "C7",
        "machine": machine("torch", "grpcio"),
        "served_seconds": round(timings.median("served"), 4),
        "alone_seconds": round(timings.median("alone"), 4),
        "added_share": round(added, 4),
        "target": 0.05,
    }


if __name__ == "__main__":
    main()
