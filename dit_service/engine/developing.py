"""A picture between its latents and the host: the device goes on with others meanwhile."""

from torch import Tensor

from dit_service import messages
from dit_service.engine.device import Download
from dit_service.engine.pace import Pace
from dit_service.model.vae import Vae
from zimage_core.errors import InvalidRequest


class Developing:
    """The VAE's work on some latents, begun."""

    def __init__(self, vae: Vae, latents_CHW: Tensor, pace: Pace) -> None:
        _, height, width = latents_CHW.shape
        self._piece = pace.begin(height * width * vae.factor**2)
        self._download = Download(*vae.decode(latents_CHW))

    @property
    def is_there(self) -> bool:
        """Whether `picture` would return at once."""
        return self._download.is_there

    @property
    def seconds(self) -> float:
        """How long it took, once the picture was taken."""
        return self._piece.seconds

    def wait(self) -> None:
        """Returns when the picture is there."""
        self._download.wait()

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
