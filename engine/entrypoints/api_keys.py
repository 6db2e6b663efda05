"""The keys that open a server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import Scope

SCHEME = b"Bearer "


class ApiKeys:
    """Any of them opens. False where there are none, and everybody may come in."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Of one length, so that the time of a comparison tells nothing of a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def are_held_by(self, scope: Scope) -> bool:
        """Whether the request's `Authorization` has one; all are compared, whichever it is."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        digest = hashlib.sha256(given.removeprefix(SCHEME)).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return given.startswith(SCHEME) and any(matches)
