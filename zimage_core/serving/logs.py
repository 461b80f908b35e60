"""One log format for every process of a service: JSON lines, or text at a terminal."""

import json
import logging
import sys
import time

from zimage_core.wire import request_id


def configure(level: int = logging.INFO) -> None:
    """Installs the one handler; libraries of ours only ever get their logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Text() if sys.stderr.isatty() else _Json())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "process": record.processName,
            "message": record.getMessage(),
        }
        if request := request_id.current.get():
            line["request_id"] = request
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        request = request_id.current.get()
        return super().format(record) + (f"  [{request}]" if request else "")
