"""Pictures to latents and back, for whoever wants nothing else of this service."""

import torch
from torch import Tensor

from dit_service import messages
from dit_service.engine.device import to_device
from dit_service.engine.diary import Diary, part
from dit_service.engine.pace import Announce, Pace
from dit_service.model.vae import Vae
from zimage_core.errors import InvalidRequest
from zimage_core.tensors import TensorData

_SLOWEST_SECONDS_PER_PIXEL = 1e-3


class Converter:
    """The VAE, and how fast it is here."""

    def __init__(self, vae: Vae, device: torch.device, announce: Announce, diary: Diary) -> None:
        self._vae = vae
        self._diary = diary
        self._device = device
        self._encoding = Pace("encode image", _SLOWEST_SECONDS_PER_PIXEL, announce)
        self._decoding = Pace("decode latents", _SLOWEST_SECONDS_PER_PIXEL, announce)

    def convert(self, asked: object) -> TensorData | messages.Picture:
        """The latents of a picture, or the picture of latents."""
        match asked:
            case messages.EncodeImage(width, height, rgb):
                with self._encoding.working(width * height) as piece:
                    picture_HW3 = torch.frombuffer(bytearray(rgb), dtype=torch.uint8)
                    plain = _plain(self._vae.encode(picture_HW3.view(height, width, 3)))
                self._diary.enter("encode", piece.seconds, part())
                return plain
            case messages.DecodeLatents(latents):
                _, height, width = latents.shape
                with self._decoding.working(height * width * self._vae.factor**2) as piece:
                    latents_CHW = to_device(latents, self._device).float()
                    picture_HW3, is_finite = self._vae.decode(latents_CHW)
                    if not is_finite:
                        raise _no_numbers("the latents hold, or lead to,")
                    rgb = picture_HW3.cpu().numpy().tobytes()
                self._diary.enter("decode", piece.seconds, part())
                return messages.Picture(0, rgb)
        raise TypeError(f"this worker does not know {type(asked).__name__}")


def _plain(latents_CHW: Tensor) -> TensorData:
    if not latents_CHW.isfinite().all():
        raise _no_numbers("the picture's latents came out with")
    data = latents_CHW.cpu().contiguous().numpy().tobytes()
    return TensorData("float32", tuple(latents_CHW.shape), data)


def _no_numbers(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what} values that are no finite numbers", reason="NOT_FINITE")
