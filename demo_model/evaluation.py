"""`make demo-eval`: whether the model draws what it is asked for, asked through the services.

Prompts are about a thing whose shape was never trained in its colour, but for those that leave the
colour open. The checker looks at each picture; figures and a sheet of pictures come out.
"""

import argparse
import asyncio
import io
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
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
_FEW, _FEWEST = 200, 20
_STEPS = (1, 2, 4, 6, 8, 12)
_GUIDANCE = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, with what its picture shall show."""

    scene: Scene
    prompt: str
    size: tuple[int, int]
    seed: int
    negative: str | None = None


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
MEASURE = next(iter(KINDS))


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
        async with places:
            made = await _made(client, question, **options)
        picture = np.asarray(Image.open(io.BytesIO(made)).convert("RGB"))
        return Answer(question, picture, checker.check(picture, question.scene))

    return list(await asyncio.gather(*map(one, asked)))


async def _made(client: AsyncClient, question: Question, **options: Any) -> bytes:
    width, height = question.size
    made = await client.generate(
        question.prompt,
        negative=question.negative,
        width=width,
        height=height,
        seed=question.seed,
        **options,
    )
    return made.pictures[0].data


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
    many, few = round(1000 * share), max(_FEWEST, round(_FEW * share))
    figures: dict[str, Any] = {"prompts": {}, "accuracy": {}}
    first: list[Answer] = []
    for kind in KINDS:
        answers = await ask(client, questions(kind, few if first else max(few, many)))
        first = first or answers
        figures["prompts"][kind], figures["accuracy"][kind] = len(answers), shares(answers)
    figures["by steps"] = {
        str(steps): shares(await ask(client, questions(MEASURE, few), steps=steps))["all"]
        for steps in _STEPS
    }
    sharp = [value for answer in first for value in checker.sharpness(answer.picture)]
    figures["sharpness_db"] = round(statistics.median(sharp), 1)
    figures["steering"] = await steering(client, few)
    figures["seconds"] = round(await _seconds(client), 2)
    return figures, first


async def steering(client: AsyncClient, count: int) -> dict[str, float]:
    """What the model chooses where a caption leaves the colour open, and whether it chooses
    otherwise, with the same guidance, when a negative prompt names that choice."""
    chance = random.Random("steering")  # noqa: S311 - no secret
    asked = []
    for seed in range(count):
        scene = replace(world.any_scene(chance, held_out=False, pairs=0.0), place="center")
        [thing] = scene.things
        prompt = f"a {thing.size} {thing.shape} in the center on a {scene.background} background"
        asked.append(Question(scene, prompt, (128, 128), seed))
    guided = {"guidance": _GUIDANCE, "force_guidance": True}
    free = [answer for answer in await ask(client, asked, **guided) if _chosen(answer)]
    led = await ask(client, map(_led_away, free), **guided)
    left = [_chosen(other) not in ("", _chosen(one)) for one, other in zip(free, led, strict=True)]
    return {
        "colours chosen where none is named": len(set(map(_chosen, free))),
        "another colour once a negative prompt names the first": round(statistics.fmean(left), 3),
        "all else still right": round(statistics.fmean(map(_is_right_but_for_colour, led)), 3),
    }


def _led_away(answer: Answer) -> Question:
    question = answer.question
    return replace(question, negative=f"a {_chosen(answer)} {question.scene.things[0].shape}")


def _chosen(answer: Answer) -> str:
    things = checker.look(answer.picture).things
    return things[0].thing.colour if things else ""


def _is_right_but_for_colour(answer: Answer) -> bool:
    return all(right for name, right in answer.found.items() if name != "colour")


async def _seconds(client: AsyncClient) -> float:
    """Of one picture alone, the median of several."""
    taken = []
    for question in questions(MEASURE, 9):
        began = time.monotonic()
        await _made(client, question)
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def accuracy_rows(figures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Percent of pictures that are right, in all and by attribute."""
    names = ["all", "one thing", "two things", *checker.ATTRIBUTES]
    yield "prompts", "n", *names
    for kind, row in figures["accuracy"].items():
        cells = (_percent(row[name]) if name in row else "" for name in names)
        yield kind, str(figures["prompts"][kind]), *cells


def steps_rows(figures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Percent of pictures that are right in all, by the number of steps."""
    yield "steps", *figures["by steps"]
    yield "all", *(_percent(value) for value in figures["by steps"].values())


def other_rows(figures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """What else was measured."""
    yield "measured", "value"
    for name, value in figures["steering"].items():
        yield name, _percent(value) + " %" if isinstance(value, float) else str(value)
    yield "sharpness: a thing against its own best-fit rendering", f"{figures['sharpness_db']} dB"
    yield "one picture through both services", f"{figures['seconds']} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def sheet(answers: Sequence[Answer]) -> Image.Image:
    """The first pictures side by side."""
    columns, rows = _SHEET
    side = world.CANVASES[0][0]
    found = Image.new("RGB", (columns * side, rows * side), "white")
    for index, answer in enumerate(answers[: columns * rows]):
        row, column = divmod(index, columns)
        found.paste(Image.fromarray(answer.picture), (column * side, row * side))
    return found


@asynccontextmanager
async def _services(arguments: argparse.Namespace, *flags: str) -> AsyncIterator[AsyncClient]:
    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    async with (
        brief_stack(say, model=arguments.model, flags=flags) as stack,
        AsyncClient(stack.server) as client,
    ):
        yield client


async def _run(arguments: argparse.Namespace) -> None:
    async with _services(arguments, "--dtype", "float32") as client:
        figures, answers = await evaluate(client, arguments.share)
    asked = [answer.question for answer in answers]
    async with _services(arguments, "--dtype", "bfloat16") as client:
        kind = f"{MEASURE}, in bfloat16"
        figures["prompts"][kind] = len(asked)
        figures["accuracy"][kind] = shares(await ask(client, asked))
    for rows in (accuracy_rows, steps_rows, other_rows):
        for row in rows(figures):
            sys.stdout.write(f"{row[0]:<54}{''.join(f'{cell:>12}' for cell in row[1:])}\n")
        sys.stdout.write("\n")
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
        sheet(answers).save(arguments.write / "contact-sheet.png", optimize=True)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: the demo model)")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts")
    parser.add_argument("--write", type=Path, help="folder for evaluation.json and the sheet")
    asyncio.run(_run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
