"""How torchrun's agents meet: torch's static rendezvous, with a store that listens on one address alone.

torch's own stores listen on all interfaces, and its c10d backend ignores `--node-rank` and unpickles what it reads from the
store. Here node 0 is the one that was named so, and what agents tell each other is JSON.
"""

from __future__ import annotations

import ipaddress
import logging
import socket

from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from .exchange import open_listener
from .node_options import RENDEZVOUS_BACKEND

logger = logging.getLogger(__name__)

# For the agents of all nodes to come.
JOIN_TIMEOUT_S = 600


class OneAddressRendezvous(StaticTCPRendezvous):
    """`master_port` 0, for a run on one node, takes a free port."""

    def get_backend(self) -> str:
        return RENDEZVOUS_BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None and self.rank == 0:
            address = str(socket.getaddrinfo(self.master_addr, None, type=socket.SOCK_STREAM)[0][4][0])
            if self.world_size > 1 and ipaddress.ip_address(address).is_loopback:
                logger.warning(
                    "--rdzv-endpoint: %s is %s here, which no other host can reach", self.master_addr, address
                )
            listener = open_listener(address, self.master_port)
            self.master_port = listener.getsockname()[1]
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                self.world_size,
                is_master=True,
                timeout=self.timeout,
                master_listen_fd=listener.detach(),
            )
        return super().next_rendezvous()


class OneNodeRendezvous(OneAddressRendezvous):
    """One agent is alone: its store is in its own memory, and its ranks meet in the run's folder."""

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), self.rank, self.world_size, RendezvousStoreInfo(self.master_addr, 0))


def make_handler(parameters: RendezvousParameters) -> RendezvousHandler:
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=0)
    rank = parameters.get_as_int("rank")
    assert rank is not None
    kind = OneNodeRendezvous if parameters.max_nodes == 1 else OneAddressRendezvous
    return kind(host, port, rank, parameters.max_nodes, parameters.run_id, JOIN_TIMEOUT_S)


def register() -> None:
    """Make it known to torchrun as the backend `waybill`."""
    rendezvous_handler_registry.register(RENDEZVOUS_BACKEND, make_handler)
