"""The adapters on the device: who wants one has it read from its file while others go on."""

import logging
from collections import OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass

import torch

from dit_service.messages import AdapterUse
from dit_service.model.adapter_loading import load_adapter
from dit_service.model.adapters import Adapter, Use, Uses
from dit_service.model.transformer import ZImageTransformer
from zimage_core.errors import Overloaded

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loading:
    """An adapter on its way to the device."""

    future: "Future[Adapter]"

    @property
    def is_there(self) -> bool:
        """Whether it came, or failed."""
        return self.future.done()

    def wait(self) -> None:
        """Returns when it did."""
        wait_for([self.future])


class Adapters:
    """Those used of late stay, as far as there is room. One that goes while a request uses it stays
    with that request."""

    def __init__(self, model: ZImageTransformer, room_bytes: float) -> None:
        self._model = model
        self._room = room_bytes
        self._resident: OrderedDict[str, Adapter] = OrderedDict()
        self._loading: dict[str, Loading] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def fetched(self, wanted: Sequence[AdapterUse]) -> Generator[Loading, object, Uses]:
        """Those wanted, on the device; yields what they have to be waited for."""
        uses = []
        for one in wanted:
            adapter = yield from self._fetched(one)
            if one.scale:
                uses.append(Use(adapter, one.scale))
        return tuple(uses)

    def _fetched(self, wanted: AdapterUse) -> Generator[Loading, object, Adapter]:
        name = wanted.sha256
        if name in self._resident:
            self._resident.move_to_end(name)
            return self._resident[name]
        if name not in self._loading:
            self._loading[name] = Loading(self._reader.submit(self._load, wanted))
        loading = self._loading[name]
        try:
            while not loading.is_there:
                yield loading
        finally:
            self._loading.pop(name, None)
        adapter = loading.future.result()
        self._keep(name, adapter)
        return adapter

    @torch.inference_mode()  # counts in its own thread alone
    def _load(self, wanted: AdapterUse) -> Adapter:
        model = self._model
        adapter = load_adapter(wanted.file, model.config, model.device, model.dtype)
        if adapter.bytes > self._room:
            raise Overloaded(
                f"the adapter {wanted.sha256} takes {adapter.bytes} bytes on the device, and there "
                f"is room for {self._room:.0f} (max_adapter_bytes)",
                reason="ADAPTER_MEMORY",
                fields={"given": str(adapter.bytes), "allowed": f"{self._room:.0f}"},
            )
        _log.info("adapter %s is there, %s bytes", wanted.sha256, adapter.bytes)
        return adapter

    def _keep(self, name: str, adapter: Adapter) -> None:
        self._resident[name] = adapter
        while sum(one.bytes for one in self._resident.values()) > self._room:
            gone, _ = self._resident.popitem(last=False)
            _log.info("adapter %s made room", gone)
