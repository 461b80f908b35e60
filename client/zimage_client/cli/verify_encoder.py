"""`zimage-client verify-encoder`: how far two encoder services are apart, and whether a DiT service
that belongs to the first would take the other's embeddings."""

import json
import statistics
from argparse import ArgumentParser, Namespace
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from zimage_client import AsyncClient, Embedding
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.drift import NEAR_COSINE, SAME_COSINE, cosines
from zimage_core.formats import drift_file
from zimage_core.formats.drift_file import Drift
from zimage_core.settings import ClientSettings

_WELL, _ILL = 0, 1

_PROBES = (
    "",
    "a cat",
    "a small red circle on the left of a large blue square, on gray",
    "portrait of an old fisherman in the rain, 35 mm photograph, shallow depth of field, " * 3,
    'a shop sign that says "OPEN", hand-painted, in the window of a bakery at night',
    "一只戴着草帽的猫坐在竹林里 水墨画 远山",
    "isometric cutaway of a space station, each room labelled, clean lines, pastel colours; "
    "astronauts at work in the greenhouse, the workshop and the kitchen, one asleep",
)
"""Short, long, quoted, in another script, and none."""


@dataclass(frozen=True, slots=True)
class _Worst:
    """The token whose rows differ most."""

    cosine: float
    prompt: str
    token: int


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("one", nargs="?", metavar="A", help="address of an encoder service")
    parser.add_argument("other", nargs="?", metavar="B", help="address of another")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="add what was measured to a file for a DiT service's encoder_drifts, by which one "
        "that belongs to A takes B's embeddings",
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """0 where B's embeddings can stand for A's; with --write, as soon as a DiT service is told."""
    if not args.other:
        raise wrong("A", "give the addresses of two encoder services")
    async with AsyncExitStack() as closing:
        both = []
        for address in (args.one, args.other):
            client = AsyncClient(encoder=address, **settings.credentials)
            await closing.enter_async_context(client)
            terminal.live(f"encoding {len(_PROBES)} prompts at {address}")
            both.append(await client.encode(list(_PROBES), packing="solo", timeout=None))
    ones, others = both
    worst, mean = _compared(ones, others)
    verdict, is_well = _verdict(ones[0], others[0], worst)
    if args.write and worst is not None:
        measured = Drift(
            pinned=ones[0].identity,
            identity=others[0].identity,
            numerics=others[0].numerics,
            worst_cosine=worst.cosine,
            mean_cosine=mean,
        )
        drift_file.add(args.write, measured)
        is_well = worst.cosine >= NEAR_COSINE
    if args.json:
        said = {
            "same_identity": ones[0].identity == others[0].identity,
            "identities": [ones[0].identity, others[0].identity],
            "mean_cosine": mean,
            "worst_cosine": worst and worst.cosine,
            "worst_prompt": worst and worst.prompt,
            "worst_token": worst and worst.token,
            "verdict": verdict,
            "ok": is_well,
        }
        terminal.result(json.dumps(said))
        return _WELL if is_well else _ILL
    for address, (first, *_) in ((args.one, ones), (args.other, others)):
        how = f"{first.numerics}, {first.numerics.engine}"
        terminal.result(f"{address}  {first.identity[:12]}  {how}")
    if worst is not None:
        where = f"token {worst.token} of {worst.prompt[:40]!r}"
        terminal.result(f"cosine {mean:.6f} on average, {worst.cosine:.6f} at the worst: {where}")
    terminal.result(verdict)
    return _WELL if is_well else _ILL


def _compared(ones: list[Embedding], others: list[Embedding]) -> tuple[_Worst | None, float]:
    """Token by token, the first of each prompt apart; None where their shapes differ."""
    every = []
    for prompt, one, other in zip(_PROBES, ones, others, strict=True):
        if one.tensor.shape != other.tensor.shape:
            return None, 0.0
        found = enumerate(cosines(one.tensor, other.tensor), 1)
        every += [_Worst(cosine, prompt, token) for token, cosine in found]
    return min(every, key=lambda one: one.cosine), statistics.fmean(one.cosine for one in every)


def _verdict(one: Embedding, other: Embedding, worst: _Worst | None) -> tuple[str, bool]:
    if worst is None:
        return "not taken: they make embeddings of different shapes", False
    if one.identity != other.identity:
        near = "near" if worst.cosine >= NEAR_COSINE else "far"
        return (
            f"not taken: a DiT service pins the encoder, and {one.identity[:12]} is not "
            f"{other.identity[:12]} (ENCODER_MISMATCH); with encoder_drifts it takes what is near, "
            f"and this is {near}",
            False,
        )
    if worst.cosine >= SAME_COSINE:
        return "taken: the same encoder, as good as equal", True
    if worst.cosine >= NEAR_COSINE:
        return "taken: the same encoder; pictures may differ a little by who encodes", True
    return (
        "taken, but wrong: the same encoder by its weights, and its values are not; with "
        "encoder_drifts it is refused (ENCODER_DRIFT)",
        False,
    )
