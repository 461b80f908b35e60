"""How full this machine's battery is: laptops learn, too."""

import time

import psutil

_LOOK_SECONDS = 10.0


class Battery:
    """Looked at from time to time."""

    def __init__(self) -> None:
        self._percent: float | None = None
        self._looked = float("-inf")

    def percent(self) -> float | None:
        """As it was of late; None without one, and while it is being charged."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._percent = _percent()
        return self._percent


def _percent() -> float | None:
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, NotImplementedError, RuntimeError, ValueError):
        return None  # not every system tells, and none is worth a training
    return battery.percent if battery and battery.power_plugged is False else None
