"""Where an HTTP service listens, and the names by which it may be called there."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Sequence

from ..engine.entrypoints.origin_guard import AllowedHosts

logger = logging.getLogger(__name__)


def listen(host: str, port: int, *, has_key: bool) -> socket.socket:
    """
    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        key = "an API key is asked for" if has_key else "anybody who reaches it may use it; set an API key"
        logger.warning("listening on %s, not on loopback: %s", host, key)
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allowed_hosts(host: str, names: Sequence[str], listener: socket.socket) -> AllowedHosts:
    """The address that is listened on, the name by which it was given, those of this machine, and what is allowed."""
    machine = socket.gethostname()
    return AllowedHosts(listener.getsockname()[0], (host, machine, machine.partition(".")[0], *names))
