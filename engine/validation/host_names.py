"""The hosts that an engine takes weights and prompts' pages from: names, addresses and networks."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

MAX_HOST_LENGTH = 253
# Where a decode's side finds a prefill's, whatever else is allowed.
LOOPBACK = ("localhost", "127.0.0.0/8", "::1")
HOST_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"


def check_address(host: str, allowed: Sequence[str] | None) -> None:
    """Of a trainer, as a client names it. `allowed` are names, addresses and networks (`10.1.0.0/16`); None: all.

    Raises:
        ValueError: it is neither an IP address nor a host name, or not allowed.
    """
    if not is_host(host):
        raise ValueError(
            f"master_address={host[:MAX_HOST_LENGTH]!r}: must be an IP address or a host name, "
            f"of at most {MAX_HOST_LENGTH} characters"
        )
    if allowed is not None and not any(covers(entry, host) for entry in allowed):
        raise ValueError(f"master_address={host!r}: is none of the hosts that this engine takes weights from")


def check_allowed_hosts(field: str, allowed: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one is neither a host name nor an address or network.
    """
    for entry in allowed:
        if network_of(entry) is None and not is_host(entry):
            raise ValueError(f"{field}: {entry!r} must be a host name, an IP address or a network (10.1.0.0/16)")


def may_have_prompts(host: str, allowed: Sequence[str]) -> bool:
    """Whether a decode's side connects to this host where a request says so."""
    return is_host(host) and any(covers(entry, host) for entry in (*LOOPBACK, *allowed))


def is_host(text: str) -> bool:
    if network_of(text) is not None:
        return "/" not in text
    return len(text) <= MAX_HOST_LENGTH and re.fullmatch(rf"{HOST_LABEL}(\.{HOST_LABEL})*\.?", text) is not None


def covers(entry: str, host: str) -> bool:
    """A name covers itself alone: it is not looked up, since who answers for it may change his mind."""
    network, address = network_of(entry), network_of(host)
    if network is None or address is None:
        return entry.casefold() == host.casefold()
    return address.network_address in network


def network_of(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
