"""A picture between its latents and the host: the device goes on with others meanwhile."""

from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import torch
from torch import Tensor

from dit_service import messages
from dit_service.engine.device import Download
from dit_service.engine.pace import Pace
from dit_service.model.vae import Vae
from zimage_core.errors import InvalidRequest

_A_MOMENT = 0.01
_beside = ThreadPoolExecutor(1, thread_name_prefix="vae")


class _Aside:
    """A VAE on another device, such as the host: it works in its own thread, one picture after the
    other, while the transformer goes on."""

    def __init__(self, vae: Vae, latents_CHW: Tensor) -> None:
        self._decoded = _beside.submit(self._decode, vae, latents_CHW)

    @property
    def is_there(self) -> bool:
        return self._decoded.done()

    def wait(self) -> tuple[Tensor, ...]:
        return self._decoded.result()

    def pause(self) -> None:
        """A moment at most: meanwhile others may come."""
        wait_for([self._decoded], _A_MOMENT)

    def leave(self) -> None:
        """What did not begin yet never will."""
        self._decoded.cancel()

    @staticmethod
    @torch.inference_mode()  # counts in its own thread alone
    def _decode(vae: Vae, latents_CHW: Tensor) -> tuple[Tensor, ...]:
        return Download(*vae.decode(latents_CHW)).wait()


class Developing:
    """The VAE's work on some latents, begun."""

    def __init__(self, vae: Vae, latents_CHW: Tensor, pace: Pace) -> None:
        _, height, width = latents_CHW.shape
        self._piece = pace.begin(height * width * vae.factor**2)
        if vae.device == latents_CHW.device:
            self._download: Download | _Aside = Download(*vae.decode(latents_CHW))
        else:
            self._download = _Aside(vae, latents_CHW)

    @property
    def is_there(self) -> bool:
        """Whether `picture` would return at once."""
        return self._download.is_there

    @property
    def seconds(self) -> float:
        """How long it took, once the picture was taken."""
        return self._piece.seconds

    def wait(self) -> None:
        """Returns when the picture is there, or after a moment where another device works on it. A
        fault of it is `picture`'s to raise."""
        self._piece.announce()  # those before it may have taken their time
        self._download.pause()

    def leave(self) -> None:
        """Nobody wants the picture any more."""
        self._download.leave()

    def picture(self, spent: messages.Spent) -> Tensor:
        """Its uint8 RGB, [H, W, 3]; enters its time. Better no picture than a black one."""
        picture_HW3, is_finite = self._download.wait()
        self._piece.done()
        spent.decode_seconds += self.seconds
        if not is_finite:
            raise InvalidRequest(
                "the picture's values left the range of numbers; ask for less guidance",
                reason="NOT_FINITE",
            )
        return picture_HW3
