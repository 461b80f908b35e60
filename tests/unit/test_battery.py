"""A battery is told while it is used, and nothing else is worth a training."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dit_service.rpc.battery import Battery


def _sensors(percent: float, *, plugged: bool | None) -> Any:
    return lambda: SimpleNamespace(percent=percent, power_plugged=plugged)


@pytest.mark.parametrize(
    ("plugged", "told"), [(False, 41.5), (True, None), (None, None)], ids=["used", "fed", "unknown"]
)
def test_a_battery_counts_while_it_is_used(
    plugged: bool | None, told: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", _sensors(41.5, plugged=plugged), raising=False)
    assert Battery().percent() == told


def test_a_machine_that_cannot_tell_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(psutil, "sensors_battery", broken, raising=False)
    assert Battery().percent() is None
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert Battery().percent() is None
