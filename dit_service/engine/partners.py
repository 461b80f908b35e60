"""Devices of one host that train together: each holds the model, computes its part of every batch,
and takes the step that all their gradients say. The first of them is the worker, which tells the
others what it is told itself.

Each of the others is a process with a socket to the worker; gradients go by torch.distributed.
"""

import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dit_service import messages
from dit_service.engine import device as devices
from dit_service.engine.diary import Diary
from dit_service.engine.training import Means, Trainings
from dit_service.model import loading
from zimage_core.errors import InternalError, InvalidSettings, Overloaded, ZImageError
from zimage_core.serving import logs, pipe
from zimage_core.serving.child import is_sticky
from zimage_core.settings import DitSettings

_log = logging.getLogger(__name__)

_PROGRAM = "from dit_service.engine.partners import main; main()"
"""What a partner runs: a module that is run itself is another than the one that is imported."""
_TOGETHER = 1 << 26
"""Numbers that are summed at once."""


@dataclass(frozen=True, slots=True)
class _Begin:
    """Worker to partner: who it is."""

    rank: int
    count: int
    meeting: Path
    settings: DitSettings
    model: messages.Model
    room_bytes: float


@dataclass(frozen=True, slots=True)
class _Done:
    """Partner to worker: what was told is done, or its part of a step is computed."""

    error: ZImageError | None = None


@dataclass(frozen=True, slots=True)
class _Go:
    """Worker to partner: all have computed theirs, and sum up now; or not all could."""

    is_given_up: bool


class Partners:
    """The worker's side."""

    def __init__(self, settings: DitSettings, model: messages.Model, room_bytes: float) -> None:
        """Starts them; returns when all are there."""
        if model.device.startswith("cuda") and torch.cuda.device_count() < settings.train_devices:
            raise InvalidSettings(
                f"train_devices {settings.train_devices}: this machine has "
                f"{torch.cuda.device_count()}",
                fields={"field": "train_devices", "given": str(settings.train_devices)},
            )
        self._folder = tempfile.TemporaryDirectory(prefix="zimage-")
        meeting = Path(self._folder.name) / "meeting"
        self.device_count = settings.train_devices
        self._partners = [
            _Partner(_Begin(rank, self.device_count, meeting, settings, model, room_bytes))
            for rank in range(1, self.device_count)
        ]
        self.is_busy = False
        """Whether they are at a step: another training's waits for it."""
        for error in [partner.hear() for partner in self._partners]:  # all are loaded
            _raise(error)
        for partner in self._partners:
            partner.tell(_Go(is_given_up=False))
        _meet(0, self.device_count, meeting, model)

    def part(self, count: int) -> range:
        """Which samples of a batch are computed here."""
        return _part(0, self.device_count, count)

    def largest_part(self, count: int) -> int:
        """How many of a batch one of them computes at most."""
        return -(-count // self.device_count)

    def follow(self, asked: messages.OpenTraining | messages.CloseTraining) -> None:
        """They do the same; raises what went wrong with one."""
        for partner in self._partners:
            partner.tell(asked)
        for error in [partner.hear() for partner in self._partners]:
            _raise(error)

    def begin(self, asked: messages.Learn) -> None:
        """They compute their parts of a step."""
        self.is_busy = True
        for partner in self._partners:
            partner.tell(asked)

    def shared(self, loss: float, weights: Sequence[Tensor]) -> float:
        """The loss of all, and the gradients of all; raises what went wrong with one of them."""
        errors = [partner.hear() for partner in self._partners]
        self._answer(errors)
        for error in errors:
            _raise(error)
        try:
            return _summed(loss, weights)
        except RuntimeError:
            _log.exception("gradients of several devices could not be summed: none can go on")
            os._exit(1)

    def give_up(self) -> None:
        """The step at hand is not taken."""
        if self.is_busy:
            self._answer([partner.hear() for partner in self._partners], is_given_up=True)

    def _answer(self, errors: list[ZImageError | None], *, is_given_up: bool = False) -> None:
        self.is_busy = False
        is_given_up |= any(errors)
        for partner, error in zip(self._partners, errors, strict=True):
            if error is None:
                partner.tell(_Go(is_given_up))


class _Partner:
    """One of them, from the worker's side."""

    def __init__(self, begin: _Begin) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-c", _PROGRAM, str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._heard = self._socket.makefile("rb")
        self.tell(begin)

    def tell(self, message: object) -> None:
        """Sends it."""
        try:
            self._socket.sendall(pipe.packed(message))
        except ConnectionError:
            self._died()

    def hear(self) -> ZImageError | None:
        """Waits until it has done what it was told; what went wrong with that."""
        done = pipe.read(self._heard)
        if done is None:
            self._died()
        assert isinstance(done, _Done)
        return done.error

    def _died(self) -> NoReturn:
        _log.error("partner %s died: none can go on", self._process.pid)
        os._exit(1)


class _GivenUp(Exception):
    """The worker knows, and has told."""


class _Company:
    """A partner's side, as its trainings see it."""

    is_busy = False

    def __init__(self, worker: socket.socket) -> None:
        self._worker = worker
        self._told: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._rank, self.device_count = 0, 1
        self._owes = True
        threading.Thread(target=self._receive, name="worker", daemon=True).start()

    def begun(self) -> _Begin:
        """The first that the worker says."""
        begin = self._told.get()
        assert isinstance(begin, _Begin)
        self._rank, self.device_count = begin.rank, begin.count
        return begin

    def told(self) -> Iterator[object]:
        """What the worker says."""
        while True:
            told = self._told.get()
            self._owes = True
            yield told

    def part(self, count: int) -> range:
        """Which samples of a batch are computed here."""
        return _part(self._rank, self.device_count, count)

    def largest_part(self, count: int) -> int:
        """How many of a batch one of them computes at most."""
        return -(-count // self.device_count)

    def follow(self, asked: object) -> None:
        """Nobody follows this one."""

    def begin(self, asked: messages.Learn) -> None:
        """The worker has told the others."""

    def shared(self, loss: float, weights: Sequence[Tensor]) -> float:
        """The loss of all, and the gradients of all."""
        self.say(None)
        go = self._told.get()
        assert isinstance(go, _Go)
        if go.is_given_up:
            raise _GivenUp
        return _summed(loss, weights)

    def give_up(self) -> None:
        """The worker hears of it."""

    def say(self, error: ZImageError | None) -> None:
        """How it went: once for each thing that was told, whatever comes after."""
        if self._owes:
            self._owes = False
            self._worker.sendall(pipe.packed(_Done(error)))

    def _receive(self) -> None:
        """When the worker is gone, so is this process, whatever it is doing."""
        with self._worker.makefile("rb") as stream:
            while message := pipe.read(stream):
                self._told.put(message)
        os._exit(0)


def _meet(rank: int, count: int, meeting: Path, model: messages.Model) -> None:
    backend = "nccl" if model.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count)


def _part(rank: int, ranks: int, count: int) -> range:
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def _summed(loss: float, weights: Sequence[Tensor]) -> float:
    """Gradients that nobody has stay away: an optimiser leaves such weights alone."""
    device = weights[0].device
    there = torch.tensor([weight.grad is not None for weight in weights], device=device).int()
    losses = torch.tensor([loss], dtype=torch.float64, device="cpu").to(device)
    dist.all_reduce(there)
    dist.all_reduce(losses)
    wanted = [weight for weight, count in zip(weights, there.tolist(), strict=True) if count]
    for weight in wanted:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    for some in _together(wanted):
        gradients = [weight.grad for weight in some if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    return float(losses)


def _together(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    some: list[Tensor] = []
    for weight in weights:
        if some and sum(one.numel() for one in some) + weight.numel() > _TOGETHER:
            yield some
            some = []
        some.append(weight)
    if some:
        yield some


def _raise(error: ZImageError | None) -> None:
    if error is not None:
        raise error


@torch.inference_mode()
def main() -> None:
    """A partner's life."""
    logs.configure()
    worker = socket.socket(fileno=int(sys.argv[1]))
    company = _Company(worker)
    begin = company.begun()
    try:
        trainings = _trainings(begin, company)
    except ZImageError as error:
        company.say(error)
        return
    company.say(None)
    for told in company.told():
        try:
            match told:
                case _Go():
                    _meet(begin.rank, begin.count, begin.meeting, begin.model)
                case messages.Learn():
                    for _ in trainings.learn(told, emit=lambda _event: None):
                        pass  # nobody else wants this device
                case messages.OpenTraining() | messages.CloseTraining():
                    for _ in trainings.turn_to(told, emit=lambda _event: None):
                        pass
                    company.say(None)
        except _GivenUp:
            continue
        except Exception as error:  # noqa: BLE001 - the worker raises it
            company.say(_said(error))


def _said(error: Exception) -> ZImageError:
    """To the worker; raises a fault of the device."""
    if is_sticky(error):
        raise error
    if isinstance(error, ZImageError):
        return error
    _log.error("a partner's part failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        return Overloaded("a partner's device is full", reason="DEVICE_MEMORY")
    return InternalError("internal error of a partner")


def _trainings(begin: _Begin, company: _Company) -> Trainings:
    settings, model = begin.settings, begin.model
    device = devices.choose_device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", begin.rank)
        torch.cuda.set_device(device)
    devices.sum_in_full()
    dtype = devices.choose_type(settings.dtype, device)
    residence = loading.Residence(model.weights)
    transformer = loading.load_transformer(settings.model, device, dtype, residence)

    def restore() -> None:
        loading.restore_transformer(transformer, settings.model)

    means = Means(
        room_bytes=begin.room_bytes,
        restore=restore if settings.full_training else None,
        company=company,
        kept_bytes=settings.training_cache_bytes,
    )
    return Trainings(
        transformer, model.attention_backend, lambda _what, _seconds: None, Diary(), means
    )
