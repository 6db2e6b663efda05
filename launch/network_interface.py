"""Which network interface collectives use: gloo and NCCL want its name, and guess if they are not told."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIOCGIFADDR = 0x8915
INTERFACE_NAME_BYTES = 16
# struct ifreq: the name, then a sockaddr_in, whose address stands behind family and port.
REQUEST_BYTES = 40
ADDRESS_OFFSET = INTERFACE_NAME_BYTES + 4
GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"
VARIABLES = (GLOO_VARIABLE, "NCCL_SOCKET_IFNAME")
LOOPBACK = "lo"


def use_interface_of(address: str) -> None:
    """Let collectives between nodes use the interface that has this address, unless the environment names one."""
    name = interface_of(address)
    if name is not None:
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


@contextmanager
def collectives_on_loopback() -> Iterator[None]:
    """Let groups that gloo forms in this block listen on loopback, unless the environment names an interface; by itself it
    listens at the address of the host's name. Groups that are formed later may be with a trainer elsewhere."""
    if GLOO_VARIABLE in os.environ:
        yield
        return
    os.environ[GLOO_VARIABLE] = LOOPBACK
    try:
        yield
    finally:
        del os.environ[GLOO_VARIABLE]


def interface_of(address: str) -> str | None:
    """The interface's name; None where none has the address as its first one."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return LOOPBACK
    if wanted.version == 6:
        return _interface_of_ipv6(wanted.packed.hex())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{REQUEST_BYTES}s", name.encode())
            try:
                reply = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:
                # It has no IPv4 address.
                continue
            if reply[ADDRESS_OFFSET : ADDRESS_OFFSET + 4] == wanted.packed:
                return name
    return None


def _interface_of_ipv6(digits: str) -> str | None:
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        fields = line.split()
        if fields[0] == digits:
            return fields[-1]
    return None
