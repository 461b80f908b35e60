"""`python -m dit_service`: the DiT service."""

import os
import sys


def main() -> int:
    """Runs the front. It is imported here because the worker process, which speaks no gRPC, imports
    this module as well."""
    os.environ.setdefault("GRPC_VERBOSITY", "INFO")  # tells why a TLS handshake failed
    from dit_service.rpc.service import service
    from zimage_core.serving.main import run
    from zimage_core.settings import DitSettings

    return run(service, DitSettings)


if __name__ == "__main__":
    sys.exit(main())
