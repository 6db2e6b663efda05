"""Where gloo listens, and who may connect.

gloo asks nobody who connects for his name: the first who says the number of a pair is that pair, and whoever connects later
keeps a descriptor. So a group listens on one address alone, takes nobody in any more once its members have met, and on one
node, where the kernel knows whose a connection is, all must be this user's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# Of <linux/filter.h>, <asm-generic/socket.h> and <net/tcp_states.h>.
SO_ATTACH_FILTER = 26
BPF_RETURN_CONSTANT = 0x06
TCP_ESTABLISHED = "01"
TCP_LISTEN = "0A"
TCP_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
# The kernel writes its table in parts, between which connections come and go.
NUM_LOOKS = 5


class BpfInstruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class BpfProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(BpfInstruction)))


@dataclass(frozen=True)
class TcpSocket:
    """A line of the kernel's table; addresses as it writes them. `uid` is the owner of the local end."""

    local: str
    remote: str
    state: str
    uid: int
    inode: int


def listening_sockets() -> frozenset[int]:
    """Descriptors of this process that listen on TCP."""
    return frozenset(descriptor for descriptor in map(int, os.listdir("/proc/self/fd")) if is_listening(descriptor))


def is_listening(descriptor: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as each:
            internet = each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM
            return internet and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError:
        # Closed since.
        return False


def take_in_nobody_else(listeners: Iterable[int]) -> None:
    """Let the kernel drop every further attempt to connect. The sockets stay open, as gloo owns and polls them; connections
    that stand are as they were. Where the kernel takes no filter (its memory for them is shared by all users), the log
    says so and the sockets stay as they are."""
    drop = (BpfInstruction * 1)(BpfInstruction(BPF_RETURN_CONSTANT, 0, 0, 0))
    program = bytes(BpfProgram(len(drop), drop))
    for descriptor in listeners:
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            try:
                listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
            except OSError as error:
                logger.warning("others on this host can still connect to a socket of the collectives: %s", error)


def check_whose_connections(listeners: Iterable[int]) -> None:
    """On one node: who has connected to these sockets is this user.

    Raises:
        RuntimeError: somebody else has.
    """
    inodes = {os.fstat(descriptor).st_ino for descriptor in listeners}
    if all(has_other_users(list(tcp_sockets()), inodes, os.geteuid()) for _ in range(NUM_LOOKS)):
        raise RuntimeError(
            "another user of this host has connected to the ranks while they met; this run is given up, start it again"
        )


def has_other_users(sockets: Sequence[TcpSocket], inodes: Set[int], uid: int) -> bool:
    """Whether a connection to one of the listening sockets `inodes` has another end that is not this user's."""
    addresses = {each.local for each in sockets if each.state == TCP_LISTEN and each.inode in inodes}
    connections = [each for each in sockets if each.state == TCP_ESTABLISHED]
    owners = {(each.local, each.remote): each.uid for each in connections}
    return any(owners.get((each.remote, each.local)) != uid for each in connections if each.local in addresses)


def tcp_sockets() -> Iterator[TcpSocket]:
    """Those of this host, or of this network namespace."""
    for table in TCP_TABLES:
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            yield TcpSocket(fields[1], fields[2], fields[3], int(fields[7]), int(fields[9]))


def address_towards(host: str, port: int) -> str:
    """The address with which this node reaches another, or itself. Nothing is sent.

    Raises:
        OSError: there is no way to it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
