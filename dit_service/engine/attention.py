"""Which attention backend a worker uses: whatever can work here is tried on a small pack of samples
against exact arithmetic, and the fastest of those that computed right is taken."""

import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dit_service.engine.device import describe, library_versions
from dit_service.engine.notes import Notes
from dit_service.model.attention.backend import Backend, Place
from dit_service.model.attention.backends import BACKENDS
from zimage_core.errors import InvalidSettings

_log = logging.getLogger(__name__)

AUTO = "auto"
_AVAILABLE = "available: "
_TRIAL_LENGTHS, _TRIAL_HEADS = (33, 96, 7), 2
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.004}
_LOSSY_TOLERANCE = 0.1
"""Of the largest value."""
_RACE_LENGTHS = (4224, 1152)
"""A picture of 1024x1024 and one of 512x512, each with a long prompt."""
_RACE_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend in use, and why it is or is not, for each."""

    backend: str
    reasons: dict[str, str]


def choose(wanted: str, place: Place, head_count: int, memory: Path | None = None) -> Choice:
    """The backend wanted, or the best; raises InvalidSettings for one that cannot work here.
    `memory` is where the times of an earlier start are."""
    if wanted not in (AUTO, *BACKENDS):
        raise _refusal(wanted, "there is none of that name")
    reasons = {name: backend.obstacle(place) for name, backend in BACKENDS.items()}
    candidates = [name for name, obstacle in reasons.items() if not obstacle]
    if wanted != AUTO:
        if obstacle := reasons[wanted] or _fault(wanted, place):
            raise _refusal(wanted, obstacle)
        reasons |= dict.fromkeys(candidates, _AVAILABLE + "another was asked for")
        return Choice(wanted, reasons | {wanted: _AVAILABLE + "it was asked for"})
    for name in list(candidates):
        if BACKENDS[name].is_lossy:
            reasons[name] = _AVAILABLE + "only where it is asked for: it computes with fewer bits"
        elif fault := _fault(name, place):
            _log.warning("attention backend %s is not used: %s", name, fault)
            reasons[name] = fault
        else:
            continue
        candidates.remove(name)
    if not candidates:
        raise _refusal("sdpa", reasons["sdpa"])
    if len(candidates) == 1:
        return Choice(
            candidates[0], reasons | {candidates[0]: _AVAILABLE + "the only one that works here"}
        )
    race = _Race(place, head_count, Notes("attention.json", memory))
    seconds = race.seconds(candidates)
    best = min(candidates, key=seconds.__getitem__)
    for name in candidates:
        took = f"{seconds[name] * 1e3:.2f} ms for {sum(_RACE_LENGTHS)} tokens"
        reasons[name] = (
            _AVAILABLE + took if seconds[name] < math.inf else "it failed at the size of pictures"
        )
    return Choice(best, reasons | {best: f"{reasons[best]}, the fastest"})


def _refusal(wanted: str, why: str) -> InvalidSettings:
    allowed = ", ".join((AUTO, *BACKENDS))
    return InvalidSettings(
        f"attention_backend {wanted}: {why}; allowed are {allowed}, of those that work here",
        reason="ATTENTION_BACKEND",
        fields={"field": "attention_backend", "given": wanted, "allowed": allowed},
    )


def _fault(name: str, place: Place) -> str:
    """What was wrong at a trial; empty when nothing was."""
    backend = BACKENDS[name]
    qkv = _random(place, _TRIAL_HEADS, sum(_TRIAL_LENGTHS))
    try:
        attended_THE = _attended(backend, qkv, _TRIAL_LENGTHS).float().cpu()
    except Exception as error:
        if not _still_computes(place.device):
            raise _refusal(name, f"it broke the device at its trial: {error}") from error
        _log.debug("the trial of attention backend %s", name, exc_info=True)
        return f"its trial failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    exact_THE = _attended(BACKENDS["sdpa"], [x_THE.cpu().float() for x_THE in qkv], _TRIAL_LENGTHS)
    allowed = _LOSSY_TOLERANCE if backend.is_lossy else _TOLERANCE[place.dtype]
    if attended_THE.shape != exact_THE.shape:
        return f"it computes {list(attended_THE.shape)} where {list(exact_THE.shape)} is right"
    wrong = float((attended_THE - exact_THE).abs().max() / exact_THE.abs().max())
    if wrong <= allowed:  # not so where it is no number
        return ""
    return f"it computes wrong numbers: {wrong:.2g} of the largest, allowed is {allowed}"


def _still_computes(device: torch.device) -> bool:
    """Whether the device is there after a fault; after many it is, as for want of a kernel."""
    try:
        return bool(torch.ones(1, device=device).add(1).item() == 2)
    except Exception:  # noqa: BLE001 - whatever it says, it does not
        return False


def _random(place: Place, heads: int, tokens: int) -> list[Tensor]:
    """Queries, keys and values; large enough that a wrong scale shows."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, heads, place.head_dim)
    return [
        (2 * torch.randn(shape, generator=generator)).to(place.device, place.dtype)
        for _ in range(3)
    ]


def _attended(backend: Backend, qkv: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(qkv[0].device)
    return backend.attend(qkv[0], qkv[1], qkv[2], lengths, bounds)


@dataclass(frozen=True, slots=True)
class _Race:
    """How fast backends are here, by what was measured before or now."""

    place: Place
    head_count: int
    notes: Notes

    def seconds(self, names: Sequence[str]) -> dict[str, float]:
        """Of each."""
        known = self.notes.get(self._key)
        if not all(isinstance(known.get(name), int | float) for name in names):
            known = {name: self._measured(name) for name in names}
            if math.inf not in known.values():  # it may have been the memory
                self.notes.keep(self._key, known)
        return known

    def _measured(self, name: str) -> float:
        """Infinity for one that fails."""
        took = []
        try:
            qkv = _random(self.place, self.head_count, sum(_RACE_LENGTHS))
            for _ in range(1 + _RACE_ROUNDS):
                began = time.perf_counter()
                _attended(BACKENDS[name], qkv, _RACE_LENGTHS)
                if self.place.device.type != "cpu":
                    torch.accelerator.synchronize(self.place.device)
                took.append(time.perf_counter() - began)
        except Exception:  # noqa: BLE001 - there are others
            _log.warning("attention backend %s is not used", name, exc_info=True)
            return math.inf
        return statistics.median(took[1:])  # the first chooses kernels

    @property
    def _key(self) -> str:
        place = self.place
        what = f"{place.dtype} {self.head_count}x{place.head_dim}"
        return f"{describe(place.device)}, torch {library_versions()['torch']}, {what}"
