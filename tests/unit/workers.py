"""Small workers that really run in a process of their own, each with one habit."""

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_service import messages
from zimage_core.errors import InvalidModel, InvalidRequest
from zimage_core.formats.encoder_files import EncoderFiles
from zimage_core.serving.child import Port
from zimage_core.settings import EncoderSettings


def echo(port: Port, settings: object) -> None:
    """Answers each word with its letters; knows a few orders."""
    port.ready(settings)
    while True:
        submitted = port.next_call()
        with port.answering(submitted):
            _obey(port, submitted.call, str(submitted.payload))


def _obey(port: Port, call: int, word: str) -> None:
    match word:
        case "refuse":
            raise InvalidRequest("no", reason="NO")
        case "stumble":
            raise RuntimeError("secret")
        case "die":
            os._exit(3)
        case "hang":
            port.announce("step", 0.001)
            threading.Event().wait()
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "until cancelled":
            while True:
                port.emit(call, "still here")
        case _:
            for letter in word:
                port.emit(call, letter)


def pictures(port: Port, settings: object) -> None:
    """Answers every call with two small pictures, at once."""
    port.ready(settings)
    while True:
        submitted = port.next_call()
        with port.answering(submitted):
            for index in range(2):
                port.emit(submitted.call, messages.Picture(index, bytes(64 * 64 * 3)))
            port.emit(submitted.call, messages.Spent(step_count=2, forward_count=2, occupancy=2))


def offloaded_encoder(port: Port, settings: EncoderSettings) -> None:
    """Its weights come and go, though from host memory to host memory; while they are away nothing
    can be computed."""
    import torch

    from encoder_service.engine.residence import Residence
    from encoder_service.engine.schedule import Schedule
    from encoder_service.model import loading

    class Away(Residence):
        def leave(self) -> None:
            super().leave()
            for holder, name, tensor in self._places:
                holder[name] = torch.nn.Parameter(tensor.to("meta"), requires_grad=False)

    files = EncoderFiles.of(settings.model)
    encoder = loading.load(files, -2, "cpu", settings.dtype)
    schedule = Schedule(encoder, port, settings, Away(encoder, torch.device("cpu")))
    schedule.warm_up()
    port.ready(settings)
    schedule.serve()


def _serve(port: Port, settings: object, folder: Path, studio: Any) -> None:
    """Draws with a real model in a studio of that kind."""
    import torch

    from dit_service.engine.schedule import Room, Schedule
    from dit_service.engine.training import Means, Trainings
    from dit_service.model import loading

    cpu = torch.device("cpu")
    with torch.inference_mode():
        transformer = loading.load_transformer(folder, cpu, torch.float32)
        vae = loading.load_vae(folder, cpu, torch.float32)
        port.ready(settings)
        of_kind = studio(transformer, vae, "sdpa", port.announce)
        trainings = Trainings(transformer, "sdpa", port.announce, of_kind.diary, Means())
        Schedule(of_kind, trainings, port, Room(0.25, 1e9)).serve()


def cramped(port: Port, settings: tuple[Path, int]) -> None:
    """Draws with a real model on a device that has memory for so many requests in a step."""
    import torch

    from dit_service.engine.generate import Predicted, Studio
    from dit_service.engine.packing import Asked

    folder, room = settings

    class Cramped(Studio):
        def predict(self, asked: Sequence[Asked]) -> list[Predicted]:
            if len(asked) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().predict(asked)

    _serve(port, settings, folder, Cramped)


def loses_its_device_once(port: Port, settings: tuple[Path, str]) -> None:
    """Draws with a real model; a step of several is the end of the device of its first life."""
    import torch

    from dit_service.engine.generate import Predicted, Studio
    from dit_service.engine.packing import Asked

    folder, lost = settings[0], Path(settings[1])

    class Losing(Studio):
        def predict(self, asked: Sequence[Asked]) -> list[Predicted]:
            if len(asked) > 1 and not lost.exists():
                lost.touch()
                raise torch.AcceleratorError("CUDA error: an illegal memory access")
            return super().predict(asked)

    _serve(port, settings, folder, Losing)


def slow_developer(port: Port, settings: tuple[Path, bool]) -> None:
    """Draws with a real model on a device that is long at a picture, and may be waited for or not:
    then whoever waits for it fails."""
    from torch import Tensor

    from dit_service.engine.developing import Developing
    from dit_service.engine.generate import Studio
    from dit_service.engine.pace import Pace

    folder, may_wait = settings

    class Long(Developing):
        looks = 0

        @property
        def is_there(self) -> bool:
            self.looks += 1
            return self.looks > 10

        def wait(self) -> None:
            assert may_wait
            self.looks = 10

    class Slow(Studio):
        def _develop(self, latents_CHW: Tensor) -> Developing:
            return Long(self._vae, latents_CHW, Pace("decode", 1.0, port.announce))

    _serve(port, settings, folder, Slow)


def broken_model(port: Port, settings: object) -> None:
    """Cannot load, and never will."""
    raise InvalidModel("it is a Flux", reason="FOREIGN_MODEL")


def dies_while_loading(port: Port, settings: object) -> None:
    """As when the system runs out of memory."""
    os._exit(9)
