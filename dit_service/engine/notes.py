"""What was measured at an earlier start, kept in a file of this user: a start need not measure it
again."""

import json
import logging
from pathlib import Path
from typing import Any

import platformdirs

from zimage_core.files import write_whole

_log = logging.getLogger(__name__)


class Notes:
    """JSON objects by what they are about. A file that cannot be read is an empty one."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self._file = (folder or platformdirs.user_cache_path("zimage")) / name

    def get(self, about: str) -> dict[str, Any]:
        """What is known; empty for nothing."""
        found = self._all().get(about)
        return found if isinstance(found, dict) else {}

    def keep(self, about: str, known: dict[str, Any]) -> None:
        """For the next start, as far as there is a place to write."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(self._all() | {about: known}, indent=1).encode())
        except OSError as error:
            _log.warning("%s is not kept: %s", self._file, error)

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
