"""How full this machine's battery is: laptops learn, too."""

import logging
import math
import time

import psutil

_log = logging.getLogger(__name__)

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
            self._percent = self._read()
        return self._percent

    def _read(self) -> float | None:
        read = getattr(psutil, "sensors_battery", None)  # not every system has it
        try:
            battery = read() if read else None
        except (OSError, RuntimeError) as error:  # none is worth a training
            self._looked = math.inf  # nor another look
            _log.info("batteries of this machine cannot be read: %s", error)
            return None
        return battery.percent if battery and battery.power_plugged is False else None
