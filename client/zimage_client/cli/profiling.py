"""What a profile measures: tests against services, each timed, with the memory it took."""

import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from zimage_client import AsyncClient, DitDescription, Options, Picture, Prompt, Trace, Usage
from zimage_core.errors import Forbidden, Unimplemented, ZImageError

ALIASES = {
    "encode": (
        "encode_short",
        "encode_medium",
        "encode_with_template",
        "encode_with_thinking",
        "repeated_encode",
    ),
    "generate": ("full_generation",),
}
ALL = (*ALIASES["encode"], *ALIASES["generate"])

_SHORT = "a large red circle in the middle on a blue background"
_MEDIUM = ", ".join([_SHORT, "two small green squares above it", "a yellow star at the left"] * 4)
_SYSTEM = "You describe pictures of simple coloured shapes, in few words."
_REPEATED = 5
_MB = 1e6
_A_MOMENT = 1e-3

Extra = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one test, under the names of its JSON."""

    name: str
    success: bool
    duration_ms: float
    error: str | None
    memory_before_mb: float | None
    memory_after_mb: float | None
    memory_peak_mb: float | None
    extra: Extra

    def __str__(self) -> str:
        mark = "PASS" if self.success else "FAIL"
        line = f"[{mark}] {self.duration_ms:.1f}ms"
        if self.memory_before_mb is not None:
            line += f" | Memory: {self.memory_before_mb:.0f} -> {self.memory_after_mb:.0f} MB"
            line += f" (peak: {self.memory_peak_mb:.0f} MB)"
        more = self.error or ", ".join(f"{name} {_told(value)}" for name, value in self._figures)
        return f"{self.name:<22}{line}" + (f" | {more}" if more else "")

    @property
    def _figures(self) -> list[tuple[str, float]]:
        return [(name, one) for name, one in self.extra.items() if isinstance(one, float)]


@dataclass
class Profile:
    """The tests of one configuration of services."""

    client: AsyncClient
    options: Options
    repeat: int
    picture: Picture | None = field(default=None, init=False)
    """The last one that was made."""

    async def run(self, name: str) -> Result:
        """One test: a run to warm up, then the median of some."""
        before = await self._trace()
        began, error, milliseconds, extra = time.perf_counter(), None, 0.0, Extra()
        try:
            milliseconds, extra = await self._test(name)
        except ZImageError as raised:
            error = raised.message
            milliseconds = (time.perf_counter() - began) * 1e3
        after = await self._trace(time.perf_counter() - began)
        if name in ALIASES["generate"] and after:
            extra |= _steps(after)
        return Result(
            name=name,
            success=error is None,
            duration_ms=round(milliseconds, 3),
            error=error,
            memory_before_mb=_megabytes(before.memory_bytes) if before else None,
            memory_after_mb=_megabytes(after.memory_bytes) if after else None,
            memory_peak_mb=_megabytes(after.peak_memory_bytes) if after else None,
            extra=extra,
        )

    async def _test(self, name: str) -> tuple[float, Extra]:
        match name:
            case "encode_short":
                return await self._encoded(Prompt(_SHORT))
            case "encode_medium":
                return await self._encoded(Prompt(_MEDIUM))
            case "encode_with_template":
                return await self._encoded(Prompt(_SHORT, system=_SYSTEM))
            case "encode_with_thinking":
                return await self._encoded(Prompt(_SHORT, thinking="Red on blue: it has to glow."))
            case "repeated_encode":
                return await self._repeated()
            case _:
                return await self._generated()

    async def _encoded(self, prompt: Prompt) -> tuple[float, Extra]:
        """Each time another text, alone, so that no cache answers and nothing of it was there."""
        numbers = iter(range(self.repeat + 1))
        tokens: list[int] = []

        async def encode() -> None:
            text = f"{prompt.text}, {time.monotonic_ns()} {next(numbers)}"
            embedding = await self.client.encode(replace(prompt, text=text), packing="solo")
            tokens.append(embedding.token_count)

        return await self._timed(encode), {"tokens": tokens[-1]}

    async def _repeated(self) -> tuple[float, Extra]:
        text = f"{_SHORT}, {time.monotonic_ns()}"
        first, *later = [await _took(lambda: self.client.encode(text)) for _ in range(_REPEATED)]
        typical = statistics.median(later)
        return typical, {"first_ms": round(first, 3), "later_ms": round(typical, 3)}

    async def _generated(self) -> tuple[float, Extra]:
        usages: list[Usage] = []

        async def generate() -> None:
            made = await self.client.generate(_SHORT, **self.options)
            self.picture = made.pictures[0]
            usages.append(made.completed.usage)

        milliseconds = await self._timed(generate)
        usages = usages[1:]
        return milliseconds, {
            "encode_ms": _median_ms([one.encode_seconds for one in usages]),
            "denoise_ms": _median_ms([one.denoise_seconds for one in usages]),
            "decode_ms": _median_ms([one.decode_seconds for one in usages]),
            "forwards": usages[-1].forward_count,
        }

    async def _timed(self, run: Callable[[], Awaitable[object]]) -> float:
        await run()
        return statistics.median([await _took(run) for _ in range(self.repeat)])

    async def _trace(self, last_seconds: float = _A_MOMENT) -> Trace | None:
        """None where only an administrator may ask, and of a service that knows no traces."""
        try:
            return await self.client.trace(last_seconds)
        except (Forbidden, Unimplemented):
            return None


def tests(named: str) -> tuple[str, ...]:
    """The tests that a list of names and aliases means; raises ValueError for an unknown one."""
    found: dict[str, None] = {}
    for name in named.split(","):
        if name not in ALIASES and name not in ALL:
            raise ValueError(f"{name}: known are {', '.join((*ALIASES, *ALL))}")
        found |= dict.fromkeys(ALIASES.get(name, (name,)))
    return tuple(found)


def system_info(it: DitDescription) -> dict[str, Any]:
    """Of this side, and of the DiT service's."""
    plan = it.numeric_plan
    return {
        "client": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("zimage-grpc", "grpcio", "protobuf")},
        },
        "service": {
            "version": it.version,
            "model": it.model and it.model.name,
            "device": plan and plan.device,
            "compute_type": plan and plan.compute_type,
            "weights": plan and plan.weights,
            "compiled": plan and plan.compiled,
            "attention_backend": plan and plan.attention_backend,
            **(plan.library_versions if plan else {}),
        },
        "attention_backends": {one.name: one.reason for one in it.attention_backends},
    }


def summary(results: Sequence[Result]) -> Mapping[str, float]:
    """Of the tests of one configuration, under the names of its JSON."""
    return {
        "total_tests": len(results),
        "passed": sum(one.success for one in results),
        "failed": sum(not one.success for one in results),
        "total_time_ms": round(sum(one.duration_ms for one in results), 3),
        "peak_memory_mb": max((one.memory_peak_mb or 0.0 for one in results), default=0.0),
    }


def _steps(trace: Trace) -> Extra:
    """The typical step since the test began."""
    steps = [span.took_seconds for span in trace.spans if span.work == "denoise"]
    return {"step_ms": _median_ms(steps)} if steps else {}


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def _megabytes(size: int) -> float:
    return round(size / _MB, 1)


async def _took(run: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await run()
    return (time.perf_counter() - began) * 1e3


def _told(value: float) -> str:
    return f"{value:.1f}"
