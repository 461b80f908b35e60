"""What client, gRPC and services add to a picture (C7).

The walk from a prompt to PNG bytes through both services, over Unix sockets and guarded by mutual
TLS and tokens, against the same work in one process.
"""

import argparse
import asyncio
import itertools
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from encoder_service.model.qwen import Text
from encoder_service.prompt import Tokenizer
from zimage_client import Client, Tls, Unavailable
from zimage_client._embedded.stack import brief_stack
from zimage_client.cli.main import main as command
from zimage_core.embeddings import DEFAULT_HIDDEN_LAYER, Prompt
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.pictures import files as picture_files
from zimage_core.planning import schedule, variants
from zimage_core.tensors import TensorData

PROMPT = Prompt("a red circle on a blue background")
SIDE_PX = 128
SEED = 1
TOKEN = secrets.token_hex(16)
_TRIES = 60


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
    def picture(self, prompt: Prompt) -> bytes:
        [token_ids] = self._tokenizer.encode([prompt])
        [run] = self._encoder([Text(token_ids, prompt.effective_blend)])
        features = run.state
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


@contextmanager
def plain(model: Path) -> Iterator[Client]:
    """A client of services on Unix sockets."""
    with asyncio.Runner() as runner:
        stack: Any = brief_stack(lambda _line: None, model=model)
        addresses = runner.run(stack.__aenter__())
        try:
            with Client(addresses.server) as client:
                # Not in the loop: another thread than the first has a slower heap of its own.
                yield client
        finally:
            runner.run(stack.__aexit__(None, None, None))


@contextmanager
def guarded(folder: Path, model: Path) -> Iterator[Client]:
    """A client of services over TCP on this machine, with mutual TLS and tokens on both ways."""
    encoder_at, dit_at = _free_address(), _free_address()
    assert command(["certs", "encoder,127.0.0.1", "dit,127.0.0.1", "user", "-o", str(folder)]) == 0
    word = folder / "word"
    word.write_text(TOKEN)
    tokens = folder / "tokens.toml"
    tokens.write_text(
        f'[[token]]\nname = "all"\ntoken = "{TOKEN}"\nroles = ["generate", "encode"]\n'
        'project = "bench"\n'
    )

    def flags(name: str, listen: str) -> list[str]:
        own = {
            "--tls-cert": folder / f"{name}.pem",
            "--tls-key": folder / f"{name}.key",
            "--tls-client-ca": folder / "ca.pem",
            "--tokens": tokens,
            "--model": model,
            "--listen": listen,
        }
        return ["--isolated", "--probes", "", *(str(part) for pair in own.items() for part in pair)]

    towards = ["--encoder", encoder_at, "--tls-ca", str(folder / "ca.pem")]
    with ExitStack() as closing:
        for module, name, at, more in (
            ("encoder_service", "encoder", encoder_at, []),
            ("dit_service", "dit", dit_at, [*towards, "--encoder-token-file", str(word)]),
        ):
            started = [sys.executable, "-m", module, *flags(name, at), *more]
            process = subprocess.Popen(started, stderr=subprocess.DEVNULL)
            closing.callback(process.wait)
            closing.callback(process.terminate)
        tls = Tls(folder / "ca.pem", folder / "user.pem", folder / "user.key")
        client = closing.enter_context(Client(dit_at, tls=tls, token=TOKEN))
        _wait_for(client)
        yield client


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _wait_for(client: Client) -> None:
    for _ in range(_TRIES):
        try:
            client.generate(PROMPT, steps=1)
        except Unavailable:
            time.sleep(1)
        else:
            return
    raise SystemExit("the services with TLS do not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    prepare_heap()  # as the service's worker does, before the first tensor
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        build(model)
        alone = OneProcess(model)
        result: dict[str, Any] = {"row": "C7", "machine": machine("torch", "grpcio")}
        for name, way in (("plain", plain(model)), ("guarded", guarded(Path(scratch), model))):
            with way as client:
                result[name] = measure(alone, client, arguments.rounds)
    result["target"] = 0.05
    print(result)
    if arguments.write:
        print(write_results("overhead", result))


def measure(alone: OneProcess, client: Client, rounds: int) -> dict[str, Any]:
    """Two take turns, no more: what stands still for longer than the next picture gets cold. Each
    picture has a prompt that nobody had before, so that no cache answers."""

    def served(prompt: Prompt) -> bytes:
        made = client.generate(prompt, width=SIDE_PX, height=SIDE_PX, seed=SEED, packing="solo")
        return made.pictures[0].data

    def each(picture: Callable[[Prompt], bytes]) -> Callable[[], bytes]:
        numbers = itertools.count()
        return lambda: picture(Prompt(f"{PROMPT.text} {next(numbers):06}"))

    runs = {"alone": each(alone.picture), "served": each(served)}
    pixels = {picture_files.decode(run(), "").pixels_sha256 for run in runs.values()}
    assert len(pixels) == 1, "not the same work"
    timings = compare(rounds, **runs)
    return {
        **{f"{name}_seconds": round(timings.median(name), 4) for name in runs},
        "added_share": round(timings.ratio("served", "alone") - 1, 4),
    }


if __name__ == "__main__":
    main()
