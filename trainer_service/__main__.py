"""`python -m trainer_service`: the trainer service."""

import os
import sys


def main() -> int:
    """Runs it."""
    os.environ.setdefault("GRPC_VERBOSITY", "INFO")  # tells why a TLS handshake failed
    from trainer_service.rpc.service import service
    from zimage_core.serving.main import run
    from zimage_core.settings import TrainerSettings

    return run(service, TrainerSettings)


if __name__ == "__main__":
    sys.exit(main())
