"""In which form a transformer's weights are on the device. One that loses something has to prove at
the start that it draws what the file draws; how it did is remembered."""

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor
from torch.nn import functional

from dit_service.engine.notes import Notes
from dit_service.model.attention.backend import Place
from dit_service.model.narrow import AS_STORED, FORMS, MULTIPLIED, obstacle
from zimage_core.errors import InvalidSettings
from zimage_core.planning.memory import FULL
from zimage_core.serving.child import is_sticky

_log = logging.getLogger(__name__)

FASTEST = "fastest"
LEAST_COSINE, LEAST_PSNR_DB = 0.995, 30.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What a form made of some embeddings and noises, and how fast a step is with it."""

    latents: tuple[Tensor, ...]
    pictures: tuple[Tensor, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Likeness:
    """How near a form comes to the weights of the file, by the median of some pictures: now and
    then one goes another way for little. And how much faster it is."""

    cosine: float
    """Of the latents."""
    psnr_db: float
    """Of the picture; at most `_EQUAL_DB`."""
    speed: float

    @property
    def is_enough(self) -> bool:
        """Whether its pictures count as those of the file."""
        return self.cosine >= LEAST_COSINE and self.psnr_db >= LEAST_PSNR_DB

    def __str__(self) -> str:
        return (
            f"latents' cosine {self.cosine:.4f} (at least {LEAST_COSINE}), picture "
            f"{self.psnr_db:.1f} dB (at least {LEAST_PSNR_DB:.0f}), {self.speed:.2f} times as fast"
        )


@dataclass(frozen=True, slots=True)
class Precision:
    """The form in use, and why."""

    form: str
    reason: str


_EQUAL_DB = 100.0


@dataclass(frozen=True)
class Forms:
    """Those that there are for one model in one place."""

    stored: str
    """The form that keeps what the file holds."""
    place: Place
    try_out: Callable[[str], Trial]
    notes: Notes
    about: str
    """Which file, on which device."""

    def choose(self, wanted: str, *, is_checked: bool = True) -> Precision:
        """The form wanted; raises InvalidSettings where it does not work, or loses too much."""
        allowed = (AS_STORED, *FORMS, FASTEST)
        if wanted not in allowed:
            raise _refusal(wanted, f"there is none of that name; allowed are {', '.join(allowed)}")
        if wanted == FASTEST:
            return self._fastest()
        if wanted == AS_STORED:
            why = obstacle(self.stored, self.place)
            return Precision(FULL, why) if why else Precision(self.stored, "as the file has them")
        if why := obstacle(wanted, self.place):
            raise _refusal(wanted, why)
        if wanted in (FULL, self.stored):
            return Precision(wanted, "it was asked for, and the file has no better")
        if not is_checked:
            return Precision(wanted, "it was asked for, unchecked")
        likeness = self._likeness(wanted)
        if not likeness.is_enough:
            raise _refusal(wanted, f"pictures would be others than the file's: {likeness}")
        return Precision(wanted, f"it was asked for: {likeness}")

    def _fastest(self) -> Precision:
        if why := obstacle(MULTIPLIED, self.place):
            return Precision(self.choose(AS_STORED).form, f"{MULTIPLIED} does not work: {why}")
        try:
            likeness = self._likeness(MULTIPLIED)
        except Exception as error:
            if is_sticky(error):
                raise
            _log.warning("%s was tried", MULTIPLIED, exc_info=True)
            return Precision(self.choose(AS_STORED).form, f"{MULTIPLIED} failed: {error}")
        if likeness.is_enough and likeness.speed > 1:
            return Precision(MULTIPLIED, f"it is the fastest: {likeness}")
        return Precision(self.choose(AS_STORED).form, f"better than {MULTIPLIED}: {likeness}")

    def _likeness(self, form: str) -> Likeness:
        about = f"{form} for {self.about}"
        known = self.notes.get(about)
        try:
            return Likeness(**{name: float(value) for name, value in known.items()})
        except (TypeError, ValueError):
            pass
        reference = FULL if obstacle(self.stored, self.place) else self.stored
        likeness = _compared(self.try_out(form), self.try_out(reference))
        self.notes.keep(about, asdict(likeness))
        return likeness


def _compared(trial: Trial, reference: Trial) -> Likeness:
    return Likeness(
        cosine=statistics.median(map(_cosine, trial.latents, reference.latents)),
        psnr_db=statistics.median(map(_psnr_db, trial.pictures, reference.pictures)),
        speed=reference.seconds / trial.seconds,
    )


def _cosine(one_CHW: Tensor, other_CHW: Tensor) -> float:
    """0 for what is no number."""
    cosine = functional.cosine_similarity(one_CHW.flatten(), other_CHW.flatten(), dim=0)
    return float(cosine.nan_to_num(0.0))


def _psnr_db(one_HW3: Tensor, other_HW3: Tensor) -> float:
    error = float((one_HW3.float() - other_HW3.float()).square().mean())
    return min(_EQUAL_DB, 10 * math.log10(255**2 / error)) if error else _EQUAL_DB


def _refusal(wanted: str, why: str) -> InvalidSettings:
    return InvalidSettings(
        f"weights {wanted}: {why}",
        reason="WEIGHTS",
        fields={"field": "weights", "given": wanted},
    )
