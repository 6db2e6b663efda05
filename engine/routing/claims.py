"""Rows that wait to be fetched: answers by reference hold a claim, the bytes stay here for a while."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from .wire import RoutedExperts

# What an entry costs beside its rows: Python objects, the envelope, and each run of positions with one weight version.
ENTRY_BYTES = 4096
RUN_BYTES = 256
# A claim is much shorter; what is longer is none.
MAX_CLAIM_CHARS = 128


class ClaimError(ValueError):
    """There is nothing behind a claim; the message says why."""


@dataclass(frozen=True)
class _Entry:
    routed: RoutedExperts
    num_bytes: int
    expires_at: float


class ClaimStore:
    """Rows by claim, each kept for `ttl_s`, oldest dropped first when all together exceed `budget_bytes`. Every claim costs
    at least `ENTRY_BYTES` of it, so their number is bounded, too."""

    def __init__(self, budget_bytes: int, ttl_s: float, clock: Callable[[], float], prefix: str = "") -> None:
        self._prefix = prefix
        self._budget_bytes = budget_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_bytes = 0

    def put(self, routed: RoutedExperts) -> str:
        """Keep rows; returns their claim.

        Raises:
            ClaimError: they alone exceed the budget.
        """
        num_bytes = routed.rows.nbytes + ENTRY_BYTES + RUN_BYTES * len(routed.meta.weight_versions)
        if num_bytes > self._budget_bytes:
            raise ClaimError(f"{num_bytes} bytes of routes exceed claim_budget_bytes={self._budget_bytes}")
        claim = self._prefix + secrets.token_hex(16)
        with self._lock:
            self._expire()
            while self._num_bytes + num_bytes > self._budget_bytes:
                self._drop_oldest()
            self._entries[claim] = _Entry(routed, num_bytes, self._clock() + self._ttl_s)
            self._num_bytes += num_bytes
        return claim

    def get(self, claim: str) -> RoutedExperts:
        """The rows behind a claim, as often as wanted until it expires.

        Raises:
            ClaimError: it is unknown, has expired, or made room for newer ones.
        """
        with self._lock:
            self._expire()
            if claim not in self._entries:
                raise ClaimError(f"claim {claim!r} is unknown, has expired (after {self._ttl_s} s) or made room")
            return self._entries[claim].routed

    def _expire(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self._num_bytes -= entry.num_bytes


def claim_prefix(processor: int, num_processors: int) -> str:
    """What the claims of one of several output processors begin with: its number."""
    return "" if num_processors == 1 else f"{processor}."


def processor_of(claim: str, num_processors: int) -> int:
    """The output processor that made a claim.

    Raises:
        ClaimError: none of them did.
    """
    if len(claim) > MAX_CLAIM_CHARS:
        raise ClaimError(
            f"claim {claim[:MAX_CLAIM_CHARS]!r}... is unknown: a claim has at most {MAX_CLAIM_CHARS} characters"
        )
    if num_processors == 1:
        return 0
    number = claim.partition(".")[0]
    if number not in map(str, range(num_processors)):
        raise ClaimError(f"claim {claim!r} is unknown: it names none of {num_processors} output processors")
    return int(number)
