"""`python -m dit_service`: the DiT service."""

import sys

from dit_service.rpc.service import service
from zimage_core.serving.main import run
from zimage_core.settings import DitSettings

if __name__ == "__main__":  # the worker process imports this module again
    sys.exit(run(service, DitSettings))
