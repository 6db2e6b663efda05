"""Which dp rank gets a request: the one it names, its session's, the one that holds the longest prefix of it, else the one
with the least to do. Pure host code."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

MAX_SESSIONS = 100_000
MAX_BLOCKS = 200_000
BLOCK_TOKENS = 64
BLOCK_BYTES = 4 * BLOCK_TOKENS
DIGEST_BYTES = 16
# Blocks of a prompt that are looked at: its first 65,536 tokens tell ranks apart, and hashing runs on the event loop.
MAX_PROMPT_BLOCKS = 1024
# A prefix does not draw a request to a rank that has so many more than the least loaded one.
MAX_IMBALANCE = 8


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class PrefixDirectory:
    """Which dp rank was sent which prompts, by chained hashes of their first blocks of 64 tokens. What a rank has
    evicted since it does not know: it chooses a rank, it promises nothing."""

    def __init__(self, dp_size: int) -> None:
        self._dp_size = dp_size
        self._ranks: OrderedDict[bytes, set[int]] = OrderedDict()

    def num_cached_blocks(self, input_ids: bytes, extra_key: str) -> list[int]:
        """By dp rank, whole blocks from the start of the prompt (int32 bytes) that it was sent before."""
        counts = [0] * self._dp_size
        alive = set(range(self._dp_size))
        for block in self._blocks(input_ids, extra_key):
            alive &= self._ranks.get(block, set())
            if not alive:
                break
            self._ranks.move_to_end(block)
            for rank in alive:
                counts[rank] += 1
        return counts

    def add(self, rank: int, input_ids: bytes, extra_key: str) -> None:
        for block in self._blocks(input_ids, extra_key):
            self._ranks.setdefault(block, set()).add(rank)
            self._ranks.move_to_end(block)
        while len(self._ranks) > MAX_BLOCKS:
            self._ranks.popitem(last=False)

    def clear(self) -> None:
        """The caches were emptied."""
        self._ranks.clear()

    @staticmethod
    def _blocks(input_ids: bytes, extra_key: str) -> Iterator[bytes]:
        digest = digest_of(extra_key.encode())
        end = min(len(input_ids), MAX_PROMPT_BLOCKS * BLOCK_BYTES)
        for first in range(0, end - BLOCK_BYTES + 1, BLOCK_BYTES):
            block = input_ids[first : first + BLOCK_BYTES]
            digest = digest_of(digest + block)
            yield digest


class DpRouter:
    """Keeps a session on its rank, where its prefix is cached; the sessions used longest ago are forgotten first."""

    def __init__(self, dp_size: int) -> None:
        # Samples that were sent to each rank and have not ended.
        self.load = [0] * dp_size
        # By digest: the names are the clients' choice, and up to 512 characters long.
        self._sessions: OrderedDict[bytes, int] = OrderedDict()
        self._prefixes = PrefixDirectory(dp_size)

    def choose(
        self,
        input_ids: bytes,
        extra_key: str = "",
        *,
        session_id: str | None = None,
        routed_dp_rank: int | None = None,
        num_samples: int = 1,
    ) -> int:
        """A rank for `num_samples` samples of one prompt (int32 bytes); call `release` for each when it has ended."""
        rank = 0 if len(self.load) == 1 else self._choose(input_ids, extra_key, session_id, routed_dp_rank)
        self.load[rank] += num_samples
        return rank

    def _choose(self, input_ids: bytes, extra_key: str, session_id: str | None, routed_dp_rank: int | None) -> int:
        rank = routed_dp_rank
        session = None if session_id is None else digest_of(session_id.encode())
        if rank is None and session is not None:
            rank = self._sessions.get(session)
        if rank is None:
            rank = self._best(self._prefixes.num_cached_blocks(input_ids, extra_key))
        if session is not None:
            self._sessions[session] = rank
            self._sessions.move_to_end(session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        self._prefixes.add(rank, input_ids, extra_key)
        return rank

    def _best(self, num_cached: list[int]) -> int:
        """The longest prefix among ranks that are not far busier than others; of equals the least loaded."""
        most = min(self.load) + MAX_IMBALANCE
        candidates = [rank for rank, load in enumerate(self.load) if load <= most]
        return max(candidates, key=lambda rank: (num_cached[rank], -self.load[rank], -rank))

    def release(self, rank: int) -> None:
        """A sample on this rank has ended."""
        self.load[rank] -= 1

    def forget_prefixes(self) -> None:
        """The caches were emptied."""
        self._prefixes.clear()
