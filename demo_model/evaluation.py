"""`make demo-eval`: whether the model draws what it is asked for, asked through the services.

Every prompt has a thing whose shape was never trained in its colour. The checker looks at each
picture; a table, a file of figures and a sheet of pictures come out.
"""

import argparse
import asyncio
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from demo_model import captions, checker, world
from demo_model.captions import Wording
from demo_model.drawing import Pixels
from demo_model.world import Scene
from zimage_client import AsyncClient
from zimage_client._embedded.stack import brief_stack

_AT_ONCE = 8
_PAIRS = 0.4
_SHEET = (8, 6)
_FEW = 200
_STEPS = (2, 4, 6, 8, 12)
_GUIDANCE = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, with what its picture shall show."""

    scene: Scene
    prompt: str
    size: tuple[int, int]
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The picture, and what the checker says of it."""

    question: Question
    picture: Pixels
    found: dict[str, bool]

    @property
    def is_right(self) -> bool:
        """Whether everything is."""
        return all(self.found.values())


KINDS: dict[str, tuple[Wording, tuple[int, int]]] = {
    "any wording": (Wording(), (128, 128)),
    "wide": (Wording(), (192, 128)),
    "tall": (Wording(), (128, 192)),
    "unseen wording": (Wording(unseen=True), (128, 128)),
    "filler around": (Wording(filler=1.0), (128, 128)),
}
"""The sets of prompts; the first is the measure, the others ask what else holds."""


def questions(kind: str, count: int) -> list[Question]:
    """The first prompts of a set, always the same."""
    wording, size = KINDS[kind]
    chance = random.Random(f"evaluation {kind}")  # noqa: S311 - no secret
    found = []
    for seed in range(count):
        scene = world.any_scene(chance, held_out=True, pairs=_PAIRS)
        found.append(Question(scene, captions.caption(scene, wording, chance), size, seed))
    return found


async def ask(client: AsyncClient, asked: Iterable[Question], **options: Any) -> list[Answer]:
    """The answers, in order."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(question: Question) -> Answer:
        width, height = question.size
        async with places:
            made = await client.generate(
                question.prompt, width=width, height=height, seed=question.seed, **options
            )
        picture = np.asarray(Image.open(io.BytesIO(made.pictures[0].data)).convert("RGB"))
        return Answer(question, picture, checker.check(picture, question.scene))

    return list(await asyncio.gather(*map(one, asked)))


def shares(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of pictures that are right, in all and by attribute."""
    rows = {"all": [answer.is_right for answer in answers]}
    for is_pair, name in ((False, "one thing"), (True, "two things")):
        rows[name] = [a.is_right for a in answers if a.question.scene.is_pair == is_pair]
    for attribute in checker.ATTRIBUTES:
        rows[attribute] = [answer.found[attribute] for answer in answers]
    return {name: round(statistics.fmean(row), 4) for name, row in rows.items() if row}


async def evaluate(client: AsyncClient, share: float) -> tuple[dict[str, Any], list[Answer]]:
    """All figures, and the answers of the first set; `share` of the prompts are asked."""
    many, few = round(1000 * share), round(_FEW * share)
    figures: dict[str, Any] = {"prompts": {}, "accuracy": {}}
    first: list[Answer] = []
    for kind in KINDS:
        count = few if first else many
        answers = await ask(client, questions(kind, count))
        first = first or answers
        figures["prompts"][kind], figures["accuracy"][kind] = count, shares(answers)
    measured = next(iter(KINDS))
    figures["by steps"] = {
        str(steps): shares(await ask(client, questions(measured, few), steps=steps))["all"]
        for steps in _STEPS
    }
    sharp = [value for answer in first[:few] for value in checker.sharpness(answer.picture)]
    figures["sharpness_db"] = round(statistics.median(sharp), 1)
    figures["steering"] = await _steering(client, few)
    figures["seconds"] = round(await _seconds(client), 3)
    return figures, first


async def _steering(client: AsyncClient, count: int) -> dict[str, float]:
    """What happens where a caption leaves the colour open: how many colours the model chooses, and
    how often it is one that the negative prompt leads away from."""
    chance = random.Random("steering")  # noqa: S311 - no secret
    open_ended, avoided = [], []
    for seed in range(count):
        scene = world.any_scene(chance, held_out=False, pairs=0.0)
        [thing] = scene.things
        prompt = f"a {thing.size} {thing.shape} in the center on a {scene.background} background"
        open_ended.append(Question(scene, prompt, (128, 128), seed))
        avoided.append(f"a {thing.size} {thing.colour} {thing.shape} in the center")
    free = await ask(client, open_ended)
    led = await asyncio.gather(
        *(
            ask(client, [question], negative=negative, guidance=_GUIDANCE, force_guidance=True)
            for question, negative in zip(open_ended, avoided, strict=True)
        )
    )
    chosen = [checker.look(answer.picture).things for answer in free]
    return {
        "colours chosen": len({things[0].thing.colour for things in chosen if things}),
        "of the avoided colour, unguided": shares(free)["colour"],
        "of the avoided colour, guided": shares([one for [one] in led])["colour"],
    }


async def _seconds(client: AsyncClient) -> float:
    """Of one picture alone, the median of several."""
    taken = []
    for question in questions(next(iter(KINDS)), 9):
        began = time.monotonic()
        await ask(client, [question])
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    names = ["all", "one thing", "two things", *checker.ATTRIBUTES]
    lines = [f"| prompts | n | {' | '.join(names)} |", f"| {'--- | ' * (len(names) + 2)}"[:-1]]
    for kind, row in figures["accuracy"].items():
        cells = " | ".join(f"{100 * row[name]:.1f}" if name in row else "" for name in names)
        lines.append(f"| {kind} | {figures['prompts'][kind]} | {cells} |")
    steps = ", ".join(f"{n}: {100 * value:.1f}" for n, value in figures["by steps"].items())
    lines += ["", f"All attributes right by steps, in percent: {steps}."]
    steering = ", ".join(f"{name}: {value:g}" for name, value in figures["steering"].items())
    lines.append(f"Where a caption names no colour: {steering}.")
    sharp, seconds = figures["sharpness_db"], figures["seconds"]
    lines.append(f"Sharpness {sharp} dB; one picture takes {seconds} s.")
    return "\n".join(lines)


def sheet(answers: Sequence[Answer]) -> Image.Image:
    """The first pictures side by side."""
    columns, rows = _SHEET
    side = world.CANVASES[0][0]
    found = Image.new("RGB", (columns * side, rows * side), "white")
    for index, answer in enumerate(answers[: columns * rows]):
        row, column = divmod(index, columns)
        found.paste(Image.fromarray(answer.picture), (column * side, row * side))
    return found


async def _run(arguments: argparse.Namespace) -> None:
    if arguments.server:
        async with AsyncClient(arguments.server) as client:
            figures, answers = await evaluate(client, arguments.share)
    else:
        async with (
            brief_stack(lambda _line: None) as stack,
            AsyncClient(stack.server) as client,
        ):
            figures, answers = await evaluate(client, arguments.share)
    sys.stdout.write(table(figures) + "\n")
    if arguments.write:
        (arguments.write / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
        sheet(answers).save(arguments.write / "contact-sheet.png", optimize=True)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", default="", help="a DiT service with an encoder")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts")
    parser.add_argument("--write", type=Path, help="folder for evaluation.json and the sheet")
    asyncio.run(_run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
