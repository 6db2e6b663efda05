"""Which network interface collectives use: gloo and NCCL want its name, and guess if they are not told."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

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
    """The interface's name; None where none has the address."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return LOOPBACK
    for name, addresses in psutil.net_if_addrs().items():
        hosts = [found.address for found in addresses if found.family in (socket.AF_INET, socket.AF_INET6)]
        # A link-local IPv6 address has its interface behind it.
        if any(ipaddress.ip_address(host.partition("%")[0]) == wanted for host in hosts):
            return name
    return None
