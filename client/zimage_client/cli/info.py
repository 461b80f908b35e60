"""`zimage-client info`: what the services that can be reached are, and how they are."""

import asyncio
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict

from zimage_client import (
    AsyncClient,
    DitDescription,
    EncoderDescription,
    WorkerState,
    ZImageError,
)
from zimage_client._embedded import warm
from zimage_client._embedded.stack import Addresses
from zimage_client.cli.terminal import Terminal
from zimage_client.cli.usage import seconds
from zimage_core.planning import previews
from zimage_core.settings import ClientSettings
from zimage_core.tls import Credentials

Description = DitDescription | EncoderDescription

_MEMORY = {
    "device": "on the device",
    "device_peak": "at most",
    "host": "in RAM",
    "host_peak": "at most",
}
_REACHED, _UNREACHABLE = 0, 4


def add_flags(parser: ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object a service")
    parser.add_argument(
        "--timeout", type=seconds, default=5.0, metavar="SECONDS", help="default: 5"
    )


async def run(args: Namespace, settings: ClientSettings, terminal: Terminal) -> int:
    """Asks every service that is configured, else those of the embedded stacks; 0 when all of them
    answered."""
    if settings.server or settings.encoder:
        at = Addresses(settings.server, settings.encoder)
        return await _ask(args, at, settings.credentials, terminal)
    stacks, code = warm.running_stacks(), _REACHED
    for stack in stacks:
        if args.json:
            shown = {"stack": str(stack.folder), "model": str(stack.model), "stays": stack.stays}
            terminal.result(json.dumps(shown))
        else:
            minutes = f"{warm.IDLE_SECONDS / 60:g} idle minutes"
            until = "`zimage-client down`" if stack.stays else f"{minutes} have passed"
            terminal.result(f"embedded stack with {stack.model}, until {until}")
            terminal.result(f"  {'logs':<12}{stack.folder}")
        code = max(code, await _ask(args, stack.addresses, {}, terminal))
    if not stacks:
        terminal.note(
            "no service is configured and no embedded stack runs; give --server ADDR, --encoder "
            "ADDR or both, or start a stack with `zimage-client up`"
        )
        return _UNREACHABLE
    return code


async def _ask(args: Namespace, at: Addresses, shown: Credentials, terminal: Terminal) -> int:
    async with AsyncClient(at.server, at.encoder, **shown) as client:
        asked: dict[str, tuple[str, Callable[..., Awaitable[Description]]]] = {}
        if at.server:
            asked["DiT service"] = at.server, client.describe
        if at.encoder:
            asked["encoder service"] = at.encoder, client.describe_encoder
        answers = await asyncio.gather(
            *(describe(timeout=args.timeout) for _, describe in asked.values()),
            return_exceptions=True,
        )
    for (name, (address, _)), answer in zip(asked.items(), answers, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, ZImageError):
            raise answer
        for line in _told(args, name, address, answer):
            terminal.result(line)
    return _UNREACHABLE if any(isinstance(one, BaseException) for one in answers) else _REACHED


def _told(
    args: Namespace, name: str, address: str, answer: Description | BaseException
) -> Iterator[str]:
    if isinstance(answer, ZImageError):
        if args.json:
            yield json.dumps({"service": name, "address": address, "error": answer.message})
        else:
            yield f"{name} at {address}: {answer.message}"
        return
    assert not isinstance(answer, BaseException)
    if args.json:
        yield json.dumps({"service": name, "address": address, **asdict(answer)})
        return
    yield f"{name} at {address}"
    lines = _of_dit(answer) if isinstance(answer, DitDescription) else _of_encoder(answer)
    for title, value in lines:
        yield f"  {title:<12}{value}"


def _of_dit(it: DitDescription) -> Iterator[tuple[str, str]]:
    yield "version", it.version
    yield from _process(it.worker)
    yield "prompts", "by its encoder" if it.has_encoder else "no encoder: embeddings alone"
    if it.model is None or it.limits is None or it.numeric_plan is None:
        return
    model, limits, plan = it.model, it.limits, it.numeric_plan
    yield "model", f"{model.name}, {model.variant}, shift {model.shift:g}"
    yield "encoder", model.encoder_identity or "any of the right width"
    threads = f", {plan.thread_count} threads" if plan.thread_count else ""
    yield "device", plan.device + threads
    yield "computes in", f"{plan.compute_type}, VAE {plan.vae_compute_type}"
    yield "weights", f"{plan.weights}: {it.weights_reason}"
    if plan.fused_adapter:
        yield "fused", f"adapter {plan.fused_adapter}, {plan.fused_adapter_scale:g}"
    if it.streamed_block_count:
        yield "streamed", f"{it.streamed_block_count} blocks come from host memory in every step"
    for backend in it.attention_backends:
        use = "" if backend.chosen else "not in use: "
        yield "attention", f"{backend.name}, {use}{backend.reason}"
    yield "compiled", f"{'yes' if plan.compiled else 'no'}: {it.compilation}"
    good = "from latents" if previews.is_good(model.preview_r_squared) else "by the VAE alone"
    yield "previews", f"{good} (R squared {model.preview_r_squared:.2f})"
    defaults = f"{model.default_steps} steps, guidance {model.default_guidance:g}"
    yield "by default", f"{model.default_side_px} px, {defaults}"
    most = f"{limits.max_steps} steps, {limits.max_count} pictures, {limits.max_token_count} tokens"
    sides = f"{limits.max_side_px} px in steps of {limits.side_multiple_px}"
    yield "limits", f"{sides}, {most}, {limits.max_queue_length} waiting"
    yield "libraries", ", ".join(f"{name} {v}" for name, v in sorted(plan.library_versions.items()))
    yield "features", ", ".join(it.features)


def _of_encoder(it: EncoderDescription) -> Iterator[tuple[str, str]]:
    yield "version", it.version
    yield from _process(it.worker)
    if it.model is None:
        return
    model, numerics = it.model, it.model.numerics
    yield "identity", f"{model.identity} at hidden layer {model.recipe.hidden_layer}"
    yield "layers", f"{model.layer_count}, computed to hidden layer {model.max_hidden_layer}"
    yield "computes in", str(numerics)
    yield "engine", numerics.engine
    limits = f"{model.recipe.token_limit} tokens, {model.recipe.row_limit} rows"
    yield "limits", f"{limits}, {model.max_prompt_count} prompts a call"
    yield "features", ", ".join(it.features)


def _process(worker: WorkerState) -> Iterator[tuple[str, str]]:
    yield "worker", _state(worker)
    if worker.load_seconds:
        yield "loaded", f"in {worker.load_seconds:.1f} s"
    held = [
        f"{worker.memory_bytes[kind] / 1e9:.2f} GB {where}"
        for kind, where in _MEMORY.items()
        if kind in worker.memory_bytes
    ]
    if held:
        yield "memory", ", ".join(held)


def _state(worker: WorkerState) -> str:
    work = f" ({worker.work})" if worker.work else ""
    calls = f", {worker.call_count} calls" if worker.call_count else ""
    restarts = f", replaced {worker.restart_count} times" if worker.restart_count else ""
    return f"{worker.state}{work}{calls}{restarts}"
