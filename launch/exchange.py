"""How the processes of a run over several nodes find each other: every rank opens the sockets that are bound in its name
and tells the others, through torch's rendezvous store, where they listen. Nobody chooses a port: the kernel does.

Listening sockets are opened first and handed over afterwards, also to the processes that a rank starts; so whoever learns
of an address can connect to it, and no two can want the same port.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from typing import Annotated, Any, Protocol

import msgspec
import zmq
from zmq.utils import z85

from ..engine.ipc.sockets import CurveKeys, Endpoint
from ..parallel.collective_sockets import address_towards
from .node_lifeline import NodeLifeline
from .node_options import RUN_SECRET_VARIABLE
from .topology import Addresses, Layout, ipc_endpoint

BACKLOG = 1024
TOKEN_BYTES = 32
SECRETS_KEY = "waybill/secrets"
LISTENERS_KEY = "waybill/listeners/{rank}"
FINGERPRINT_KEY = "waybill/fingerprint"
LIFELINE_KEY = "waybill/lifeline"


class Store(Protocol):
    """torch's rendezvous store. `get` waits, within the store's time-out."""

    # torch takes bytes, too, and does not say so.
    def set(self, key: str, value: Any) -> None: ...

    def get(self, key: str) -> bytes: ...


class RunSecrets(msgspec.Struct, frozen=True):
    """What the processes of one run know and nobody else: made by rank 0, gone with the run."""

    keys: CurveKeys
    # Said by who joins the lifeline between nodes.
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]

    @staticmethod
    def make() -> RunSecrets:
        return RunSecrets(CurveKeys.make(), secrets.token_bytes(TOKEN_BYTES))

    @staticmethod
    def derive(secret: bytes) -> RunSecrets:
        """From what an operator gave to all nodes; the same everywhere."""

        def part(name: str) -> bytes:
            key = hashlib.blake2b(secret).digest()
            return hashlib.blake2b(name.encode(), key=key, digest_size=TOKEN_BYTES).digest()

        server, client = (z85.encode(part(name)) for name in ("server", "client"))
        keys = CurveKeys(zmq.curve_public(server), server, zmq.curve_public(client), client)
        return RunSecrets(keys, part("token"))

    @property
    def fingerprint(self) -> bytes:
        """Tells others which secrets these are, and nothing of them."""
        return hashlib.blake2b(self.token, person=b"fingerprint").digest()


def share_secrets(store: Store, rank: int, secret: bytes | None) -> RunSecrets:
    """Those of the run, on every rank: from the operator's secret, or made by rank 0 and told through the store.

    Raises:
        ValueError: this node and node 0 were not given the same secret.
    """
    given = None if secret is None else RunSecrets.derive(secret)
    fingerprint = b"none" if given is None else given.fingerprint
    if rank == 0:
        store.set(FINGERPRINT_KEY, fingerprint)
        if given is None:
            store.set(SECRETS_KEY, msgspec.msgpack.encode(RunSecrets.make()))
    if store.get(FINGERPRINT_KEY) != fingerprint:
        raise ValueError(f"{RUN_SECRET_VARIABLE}: must be the same on all nodes; this one and node 0 differ")
    return given or msgspec.msgpack.decode(store.get(SECRETS_KEY), type=RunSecrets)


def share_lifeline(store: Store, lifeline: NodeLifeline, rank: int, node_address: str) -> None:
    """Rank 0 listens for the others, and they hold on to it."""
    if rank == 0:
        listener = open_listener(node_address)
        lifeline.serve(listener)
        store.set(LIFELINE_KEY, msgspec.msgpack.encode((node_address, listener.getsockname()[1])))
    else:
        lifeline.join(*msgspec.msgpack.decode(store.get(LIFELINE_KEY), type=tuple[str, int]))


def exchange_addresses(
    store: Store, layout: Layout, rank: int, run_dir: str, node_address: str, keys: CurveKeys
) -> Addresses:
    """Open this rank's sockets and learn where the others' are. The returned endpoints of this rank hold its listeners."""
    own = {
        place.name: ipc_endpoint(run_dir, place.name) if place.is_local else listen(node_address, keys)
        for place in layout.sockets()
        if place.rank == rank
    }
    told = {name: endpoint.address for name, endpoint in own.items()}
    store.set(LISTENERS_KEY.format(rank=rank), msgspec.msgpack.encode(told))
    endpoints: dict[str, Endpoint] = {}
    for other in range(layout.world_size):
        heard = msgspec.msgpack.decode(store.get(LISTENERS_KEY.format(rank=other)), type=dict[str, str])
        for name, address in heard.items():
            endpoints[name] = Endpoint(address, keys if address.startswith("tcp://") else None)
    return layout.addresses(run_dir, endpoints | own)


def listen(node_address: str, keys: CurveKeys, port: int = 0) -> Endpoint:
    """A TCP endpoint of this node, on a free port if none is given, with a socket that listens.

    Raises:
        ValueError: as `open_listener`.
    """
    listener = open_listener(node_address, port)
    port = listener.getsockname()[1]
    host = f"[{node_address}]" if ":" in node_address else node_address
    return Endpoint(f"tcp://{host}:{port}", keys, listener.detach())


def open_listener(node_address: str, port: int = 0) -> socket.socket:
    """A socket that listens on one address of this node, never on all.

    Raises:
        ValueError: the address is not one of this node's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in node_address else socket.AF_INET
    try:
        return socket.create_server((node_address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(f"cannot listen on {node_address} port {port}: {error.strerror or error}") from error


def node_address_towards(host: str, port: int) -> str:
    """
    Raises:
        ValueError: there is no way to it.
    """
    try:
        return address_towards(host, port)
    except OSError as error:
        raise ValueError(
            f"--rdzv-endpoint {host}:{port}: this node has no way to it: {error.strerror or error}"
        ) from error
