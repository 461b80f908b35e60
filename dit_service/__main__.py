"""`python -m dit_service`: the DiT service."""

import sys


def main() -> int:
    """Runs the front. It is imported here because the worker process, which speaks no gRPC, imports
    this module as well."""
    from dit_service.rpc.service import service
    from zimage_core.serving.main import run
    from zimage_core.settings import DitSettings

    return run(service, DitSettings)


if __name__ == "__main__":
    sys.exit(main())
