"""Which pools of a prefill's side a rank of a decode's side can reach, and from whom it takes bytes instead."""

from __future__ import annotations

import logging

import numpy as np

from .page_copy import Heads
from .remote_pool import NotMappableError, OpenPool, PoolLostError, RemotePool
from .wire import PoolPlace

logger = logging.getLogger(__name__)


class RemotePools:
    """By the address of the rank that has the pool. `PoolWatch` of a transfer client, on whose thread all is called.
    `transport` is the option of this side."""

    def __init__(self, open_pool: OpenPool, transport: str) -> None:
        self._open_pool = open_pool
        self._transport = transport
        self._pools: dict[str, tuple[int, RemotePool]] = {}
        self._over_tcp: set[str] = set()

    @property
    def is_needed(self) -> bool:
        """A pool that is mapped is not given back to its host, whoever has died."""
        return bool(self._pools)

    def transport(self, address: str) -> str:
        """How a question asks for positions."""
        if address in self._over_tcp:
            return "tcp"
        return "shared" if self._transport == "auto" else self._transport

    def held(self, address: str) -> int:
        known = self._pools.get(address)
        return 0 if known is None else known[0]

    def get(self, address: str) -> RemotePool:
        """
        Raises:
            ValueError: there is none.
        """
        known = self._pools.get(address)
        if known is None:
            raise ValueError("the prefill's side speaks of a pool that it has not told of")
        return known[1]

    def open(self, address: str, place: PoolPlace) -> None:
        """
        Raises:
            ValueError: it cannot be, and bytes are not allowed.
        """
        self._close(address)
        try:
            self._pools[address] = (place.generation, self._open_pool(place))
        except NotMappableError as error:
            if self._transport != "auto":
                raise ValueError(f"--disaggregation-transport {self._transport}: {error}") from error
            logger.warning("keys and values of %s come over TCP: %s", address, error)
            self._over_tcp.add(address)

    def read(self, address: str, their_pages: np.ndarray, start: int, end: int, theirs: Heads) -> None:
        """See `RemotePool`. One that is lost is asked for anew.

        Raises:
            ValueError: it cannot be had.
        """
        try:
            self.get(address).read(their_pages, start, end, theirs)
        except PoolLostError as error:
            self._close(address)
            raise ValueError(f"--disaggregation-transport {self._transport}: {error}") from error

    def check_bytes(self) -> None:
        """Bytes have come.

        Raises:
            ValueError: they are not allowed.
        """
        if self._transport not in ("auto", "tcp"):
            raise ValueError(f"--disaggregation-transport {self._transport}: the prefill's side sends bytes")

    def seen(self, address: str, generation: int) -> None:
        """A pool that has moved, or was given back, is let go."""
        if self.held(address) not in (0, generation):
            self._close(address)

    def lost(self, address: str) -> None:
        self._close(address)
        self._over_tcp.discard(address)

    def _close(self, address: str) -> None:
        known = self._pools.pop(address, None)
        if known is not None:
            known[1].close()
