"""The adapters on the device: who wants some has them read from their files while others go on."""

import logging
import time
from collections import OrderedDict
from collections.abc import Container, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import torch

from dit_service.engine.pace import Announce
from dit_service.messages import AdapterUse
from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Adapter, Use, Uses
from dit_service.model.transformer import ZImageTransformer
from zimage_core.errors import Overloaded

_log = logging.getLogger(__name__)

_A_MOMENT = 0.01
_SLOWEST_BYTES_PER_SECOND = 1e7
_STORED_BYTES = 2
"""Of a number in most adapters' files: what they take on the device follows from their sizes, which
are known before anything is read."""


@dataclass(frozen=True, slots=True)
class Unready:
    """Adapters on their way to the device, or waiting for room there."""

    loading: "Future[Adapter] | None"

    @property
    def is_there(self) -> bool:
        """Whether it is worth to look again."""
        return self.loading is None or self.loading.done()

    def wait(self) -> None:
        """A moment at most: meanwhile others may come."""
        if self.loading is None:
            time.sleep(_A_MOMENT)
        else:
            wait_for([self.loading], _A_MOMENT)


@dataclass(slots=True)
class _Known:
    """An adapter on the device, or on its way there."""

    loading: "Future[Adapter]"
    size: float
    """What it is expected to take there."""
    user_count: int = 0


class Adapters:
    """Those used of late stay as far as there is room, and those in use in any case; who wants more
    than fits beside these waits for its turn."""

    def __init__(self, model: ZImageTransformer, room_bytes: float, announce: Announce) -> None:
        self._model = model
        self._room = room_bytes
        self._announce = announce
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """Those used last stand behind."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def borrowed(self, wanted: Sequence[AdapterUse]) -> Generator[Unready, object, Uses]:
        """Those wanted, on the device until they are given back; yields what has to be waited for.
        Raises Overloaded for more than there ever is room for."""
        files = {one.sha256: one for one in wanted}
        self._refuse_too_much(files)
        while self._used_bytes(besides=files) + self._bytes(files) > self._room:
            yield Unready(None)
        for name, file in files.items():
            self._borrow(name, file)
        try:
            self._make_room()
            for name, file in files.items():
                while not (loading := self._known[name].loading).done():
                    seconds = self._size(file) / _SLOWEST_BYTES_PER_SECOND
                    self._announce("load adapter", seconds)
                    yield Unready(loading)
            return tuple(Use(self._known[one.sha256].loading.result(), one.scale) for one in wanted)
        except BaseException:
            self.give_back(wanted)
            raise

    def give_back(self, borrowed: Sequence[AdapterUse]) -> None:
        """Says that a request uses them no more."""
        for name in {one.sha256 for one in borrowed}:
            self._known[name].user_count -= 1

    def _refuse_too_much(self, files: Mapping[str, AdapterUse]) -> None:
        wanted = self._bytes(files)
        if wanted > self._room:
            raise Overloaded(
                f"the adapters take {wanted:.0f} bytes on the device, and there is room for "
                f"{self._room:.0f} (max_adapter_bytes)",
                reason="ADAPTER_MEMORY",
                fields={"given": f"{wanted:.0f}", "allowed": f"{self._room:.0f}"},
            )

    def _bytes(self, files: Mapping[str, AdapterUse]) -> float:
        return sum(self._size(file) for file in files.values())

    def _size(self, file: AdapterUse) -> float:
        return file.size_bytes * self._model.dtype.itemsize / _STORED_BYTES

    def _used_bytes(self, besides: Container[str]) -> float:
        return sum(
            known.size
            for name, known in self._known.items()
            if known.user_count and name not in besides
        )

    def _borrow(self, name: str, file: AdapterUse) -> None:
        known = self._known.get(name)
        if known is None:
            known = _Known(self._reader.submit(self._load, file), self._size(file))
            self._known[name] = known
        elif known.loading.done() and known.loading.exception():  # this one may have more luck
            known.loading = self._reader.submit(self._load, file)
        known.user_count += 1
        self._known.move_to_end(name)

    def _make_room(self) -> None:
        for name, known in list(self._known.items()):
            if sum(one.size for one in self._known.values()) <= self._room:
                return
            if not known.user_count:
                del self._known[name]
                _log.info("adapter %s made room", name)

    @torch.inference_mode()  # counts in its own thread alone
    def _load(self, file: AdapterUse) -> Adapter:
        model = self._model
        adapter = load_adapter(file.file, model.config, model.device, model.dtype)
        _log.info("adapter %s is there", file.sha256)
        return adapter
