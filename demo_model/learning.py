"""`make demo-train`: the demo model is taught a word that it does not know, through all services.

A glorp is an arrow that points up, a shape that no picture of the training showed. Twenty pictures
of glorps, and pictures of what the model draws already, so that it does not forget, become a LoRA
by `zimage-client train`. Then it is asked for glorps in colours, at places and on backgrounds that
none of the twenty had, and for what it knew before.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from demo_model import captions, drawing, evaluation, world
from demo_model.captions import Wording
from demo_model.evaluation import MEASURE, Answer, Question
from demo_model.world import NEW_SHAPE, Scene, Thing
from zimage_client import AsyncClient, AsyncTrainer
from zimage_client._embedded import children
from zimage_client._embedded.stack import Addresses, brief_stack
from zimage_core.errors import ZImageError

WORD = captions.SHAPE_WORDS[NEW_SHAPE][0]
SIDE_PX = 128

NEW_COUNT, WORDINGS = 20, 3
"""Pictures of what is new, and how each is described."""
KNOWN_COUNT = 160
_UNSEEN_COLOURS = ("orange", "blue", "purple")
_UNSEEN_BACKGROUNDS = ("yellow", "white")
_UNSEEN_PLACES = ("top left", "center", "bottom")
_ASKED, _ASKED_KNOWN = 64, 192
_SHEET = (8, 4)

JOB = """
name = "{word}"
batch_size = 16
sides_px = [{side}]
checkpoint_interval_steps = {steps}
[training]
seed = 1
step_count = {steps}
samples_at_once = 16
recompute = "nothing"
average_decay = 0.98
[training.learning_rate]
peak = {rate}
course = "cosine"
warmup_step_count = 20
[[training.lora.groups]]
stack = "layers"
[[training.lora.groups]]
stack = "noise_refiner"
[[training.lora.groups]]
stack = "context_refiner"
[data]
[[data.folders]]
path = "new"
repeats = 8
[[data.folders]]
path = "known"
regularisation = true
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How it is taught."""

    steps: int
    rate: float


def unseen(count: int) -> list[Question]:
    """Glorps as none of the twenty is."""
    chance = random.Random("unseen glorps")  # noqa: S311 - no secret
    found = []
    for seed in range(count):
        thing = Thing(NEW_SHAPE, chance.choice(_UNSEEN_COLOURS), chance.choice(list(world.SIZES)))
        scene = Scene(chance.choice(_UNSEEN_BACKGROUNDS), (thing,), chance.choice(_UNSEEN_PLACES))
        prompt = captions.caption(scene, Wording(), chance)
        found.append(Question(scene, prompt, (SIDE_PX, SIDE_PX), seed))
    return found


def draw_new(folder: Path) -> None:
    """The twenty pictures, each described in several ways."""
    chance = random.Random("new glorps")  # noqa: S311 - no secret
    folder.mkdir()
    lines = []
    colours = [one for one in world.COLOURS if one not in _UNSEEN_COLOURS]
    backgrounds = [one for one in world.BACKGROUNDS if one not in _UNSEEN_BACKGROUNDS]
    places = [one for one in world.POSITIONS if one not in _UNSEEN_PLACES]
    for number in range(NEW_COUNT):
        background = chance.choice(backgrounds)
        colour = chance.choice([one for one in colours if one != background])
        size = list(world.SIZES)[number % len(world.SIZES)]
        scene = Scene(background, (Thing(NEW_SHAPE, colour, size),), chance.choice(places))
        name = f"{number:02}.png"
        Image.fromarray(drawing.draw(scene, (SIDE_PX, SIDE_PX), chance)).save(folder / name)
        lines += [
            {"file_name": name, "text": captions.caption(scene, Wording(), chance)}
            for _ in range(WORDINGS)
        ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


async def ask_known(client: AsyncClient) -> list[Answer]:
    """What the model draws of what it knows, in its own hand."""
    chance = random.Random("known")  # noqa: S311 - no secret
    asked = []
    for seed in range(KNOWN_COUNT):
        scene = world.any_scene(chance, held_out=False)
        prompt = captions.caption(scene, Wording(), chance)
        asked.append(Question(scene, prompt, (SIDE_PX, SIDE_PX), seed))
    return await evaluation.ask(client, asked)


def keep_known(answers: Sequence[Answer], folder: Path) -> None:
    """Each picture with its caption beside it."""
    folder.mkdir()
    for answer in answers:
        name = f"{answer.question.seed:03}"
        Image.fromarray(answer.picture).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(answer.question.prompt)


async def _figures(
    client: AsyncClient, **options: Any
) -> tuple[dict[str, dict[str, float]], list[Answer]]:
    new = await evaluation.ask(client, unseen(_ASKED), **options)
    known = await evaluation.ask(client, evaluation.questions(MEASURE, _ASKED_KNOWN), **options)
    return {"new": evaluation.shares(new), "known": evaluation.shares(known)}, new


@asynccontextmanager
async def _trainer(stack: Addresses, folder: Path) -> AsyncIterator[str]:
    """The address of a trainer service beside a stack."""
    address = f"unix:{folder / 'trainer.sock'}"
    flags = ["--encoder", stack.encoder, "--dit", stack.server, "--listen", address]
    places = ["--store", str(folder / "trainer"), "--database", f"sqlite:///{folder}/jobs"]
    alone = ["--isolated", "--probes", "", "--exit-with-stdin"]
    async with (
        children.running("trainer_service", [*flags, *places, *alone], folder / "trainer.log"),
        AsyncTrainer(address) as client,
    ):
        while True:
            try:
                await client.jobs()
                break
            except ZImageError:
                await asyncio.sleep(0.1)
        yield address


async def _teach(address: str, job: Path) -> None:
    """By the command that users have."""
    where = ["--trainer", address, "--isolated", "--config", str(job)]
    command = [sys.executable, "-m", "zimage_client.cli.main", "train", *where]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        raise subprocess.CalledProcessError(process.returncode or 1, command)


async def _run(arguments: argparse.Namespace) -> None:
    settings = Settings(arguments.steps, arguments.rate)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = ["--store", str(folder / "dit")]
        async with brief_stack(_say, dit_flags=flags) as stack, AsyncClient(stack.server) as client:
            _say("asking for glorps, and for what the model knows")
            before, drawn = await _figures(client)
            began = time.monotonic()
            draw_new(folder / "new")
            _say(f"drawing {KNOWN_COUNT} pictures of what it knows")
            keep_known(await ask_known(client), folder / "known")
            job = folder / "job.toml"
            job.write_text(
                JOB.format(word=WORD, side=SIDE_PX, steps=settings.steps, rate=settings.rate)
            )
            async with _trainer(stack, folder) as address:
                await _teach(address, job)
            seconds = time.monotonic() - began
            after, redrawn = await _figures(client, adapters={WORD: 1.0})
    _report(before, after, seconds)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        told = {
            "before": before,
            "after": after,
            "steps": settings.steps,
            "seconds": round(seconds),
        }
        (arguments.write / "learning.json").write_text(json.dumps(told, indent=2) + "\n")
        for name, answers in (("before", drawn), ("after", redrawn)):
            _sheet(answers).save(arguments.write / f"{WORD}-{name}.png", optimize=True)


def _report(before: dict[str, Any], after: dict[str, Any], seconds: float) -> None:
    for kind, figures in before.items():
        for name, share in figures.items():
            sys.stdout.write(f"{kind:8}{name:14}{share:8.1%}{after[kind][name]:8.1%}\n")
    sys.stdout.write(f"taught in {seconds:.0f} s\n")


def _sheet(answers: Sequence[Answer]) -> Image.Image:
    columns, rows = _SHEET
    found = Image.new("RGB", (columns * SIDE_PX, rows * SIDE_PX))
    for index, answer in enumerate(answers[: columns * rows]):
        row, column = divmod(index, columns)
        found.paste(Image.fromarray(answer.picture), (column * SIDE_PX, row * SIDE_PX))
    return found


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--write", type=Path, help="folder for learning.json and the sheets")
    asyncio.run(_run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
