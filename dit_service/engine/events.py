"""A request's events on their way out of the worker."""

import time

from dit_service import messages
from zimage_core.serving.child import Port

_STEP_EVENT_SECONDS = 0.05


class Events:
    """Fast steps are told only now and then: on a CPU each message takes time from the work."""

    def __init__(self, port: Port, call: int) -> None:
        self._port = port
        self._call = call
        self._told = 0.0

    def __call__(self, event: object) -> None:
        """Sends it, or not; raises Cancelled when nobody waits for the request any more."""
        now = time.monotonic()
        is_step = isinstance(event, messages.Denoised) and event.step > 0
        if is_step and now - self._told < _STEP_EVENT_SECONDS:
            self._port.refuse_cancelled(self._call)
            return
        self._told = now
        self._port.emit(self._call, event)
