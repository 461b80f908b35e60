"""`zimage-client profile`: how long encoding, steps and pictures take, and how much memory; beside
each other for the ways in which a DiT service can compute."""

import json
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zimage_client import AsyncClient, Options, Picture
from zimage_client._embedded.stack import brief_stack, refuse_what_cannot_work
from zimage_client.cli import profiling, stack
from zimage_client.cli.profiling import Profile, Result
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import wrong
from zimage_core.errors import InternalError, ZImageError
from zimage_core.pictures import files
from zimage_core.settings import ClientSettings, DitSettings

_DONE, _FAILED = 0, 1
_BASELINE = "baseline"
_USUAL = {"attention_backend": "sdpa", "compile": "off", "weights": "full"}
_SWEEP = (
    *(
        f"attention_backend={name}"
        for name in (
            "flash_attn_3",
            "flash_attn_2",
            "sage",
            "xformers",
            "torch_varlen",
            "sdpa_cudnn",
        )
    ),
    "compile=on",
    "dtype=float32",
    "dtype=bfloat16",
    "dtype=float16",
    "weights=int8",
    "weights=fp8",
    "weights=fp8_matmul",
    "vae_device=cpu",
)
_NOT_HERE = "not available"
_SERVICE = "python -m dit_service: "

Row = dict[str, Any]


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--show-info", action="store_true", help="only what runs where")
    parser.add_argument(
        "--tests",
        type=_tests,
        metavar="NAMES",
        help=f"joined by commas: {', '.join((*profiling.ALIASES, *profiling.ALL))} (default: all "
        "that these services allow)",
    )
    parser.add_argument("--repeat", type=_count, default=3, metavar="N", help="runs of each test")
    parser.add_argument("--width", type=int, metavar="PX", help="of the pictures")
    parser.add_argument("--height", type=int, metavar="PX")
    parser.add_argument("--steps", type=int, metavar="N")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const=",".join(_SWEEP),
        metavar="SETTING=VALUE,...",
        help="start services of one's own, one after the other, and compare each of these settings "
        "with sdpa, full weights and blocks that are not compiled (default: all there are)",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="for --sweep; unset: demo model")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="everything, as JSON")


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """0 when all tests passed, else 1; ways that do not work on this machine fail nothing."""
    _check(args)
    options = Options(
        width=args.width, height=args.height, steps=args.steps, seed=0, packing="solo"
    )
    if args.sweep:
        rows = await _swept(args, options, terminal)
    else:
        async with stack.for_both(settings, terminal) as client:
            rows = [await _profiled(client, args, options, terminal, has_encoder=_asks(settings))]
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))
    return _FAILED if any(row["summary"]["failed"] for row in rows) else _DONE


def _check(args: Namespace) -> None:
    if not args.sweep:
        if args.model:
            what = "--model is for --sweep; without it running services are profiled"
            raise wrong("--model", what)
        return
    if args.tests or args.show_info:
        raise wrong("--sweep", "--sweep makes pictures alone; leave out --tests and --show-info")
    if args.model and not args.model.is_dir():
        raise wrong("--model", f"--model {args.model}: there is no such folder")
    for name in args.sweep.split(","):
        setting, _, value = name.partition("=")
        if setting not in DitSettings.model_fields or not value:
            raise wrong("--sweep", f"--sweep {name}: SETTING=VALUE of the DiT service is wanted")


def _asks(settings: ClientSettings) -> bool:
    """Whether there is an encoder for this side."""
    return bool(settings.encoder or not settings.server)


async def _profiled(
    client: AsyncClient,
    args: Namespace,
    options: Options,
    terminal: Terminal,
    *,
    has_encoder: bool,
) -> Row:
    """The tests against one pair of services."""
    described = await client.describe()
    info = profiling.system_info(described)
    if args.show_info:
        for line in _lines(info):
            terminal.result(line)
        return _row(_BASELINE, info, [])
    usual = profiling.ALL if has_encoder else profiling.ALIASES["generate"]
    profile = Profile(client, options, args.repeat)
    results = []
    for name in args.tests or usual:
        terminal.live(name)
        results.append(await profile.run(name))
        terminal.clear()
        terminal.result(str(results[-1]))
    return _row(_BASELINE, info, results)


async def _swept(args: Namespace, options: Options, terminal: Terminal) -> list[Row]:
    """A picture in each way; those that do not work here stay out of the comparison."""
    refuse_what_cannot_work()
    terminal.result(
        f"{'':<32}{'picture':>11}{'step':>10}{'decode':>10}{'peak':>10}{'speed':>8}{'SSIM':>8}"
        f"{'PSNR':>9}"
    )
    rows: list[Row] = []
    first = None
    for name in (_BASELINE, *args.sweep.split(",")):
        terminal.live(name)
        try:
            row, result, picture = await _picture(name, args, options, terminal)
        except ZImageError as error:
            if first is None:
                raise
            terminal.clear()
            terminal.result(f"{name:<32}{_NOT_HERE}: {_why(error)}")
            continue
        if first is None and not result.success:
            raise InternalError(f"no picture to compare with: {result.error}")
        first = first or (result, picture)
        result.extra.update(_compared(result, picture, *first))
        terminal.clear()
        terminal.result(_compared_line(name, result))
        rows.append({**row, "tests": [asdict(result)]})
    return rows


async def _picture(
    name: str, args: Namespace, options: Options, terminal: Terminal
) -> tuple[Row, Result, Picture | None]:
    """By services that are started for it."""
    setting, _, value = name.partition("=")
    wanted = _USUAL if name == _BASELINE else _USUAL | {setting: value}
    flags = [f"--{one.replace('_', '-')}={given}" for one, given in wanted.items()]
    flags.append("--no-weights-gate")  # how far they are is what is asked
    began = time.perf_counter()
    async with (
        brief_stack(terminal.live, model=args.model, dit_flags=flags) as at,
        AsyncClient(at.server) as client,
    ):
        started = time.perf_counter() - began
        profile = Profile(client, options, args.repeat)
        result = await profile.run("full_generation")
        info = profiling.system_info(await client.describe())
    result.extra["load_pipeline_ms"] = round(started * 1e3, 1)
    return _row(name, info, [result]), result, profile.picture


def _compared(
    result: Result, picture: Picture | None, first: Result, first_picture: Picture | None
) -> dict[str, Any]:
    if picture is None or first_picture is None:
        return {}
    ours, theirs = (files.decode(one.data, "picture") for one in (picture, first_picture))
    psnr_db = ours.psnr(theirs)
    return {
        "speed_up": round(first.duration_ms / result.duration_ms, 3),
        "ssim": round(ours.ssim(theirs), 4),
        "psnr_db": round(psnr_db, 2) if psnr_db < float("inf") else None,
    }


def _compared_line(name: str, result: Result) -> str:
    if not result.success:
        return f"{name:<32}FAIL: {result.error}"
    extra = result.extra
    psnr_db = extra["psnr_db"]
    return (
        f"{name:<32}{result.duration_ms:>8.1f} ms{extra.get('step_ms', 0):>7.1f} ms"
        f"{extra['decode_ms']:>7.1f} ms{result.memory_peak_mb or 0:>7.0f} MB"
        f"{extra['speed_up']:>8.2f}{extra['ssim']:>8.4f}"
        + (f"{psnr_db:>6.1f} dB" if psnr_db is not None else f"{'same':>9}")
    )


def _row(name: str, info: dict[str, Any], results: Sequence[Result]) -> Row:
    return {
        "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": name,
        "system_info": info,
        "tests": [asdict(result) for result in results],
        "summary": profiling.summary(results),
    }


def _lines(info: dict[str, Any]) -> Iterator[str]:
    for part in ("client", "service"):
        for name, value in info[part].items():
            yield f"{part:<10}{name:<20}{value}"
    for name, reason in info["attention_backends"].items():
        yield f"{name}: {reason}"


def _why(error: ZImageError) -> str:
    """The last words of a service, as far as they are of the setting."""
    last = error.message.splitlines()[-1].strip()
    return last.removeprefix(_SERVICE).partition(";")[0]


def _tests(text: str) -> tuple[str, ...]:
    try:
        return profiling.tests(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise ArgumentTypeError(f"{text!r} is no number from 1 to 1000")
    return int(text)
