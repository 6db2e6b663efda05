"""Who may talk to the endpoints of a run: libzmq asks, for every client that comes over TCP, whether its key is known."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Iterable
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from .critical_thread import start_critical_thread
from .sockets import ZAP_DOMAIN, CurveKeys, Endpoint

logger = logging.getLogger(__name__)


class _KnowsOneKey:
    """As pyzmq asks it: `callback` says whether a client's public key (z85) is the run's."""

    def __init__(self, keys: CurveKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        known = hmac.compare_digest(key, self._keys.client_public)
        if not known:
            logger.warning("refused a connection: its key is not this run's")
        return known


class CurveGuard:
    """Guards what a context binds over TCP, from before it is bound until `close`; there may be one in a context. Does
    nothing where nothing is TCP."""

    def __init__(self, context: zmq.Context[Any], endpoints: Iterable[Endpoint | str]) -> None:
        keys = {e.keys for e in endpoints if isinstance(e, Endpoint) and e.keys is not None}
        assert len(keys) <= 1, "a run has one set of keys"
        self._authenticator: ThreadAuthenticator | None = None
        self._is_closing = False
        if keys:
            self._authenticator = ThreadAuthenticator(context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback(ZAP_DOMAIN, _KnowsOneKey(keys.pop()))
            thread = self._authenticator.thread
            start_critical_thread(lambda: self._watch(thread), "watch of the curve guard")

    def _watch(self, thread: threading.Thread) -> None:
        """Without its thread no connection would be let in any more."""
        thread.join()
        if not self._is_closing:
            raise RuntimeError("the authenticator's thread has ended")

    def close(self) -> None:
        """Call before the context is destroyed."""
        self._is_closing = True
        if self._authenticator is not None:
            self._authenticator.stop()
