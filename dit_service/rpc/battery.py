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
            battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
            self._percent = battery.percent if battery and not battery.power_plugged else None
        return self._percent
