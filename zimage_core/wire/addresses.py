"""What addresses mean."""

import contextlib
import ipaddress


def several(addresses: str) -> list[str]:
    """Those that commas join."""
    return [one.strip() for one in addresses.split(",") if one.strip()]


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached by it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"
