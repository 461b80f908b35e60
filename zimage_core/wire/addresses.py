"""What addresses mean."""

import contextlib
import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"
