"""Which pools of a prefill's side a rank of a decode's has mapped, and from whom it takes bytes instead."""

from __future__ import annotations

import logging

from ..kv_cache.kv_store import KVStore
from .mapped_pool import MappedPool, NotMappableError, map_pool
from .wire import PoolPlace

logger = logging.getLogger(__name__)


class MappedPools:
    """By the address of the rank that has the pool. `PoolWatch` of a transfer client, on whose thread all is called."""

    def __init__(self, kv_store: KVStore, page_size: int, transport: str) -> None:
        self._kv_store = kv_store
        self._page_size = page_size
        self._transport = transport
        self._mapped: dict[str, tuple[int, MappedPool]] = {}
        self._over_tcp: set[str] = set()

    @property
    def is_needed(self) -> bool:
        """A pool that is mapped is not given back to its host, whoever has died."""
        return bool(self._mapped)

    def generation(self, address: str) -> int | None:
        """What a question says: which pool of this rank is mapped, 0 for none yet, None where bytes are to be sent."""
        if self._transport == "tcp" or address in self._over_tcp:
            return None
        mapped = self._mapped.get(address)
        return 0 if mapped is None else mapped[0]

    def held(self, address: str) -> int:
        mapped = self._mapped.get(address)
        return 0 if mapped is None else mapped[0]

    def get(self, address: str) -> MappedPool:
        """
        Raises:
            ValueError: none is mapped.
        """
        mapped = self._mapped.get(address)
        if mapped is None:
            raise ValueError("the prefill's side speaks of a pool that it has not told of")
        return mapped[1]

    def map(self, address: str, place: PoolPlace) -> None:
        """
        Raises:
            ValueError: it cannot be, and bytes are not allowed.
        """
        self._unmap(address)
        try:
            self._mapped[address] = (place.generation, map_pool(place, self._kv_store, self._page_size))
        except NotMappableError as error:
            if self._transport == "shared":
                raise ValueError(f"--disaggregation-transport shared: {error}") from error
            logger.warning("keys and values of %s come over TCP: %s", address, error)
            self._over_tcp.add(address)

    def check_bytes(self) -> None:
        """Bytes have come.

        Raises:
            ValueError: they are not allowed.
        """
        if self._transport == "shared":
            raise ValueError("--disaggregation-transport shared: the prefill's side sends bytes")

    def seen(self, address: str, generation: int) -> None:
        """A pool that has moved, or was given back, is let go."""
        mapped = self._mapped.get(address)
        if mapped is not None and mapped[0] != generation:
            self._unmap(address)

    def lost(self, address: str) -> None:
        self._unmap(address)
        self._over_tcp.discard(address)

    def _unmap(self, address: str) -> None:
        mapped = self._mapped.pop(address, None)
        if mapped is not None:
            mapped[1].close()
